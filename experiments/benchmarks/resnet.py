r"""How fast does a ResNet with batch norm train, beside PyTorch?

He et al.'s ResNet of 6n + 2 layers for images of 32 x 32 x 3, width 16, batch 128,
plain SGD, on made-up images: 20 layers unless told otherwise. Products of float32; on a
GPU also of TF32, and in bfloat16, where PyTorch computes by autocast.

  pip install -e '.[bench]'
  python -m experiments.benchmarks.resnet --workdir=runs/resnet-speed       10 minutes
  python -m experiments.benchmarks.resnet --workdir=runs/resnet-try --smoke  2 minutes
  python -m experiments.benchmarks.resnet --workdir=runs/resnet110 --depth=110

A round is an epoch of --steps batches of each arm; the clock includes what that of
`experiments.benchmarks.lenet` does. Before, each arm takes two steps from the same
weights on the same batches; unless their losses agree to 1% (rounding of another width
is in them), nothing is reported. PyTorch's ways to train are tried as there, and the
fastest kept. How long initialisation and compilation took is reported beside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from bn_jax import fields
from bn_jax.data import ImageData, Split
from bn_jax.models.resnet import DEPTHS
from bn_jax.training.config import TrainConfig
from experiments.benchmarks import (
    benchmark,
    lenet_peers,
    timing,
    torch_training,
    training,
)

WIDTH, SIDE, CHANNELS, NUM_CLASSES = 16, 32, 3, 10
NUM_CHECKED_STEPS = 2
LOSS_TOLERANCE = 0.01  # of the reference's loss
RATE = 0.1

Precision = Literal["highest", "default", "bfloat16"]


def ours(design: Design, *, precision: Precision) -> benchmark.Ready:
    """Set up our trainer."""
    return training.ready(
        design.load(), num_checked=NUM_CHECKED_STEPS, **design.config(precision)
    )


def torch(design: Design, *, precision: Precision) -> benchmark.Ready:
    """Set up PyTorch in the fastest of the ways to run it that the design allows."""
    data = design.load()
    trainer = training.trainer(data, **design.config())
    order = training.first_order(trainer)
    task = torch_training.Task(
        functools.partial(torch_resnet, design.depth), *data.train, RATE, order
    )
    (net, train), about = torch_training.fastest(
        task,
        may_compile=design.torch_compile,
        tf32=precision == "default",
        bfloat16=precision == "bfloat16",
    )
    torch_training.load(net, torch_params(training.flat_params(trainer)))
    peer = lenet_peers.torch_training_peer(task, train, about)
    return lenet_peers.ready(peer, order, NUM_CHECKED_STEPS)


def torch_resnet(depth: int) -> Any:
    """Return the same network in PyTorch."""
    from torch import nn
    from torch.nn import functional

    def conv(inputs: int, outputs: int, stride: int = 1) -> Any:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = (
                conv(inputs, outputs, stride),
                nn.BatchNorm2d(outputs),
            )
            self.conv2, self.norm2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
            self.stride, self.added = stride, outputs - inputs

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            x = x[:, :, :: self.stride, :: self.stride]
            return functional.relu(y + functional.pad(x, (0, 0, 0, 0, 0, self.added)))

    layers = [conv(CHANNELS, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    inputs = WIDTH
    for stage in range(3):
        for i in range((depth - 2) // 6):
            outputs = WIDTH * 2**stage
            layers.append(Block(inputs, outputs, 2 if stage and not i else 1))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, NUM_CLASSES)]
    return nn.Sequential(*layers)


def torch_params(params: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return our parameters as PyTorch has them, in its order."""

    def block(name: str) -> tuple[int, ...]:
        return tuple(map(int, name.removeprefix("stage").split("_block")))

    blocks = sorted({k.partition("/")[0] for k in params if "_block" in k}, key=block)
    layers = ["stem", "stem_norm"]
    for name in blocks:
        layers += [f"{name}/{part}" for part in ("conv1", "norm1", "conv2", "norm2")]
    listed = []
    for layer in layers:
        if "norm" in layer:
            listed += [params[f"{layer}/scale"], params[f"{layer}/bias"]]
        else:
            listed.append(params[f"{layer}/kernel"].transpose(3, 2, 0, 1))
    return [*listed, params["head/kernel"].T, params["head/bias"]]


