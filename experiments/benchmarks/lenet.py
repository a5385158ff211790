r"""How fast does LeNet with batch norm train, beside the other libraries?

By examples/s on Fashion-MNIST: batch 256, learning rate 1.0, SGD, float32. Ours by
variant; PyTorch with its own layers and with the chapter's from-scratch batch norm;
Flax with `nn.Conv` and `nn.BatchNorm` in a plain loop over a jitted step; Keras on JAX.

  pip install -e '.[bench]'
  python -m experiments.benchmarks.lenet --workdir=runs/lenet-speed          7 minutes
  python -m experiments.benchmarks.lenet --workdir=runs/lenet-try --smoke    a minute
  python -m experiments.benchmarks.lenet --workdir=runs/two --arms=ours,torch

A round is an epoch of each arm, in turns, each in a process of its own, as its library
sets itself up. In everyone's clock: the new order of the examples, gathering a batch,
bytes to floats, forward and backward pass, moving averages, SGD, loss and accuracy of
each step, and fetching them. In no one's: compilation, evaluation, the remainder of
fewer than 256 examples, which is dropped. (Keras draws its batches in `fit`, so it
leaves out the same 96 examples every epoch.) `--steps` takes fewer batches of the data.

First each arm takes 20 steps from the same weights in the same order of examples; all
must have the same losses to 1e-3, or there is no table. PyTorch tries NCHW and
channels-last memory, eager and compiled, on a few steps, and takes the fastest: the
table says which. The folder receives results.json, table.md and lenet.png.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from bn_jax import fields
from bn_jax.training import config as config_lib
from experiments import launch
from experiments.benchmarks import lenet_peers, timing

if TYPE_CHECKING:
    from bn_jax.data import ImageData

NUM_CHECKED_STEPS = 20
# At learning rate 1 rounding grows over 20 steps, to 1e-4 at most where it was seen.
LOSS_TOLERANCE = 1e-3
# Several processes share a GPU: none takes its memory in advance.
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Arm(NamedTuple):
    """A way to train: ours by options, or a peer."""

    title: str
    config: Mapping[str, Any] = {}
    devices: int = 1
    parallel: str = "pmap"
    layout: str | None = None
    peer: Callable[[lenet_peers.Start], lenet_peers.Peer] | None = None
    needs: Sequence[str] = ()  # modules
    env: Mapping[str, str] = {}


def torch_arm(title: str, *, from_scratch: bool) -> Arm:
    """Return an arm of PyTorch, in the fastest of the variants that flags allow."""

    def set_up(start: lenet_peers.Start) -> lenet_peers.Peer:
        return lenet_peers.torch_peer(
            start, from_scratch=from_scratch, may_compile=flags.FLAGS.torch_compile
        )

    return Arm(title, peer=set_up, needs=["torch"])


ARMS = {
    "ours": Arm("ours"),
    "ours_no_bias": Arm("ours, no bias before norm", {"bias_before_norm": False}),
    "ours_flax_norm": Arm("ours with Flax's BatchNorm", {"norm": "flax"}),
    "ours_nhwc": Arm("ours, NHWC", layout="NHWC"),
    "ours_2_devices": Arm("ours, 2 devices, exact sync, pmap", devices=2),
    "ours_2_devices_jit": Arm(
        "ours, 2 devices, exact sync, jit", devices=2, parallel="jit"
    ),
    "torch": torch_arm("PyTorch", from_scratch=False),
    "torch_scratch": torch_arm("PyTorch, from-scratch norm", from_scratch=True),
    "flax": Arm("Flax, NHWC, jitted step", peer=lenet_peers.flax_peer, needs=["flax"]),
    "keras": Arm(
        "Keras on JAX, fit",
        peer=lenet_peers.keras_peer,
        needs=["keras"],
        env={"KERAS_BACKEND": "jax"},
    ),
}
REFERENCE = "torch"
SMOKE_ARMS = ["ours", "ours_2_devices", "torch", "flax", "keras"]


def define_flags() -> None:
    launch.define_data_flags()
    launch.define_workdir_flag()
    flags.DEFINE_string("dataset", "auto", "As in experiments.lenet.")
    flags.DEFINE_integer("rounds", 7, "Epochs timed of each arm.", lower_bound=1)
    flags.DEFINE_integer(
        "steps", None, "Batches an epoch (default: of all examples).", lower_bound=1
    )
    flags.DEFINE_integer("batch_size", 256, "Examples a step.", lower_bound=1)
    flags.DEFINE_list(
        "arms", list(ARMS), f"What to time, separated by commas, of {', '.join(ARMS)}."
    )
    flags.DEFINE_boolean(
        "torch_compile", True, "Whether PyTorch tries torch.compile; takes a minute."
    )
    flags.DEFINE_boolean(
        "smoke",
        False,
        "20 steps of the sample, 2 rounds, some arms, no torch.compile, unless given.",
    )
    flags.DEFINE_string("arm", None, "Time this arm when told to; used by the program.")
    flags.DEFINE_string("start", None, "File of where to start; used by the program.")


def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    smoke: dict[str, Any] = {}
    if flags.FLAGS.smoke:
        smoke = {
            "dataset": "sample",
            "rounds": 2,
            "steps": NUM_CHECKED_STEPS,
            "torch_compile": False,
            "arms": SMOKE_ARMS,
        }
    names = ("dataset", "rounds", "steps", "batch_size", "torch_compile")
    given = {name: launch.given_or(name, smoke) for name in names}
    if flags.FLAGS.arm is not None:
        time_arm(ARMS[flags.FLAGS.arm], given)
        return
    os.environ.update(SHARED_GPU)
    arms, skipped = choose_arms(launch.given_or("arms", smoke))
    with launch.experiment(
        "lenet_speed", {**given, "arms": list(arms)}, repeat=False
    ) as folder:
        with tempfile.TemporaryDirectory() as temporary:
            start = Path(temporary) / "start.npz"
            data = load_data(given)
            write_start(start, data, given["batch_size"])
            about, measured = timing.interleaved(
                "experiments.benchmarks.lenet",
                {name: {**SHARED_GPU, **arm.env} for name, arm in arms.items()},
                rounds=given["rounds"],
                arguments=[
                    f"--start={start}",
                    *(f"--{k}={v}" for k, v in given.items() if v is not None),
                    *launch.data_arguments(),
                ],
            )
        write(folder, about, measured, skipped=skipped, source=data.source)


def choose_arms(names: Sequence[str]) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the arms that can run here, and of those that cannot, why.

    Raises:
      ConfigError: if there is no arm of a name, or none can run.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise fields.ConfigError(
            f"arms={','.join(unknown)}; expected of {', '.join(ARMS)}"
        )
    skipped = timing.missing({name: ARMS[name].needs for name in names})
    arms = {name: ARMS[name] for name in names if name not in skipped}
    if any(arm.devices > 1 for arm in arms.values()):
        import jax

        if jax.default_backend() != "cpu":  # whose devices are made of cores
            for name in [n for n, a in arms.items() if a.devices > jax.device_count()]:
                del arms[name]
                skipped[name] = f"there is {jax.device_count()} device"
    for name, reason in skipped.items():
        print(f"left out: {name} ({reason})", flush=True)
    if not arms:
        raise fields.ConfigError("no arm is left; pip install -e '.[bench]'")
    return arms, skipped


def load_data(given: Mapping[str, Any]) -> ImageData:
    """Return the data set, of as many batches as --steps says."""
    import dataclasses

    from bn_jax import data as data_lib

    data = data_lib.load(
        given["dataset"], data_dir=flags.FLAGS.data_dir, idx_dir=flags.FLAGS.idx_dir
    )
    if given["steps"] is None:
        return data
    size = given["steps"] * given["batch_size"]
    if size > len(data.train.labels):
        raise fields.ConfigError(
            f"steps={given['steps']} of batch_size={given['batch_size']} take {size} "
            f"examples of {len(data.train.labels)}; give fewer"
        )
    train = data_lib.Split(data.train.images[:size], data.train.labels[:size])
    return dataclasses.replace(data, train=train)


def make_trainer(data: ImageData, arm: Arm, batch_size: int) -> Any:
    """Return our trainer for an arm."""
    from bn_jax.training import loop, parallel
    from bn_jax.training import step as step_lib

    config = config_lib.TrainConfig(
        epochs=10**6,
        batch_size=batch_size,
        learning_rate=lenet_peers.LEARNING_RATE,
        **arm.config,
    )

    def make_train_step(model: Any, optimizer: Any, **options: Any) -> Any:
        model = model.clone(layout=arm.layout)  # parameters do not know the layout
        return step_lib.make_train_step(model, optimizer, **options)

    return loop.Trainer(
        config,
        data,
        placement=parallel.place(
            config, devices=str(arm.devices), parallel=arm.parallel
        ),
        make_train_step=make_train_step,
    )


def write_start(path: Path, data: ImageData, batch_size: int) -> None:
    """Write our initial parameters and the order of our first epoch."""
    from flax import traverse_util

    from bn_jax.training import feed

    trainer = make_trainer(data, ARMS["ours"], batch_size)
    order = feed.Order(
        trainer.order_key,
        num_examples=len(data.train.labels),
        batch_size=batch_size,
    ).of_epoch(0)
    params = traverse_util.flatten_dict(trainer.state().params, sep="/")
    np.savez(path, order=order, **{f"params/{k}": v for k, v in params.items()})


def read_start(path: str, data: ImageData) -> lenet_peers.Start:
    """Return where all arms start."""
    with np.load(path) as file:
        params = {
            name.removeprefix("params/"): file[name]
            for name in file.files
            if name.startswith("params/")
        }
        return lenet_peers.Start(*data.train, params, file["order"])


def time_arm(arm: Arm, given: Mapping[str, Any]) -> None:
    """Set an arm up, and time an epoch whenever told to."""
    data = load_data(given)
    if arm.peer is None:
        time_ours(arm, data, given["batch_size"])
        return
    start = read_start(flags.FLAGS.start, data)
    set_float32()
    peer = arm.peer(start)
    losses = peer.replay(start.order[:NUM_CHECKED_STEPS])

    def epoch() -> dict[str, float]:
        started = time.perf_counter()
        means = peer.epoch()
        seconds = time.perf_counter() - started
        speed = start.order.size / seconds
        return {
            "examples_per_second": speed,
            "epoch_seconds": seconds,
            **means._asdict(),
        }

    timing.serve({"losses": losses, **peer.about}, epoch)


def set_float32() -> None:
    """Make float32 products float32 on a GPU, too, where JAX and cuDNN round them."""
    import jax

    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32")


def time_ours(arm: Arm, data: ImageData, batch_size: int) -> None:
    """Set up our trainer, and time an epoch whenever told to."""
    import jax

    jax.config.update("jax_num_cpu_devices", arm.devices)
    set_float32()
    trainer = make_trainer(data, arm, batch_size)
    training = trainer.train()
    next(training)  # of the first epoch, which no round measures, at least 20 steps
    losses = trainer.progress().step_losses[:NUM_CHECKED_STEPS]

    def epoch() -> dict[str, float]:
        report = next(report for report in training if report is not None)
        return {
            "examples_per_second": report.examples_per_second,
            "epoch_seconds": report.seconds,
            "loss": report.loss,
            "accuracy": report.train_accuracy,
        }

    timing.serve(
        {
            "losses": losses.astype(float).tolist(),
            "compile_seconds": trainer.compile_seconds,
        },
        epoch,
    )


def check_losses(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return how far each arm's first losses are from ours (or the first arm's).

    Raises:
      FloatingPointError: if one is further than the tolerance.
    """
    reference = "ours" if "ours" in losses else next(iter(losses))
    apart = timing.largest_differences(losses, losses[reference])
    if max(apart.values()) > LOSS_TOLERANCE:
        raise FloatingPointError(
            f"losses of the first {len(losses[reference])} steps differ from those of "
            f"{reference} by {apart}; the arms do not train alike, so their times say "
            "nothing"
        )
    return apart


