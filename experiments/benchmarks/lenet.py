r"""How fast does LeNet with batch norm train, beside the other libraries?

In examples/s on Fashion-MNIST: batch 256, learning rate 1.0, SGD, float32. Ours in
several variants; PyTorch with its own layers and with the chapter's from-scratch batch
norm; Flax with `nn.Conv` and `nn.BatchNorm` in a plain loop over a jitted step; Keras
on JAX.

  pip install -e '.[bench]'
  python -m experiments.benchmarks.lenet --workdir=runs/lenet-speed          7 minutes
  python -m experiments.benchmarks.lenet --workdir=runs/lenet-try --smoke    a minute
  python -m experiments.benchmarks.lenet --workdir=runs/two --arms=ours,torch

A round is an epoch of each arm. The arms take turns; each has a process of its own, set
up as its library does by default. The clock includes: a new order of the examples,
gathering each batch, bytes to floats, forward and backward pass, moving averages, SGD,
loss and accuracy of each step, and fetching them. It excludes compilation and
evaluation. The remainder of fewer than 256 examples is dropped. (Keras draws its
batches in `fit`, so it leaves out the same 96 examples every epoch.) `--steps` trains
on fewer batches.

First each arm takes 20 steps from the same weights on the same batches; unless all
losses agree to 1e-3, nothing is reported. PyTorch tries NCHW and channels-last memory,
eager and compiled, and on a GPU with the compiled step as one CUDA graph, on a few
steps, and keeps the fastest; the table says which. On a GPU products are of float32,
and in two more arms of TF32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from bn_jax import fields
from bn_jax.data import ImageData, Split
from bn_jax.training.config import TrainConfig
from experiments.benchmarks import benchmark, lenet_peers, timing, training

NUM_CHECKED_STEPS = 20
# At learning rate 1 rounding errors grow over 20 steps, to 1e-4 at most in what we saw.
LOSS_TOLERANCE = 1e-3
TF32_TOLERANCE = 0.02  # of products that round a thousand times as much
RATE = lenet_peers.LEARNING_RATE


def ours(design: Design, *, devices: int = 1, **options: Any) -> benchmark.Ready:
    """Set up our trainer; options as of `training.ready`."""
    return training.ready(
        design.load(),
        num_checked=NUM_CHECKED_STEPS,
        devices=devices,
        batch_size=design.batch_size,
        learning_rate=RATE,
        **options,
    )


def our_arm(title: str, *, devices: int = 1, **options: Any) -> benchmark.Arm:
    """Return an arm of our trainer."""
    set_up = functools.partial(ours, devices=devices, **options)
    return benchmark.Arm(title, set_up, devices=devices)


def start_of(data: ImageData, batch_size: int) -> lenet_peers.Start:
    """Return our initial parameters and the order of our first epoch."""
    trainer = training.trainer(data, batch_size=batch_size, learning_rate=RATE)
    return lenet_peers.Start(
        *data.train, training.flat_params(trainer), training.first_order(trainer)
    )


def peer(
    design: Design, *, make: Callable[[lenet_peers.Start], lenet_peers.Peer]
) -> benchmark.Ready:
    """Set up another library."""
    start = start_of(design.load(), design.batch_size)
    return lenet_peers.ready(make(start), start.order, NUM_CHECKED_STEPS)


def torch(
    design: Design, *, from_scratch: bool = False, tf32: bool = False
) -> benchmark.Ready:
    """Set up PyTorch, in the fastest of the variants that the design allows."""
    make = functools.partial(
        lenet_peers.torch_peer,
        from_scratch=from_scratch,
        may_compile=design.torch_compile,
        tf32=tf32,
    )
    return peer(design, make=make)


ARMS = {
    "ours": our_arm("ours"),
    "ours_no_bias": our_arm(
        "ours, no bias before norm", model="lenet:bias_before_norm=false"
    ),
    "ours_flax_norm": our_arm("ours with Flax's BatchNorm", norm="flax"),
    "ours_nhwc": our_arm("ours, NHWC", layout="NHWC"),
    "ours_2_devices": our_arm("ours, 2 devices, exact sync, pmap", devices=2),
    "ours_2_devices_jit": our_arm(
        "ours, 2 devices, exact sync, jit", devices=2, mode="jit"
    ),
    "torch": benchmark.Arm("PyTorch", torch, ["torch"]),
    "ours_tf32": our_arm("ours, TF32", precision="default")._replace(
        on_gpu=True, env=benchmark.TF32
    ),
    "torch_tf32": benchmark.Arm(
        "PyTorch, TF32", functools.partial(torch, tf32=True), ["torch"], on_gpu=True
    ),
    "torch_scratch": benchmark.Arm(
        "PyTorch, from-scratch norm",
        functools.partial(torch, from_scratch=True),
        ["torch"],
    ),
    "flax": benchmark.Arm(
        "Flax, NHWC, jitted step", functools.partial(peer, make=lenet_peers.flax_peer)
    ),
    "keras": benchmark.Arm(
        "Keras on JAX, fit",
        functools.partial(peer, make=lenet_peers.keras_peer),
        ["keras"],
        env={"KERAS_BACKEND": "jax"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Design(benchmark.DataDesign):
    """Which arms train, on how much."""

    steps: int = fields.option(
        0, "Batches an epoch; 0 for all examples.", valid=fields.NOT_NEGATIVE
    )
    batch_size: int = fields.option_of(TrainConfig, "batch_size")
    torch_compile: bool = fields.option(
        True, "Whether PyTorch tries torch.compile, which takes a minute."
    )
    arms: tuple[str, ...] = benchmark.arms_option(ARMS)

    def load(self) -> ImageData:
        """Return the data set, with as many training images as `steps` take."""
        data = super().load()
        if not self.steps:
            return data
        size, most = self.steps * self.batch_size, len(data.train.labels)
        if size > most:
            raise fields.ConfigError(
                f"steps={self.steps} of batch_size={self.batch_size} take {size} "
                f"examples of {most}; give fewer"
            )
        train = Split(data.train.images[:size], data.train.labels[:size])
        return dataclasses.replace(data, train=train)


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report speeds, and their ratios to PyTorch's."""
    losses = {arm: about["losses"] for arm, about in measured.about.items()}
    first = "ours" if "ours" in losses else next(iter(losses))
    rounded = {arm: losses[arm] for arm in losses if arm.endswith("tf32")}
    apart = {}
    for arms, tolerance in (
        ({arm: losses[arm] for arm in losses.keys() - rounded}, LOSS_TOLERANCE),
        (rounded, TF32_TOLERANCE),
    ):
        apart |= timing.check_agreement(
            {first: losses[first], **arms},
            first,
            tolerance=tolerance,
            what=f"losses of the first {NUM_CHECKED_STEPS} steps",
        )
    reference, speeds = lenet_peers.compare_speeds(measured)
    return benchmark.Report(
        tables=[speeds.table],
        results={
            f"ratio_to_{reference}": speeds.ratios,
            "examples_per_second": speeds.values,
            "loss_by_round": measured.values("loss"),
            "accuracy_by_round": measured.values("accuracy"),
            "largest_difference_in_loss": apart,
            "about": measured.about,
        },
        figures={"lenet": speeds.figure},
        notes=[
            f"losses of the first steps differ by at most {max(apart.values()):.1g} "
            "nats"
        ],
    )


BENCHMARK = benchmark.Benchmark(
    "lenet",
    Design,
    ARMS,
    report,
    smoke={
        "dataset": "sample",
        "rounds": 2,
        "steps": NUM_CHECKED_STEPS,
        "torch_compile": False,
        "arms": ("ours", "ours_2_devices", "torch", "flax", "keras"),
    },
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