TITLES: dict[Precision, str] = {
    "highest": "",
    "default": ", TF32",
    "bfloat16": ", bfloat16",
}
SUFFIXES: dict[Precision, str] = {
    "highest": "",
    "default": "_tf32",
    "bfloat16": "_bfloat16",
}
ARMS = {
    f"{library}{SUFFIXES[precision]}": benchmark.Arm(
        f"{name}{title}",
        functools.partial(set_up, precision=precision),
        needs,
        env=benchmark.TF32 if precision == "default" else {},
        on_gpu=precision != "highest",
    )
    for precision, title in TITLES.items()
    for library, name, set_up, needs in (
        ("ours", "ours", ours, ()),
        ("torch", "PyTorch", torch, ("torch",)),
    )
}


@dataclasses.dataclass(frozen=True)
class Design(benchmark.Design):
    """Which network, on how much."""

    depth: int = fields.option(20, "Number of layers.", valid=DEPTHS)
    batch_size: int = fields.option_of(TrainConfig, "batch_size", 128)
    steps: int = fields.option(40, "Batches an epoch.", valid=fields.AT_LEAST_1)
    torch_compile: bool = fields.option(
        True, "Whether PyTorch tries torch.compile, which takes minutes."
    )
    arms: tuple[str, ...] = benchmark.arms_option(ARMS)

    def load(self) -> ImageData:
        """Return made-up images, whose class can be read off a bright row."""
        rng = np.random.default_rng(0)
        n = self.steps * self.batch_size
        labels = rng.integers(0, NUM_CLASSES, n).astype(np.int32)
        shape = (n, SIDE, SIDE, CHANNELS)
        images = rng.integers(0, 120, shape, dtype=np.uint8)
        images[np.arange(n), 2 * labels + 4] = 255
        train, test = Split(images, labels), Split(images[:100], labels[:100])
        names = tuple(map(str, range(NUM_CLASSES)))
        return ImageData(
            name="made-up",
            train=train,
            test=test,
            class_names=names,
            kind="sample",
            source="made-up images",
        )

    def config(self, precision: Precision = "highest") -> Mapping[str, Any]:
        """Return the choices of our trainer's config."""
        return {
            "model": f"resnet:depth={self.depth},width={WIDTH}",
            "batch_size": self.batch_size,
            "learning_rate": RATE,
            "precision": precision,
        }


def report(measured: benchmark.Measured) -> benchmark.Report:
    """Report speeds, to PyTorch's in float32, and what came before the first step."""
    losses = {arm: about["losses"] for arm, about in measured.about.items()}
    first = next(iter(losses))
    apart = timing.check_agreement(
        losses,
        first,
        tolerance=LOSS_TOLERANCE * max(losses[first]),
        what=f"losses of the first {NUM_CHECKED_STEPS} steps",
    )
    reference, speeds = lenet_peers.compare_speeds(measured)
    before = {
        arm: {
            name: about[name]
            for name in ("set_up_seconds", "compile_seconds")
            if name in about
        }
        for arm, about in measured.about.items()
    }
    column = ["set-up and compilation, s"]
    column += [
        f"{sum(before[arm].values()):.0f}" if before[arm] else "-" for arm in losses
    ]
    same = {
        arm: timing.ratios(
            speeds.values[arm], speeds.values[arm.replace("ours", "torch")]
        )
        for arm in losses
        if arm.startswith("ours") and arm.replace("ours", "torch") in speeds.values
    }
    return benchmark.Report(
        tables=[
            [[*row, cell] for row, cell in zip(speeds.table, column, strict=True)],
        ],
        results={
            f"ratio_to_{reference}": speeds.ratios,
            "ratio_to_pytorch_of_the_same_precision": same,
            "examples_per_second": speeds.values,
            "largest_difference_in_loss": apart,
            "about": measured.about,
        },
        figures={"resnet": speeds.figure},
        notes=[
            f"{measured.titles[arm]}: {timing.interval(ratio)} of PyTorch's examples/s "
            "in the same precision"
            for arm, ratio in same.items()
        ],
    )


BENCHMARK = benchmark.Benchmark(
    "resnet",
    Design,
    ARMS,
    report,
    smoke={
        "rounds": 1,
        "depth": 8,
        "steps": NUM_CHECKED_STEPS,
        "batch_size": 8,
        "torch_compile": False,
    },
)

if __name__ == "__main__":
    benchmark.start(BENCHMARK)