def write(
    folder: Path,
    about: Mapping[str, Any],
    measured: Mapping[str, Sequence[timing.Measurement]],
    *,
    skipped: Mapping[str, str],
    source: str,
) -> None:
    """Check that arms train alike; print and write what they took."""
    from bn_jax import plots
    from bn_jax.runs import results

    apart = check_losses({name: about[name]["losses"] for name in measured})
    speeds = timing.values(measured, "examples_per_second")
    reference = REFERENCE if REFERENCE in speeds else next(iter(speeds))
    ratios = {name: timing.ratios(speeds[name], speeds[reference]) for name in speeds}
    titles = {
        name: ARMS[name].title
        + (f" ({about[name]['variant']})" if "variant" in about[name] else "")
        for name in speeds
    }
    rows = [["arm", f"to {ARMS[reference].title}", "examples/s"]]
    for name in speeds:
        speed = timing.summarize(speeds[name])
        rows.append(
            [titles[name], timing.interval(ratios[name]), timing.interval(speed, 5)]
        )
    text = timing.table(rows)
    (folder / "table.md").write_text(text)
    note = f"n = {ratios[reference].n} rounds; lines: least to greatest"
    plots.bars(
        {titles[name]: ratios[name] for name in speeds},
        f"examples/s, to {ARMS[reference].title}",
        note,
        folder / "lenet.png",
    )
    summary = {
        f"ratio_to_{reference}": {k: ratio._asdict() for k, ratio in ratios.items()},
        "examples_per_second": speeds,
        "loss_by_round": timing.values(measured, "loss"),
        "accuracy_by_round": timing.values(measured, "accuracy"),
        "largest_difference_in_loss": apart,
        "about": about,
        "skipped": skipped,
        "data_source": source,
        "versions": timing.versions(["torch", "keras"]),
        "environment": results.environment(),
    }
    results.write_json(folder / results.RESULTS, summary)
    print(text)
    worst = max(apart.values())
    print(f"losses of the first steps differ by at most {worst:.1g} nats")
    print(f"{note}; data: {source}")
    print(f"written to {folder}: table.md, {results.RESULTS}, lenet.png")


if __name__ == "__main__":
    launch.start(main, define_flags)
