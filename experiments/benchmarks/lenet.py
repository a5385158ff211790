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

import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from bn_jax.training import config as config_lib
from bn_jax.training import fields
from experiments import launch
from experiments.benchmarks import timing

if TYPE_CHECKING:
    from bn_jax.data import ImageData

NUM_CHECKED_STEPS = 20
# At learning rate 1 rounding grows over 20 steps, to 1e-4 at most where it was seen.
LOSS_TOLERANCE = 1e-3
LEARNING_RATE, MOMENTUM, EPSILON = 1.0, 0.9, 1e-5
WIDTHS = (6, 16, 120, 84, 10)
# The layers, in the order in which PyTorch and Keras list their parameters.
LAYERS = ("conv1", "norm1", "conv2", "norm2", "dense1", "norm3", "dense2", "norm4")
# Several processes share a GPU: none takes its memory in advance.
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Start(NamedTuple):
    """Where all arms start."""

    images: np.ndarray  # shape [N, 28, 28, 1], uint8
    labels: np.ndarray  # shape [N], int32
    params: dict[str, np.ndarray]  # ours, by path: "conv1/kernel"
    order: np.ndarray  # the examples of the first epoch's steps, [steps, batch], int32


class Means(NamedTuple):
    """Over the steps of an epoch."""

    loss: float
    accuracy: float


class Peer(NamedTuple):
    """A model of another library, ready to train."""

    replay: Callable[[np.ndarray], list[float]]  # of an order of examples: its losses
    epoch: Callable[[], Means]  # one more, in a new order
    about: Mapping[str, Any] = {}


class Arm(NamedTuple):
    """A way to train: ours by options, or a peer."""

    title: str
    config: Mapping[str, Any] = {}
    devices: int = 1
    parallel: str = "pmap"
    layout: str | None = None
    peer: Callable[[Start], Peer] | None = None
    needs: Sequence[str] = ()  # modules
    env: Mapping[str, str] = {}


def torch_peer(*, from_scratch: bool) -> Callable[[Start], Peer]:
    """Return the set-up of PyTorch, in the fastest of its variants."""

    def set_up(start: Start) -> Peer:
        import torch

        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in every arm
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Not by permute: with one channel that is contiguous and yet channels last, and
        # a convolution passes the latter on, to a far slower batch norm.
        n, h, w, channels = start.images.shape
        images = torch.tensor(start.images, device=device).reshape(n, channels, h, w)
        labels = torch.tensor(start.labels, device=device, dtype=torch.int64)

        def variant(memory_format: Any, is_compiled: bool) -> Any:
            net = torch_lenet(from_scratch).to(device, memory_format=memory_format)
            optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE)

            def scores(x: Any, y: Any) -> tuple[Any, Any]:
                logits = net(x)
                loss = torch.nn.functional.cross_entropy(logits, y)
                return loss, (logits.argmax(1) == y).float().mean()

            scored = torch.compile(scores) if is_compiled else scores

            def train(order: Any) -> Any:
                metrics = []
                for rows in order:
                    x = (images[rows].float() / 255).contiguous(
                        memory_format=memory_format
                    )
                    loss, accuracy = scored(x, labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    metrics.append(torch.stack([loss.detach(), accuracy]))
                return torch.stack(metrics).cpu()

            return net, train

        given = torch.tensor(start.order, device=device, dtype=torch.int64)
        formats = {
            "NCHW": torch.contiguous_format,
            "channels last": torch.channels_last,
        }
        tried = given[:10]
        trial: dict[str, float] = {}
        refused: dict[str, str] = {}
        made = {}
        for (name, memory_format), is_compiled in itertools.product(
            formats.items(), (False, True) if flags.FLAGS.torch_compile else (False,)
        ):
            title = f"{name}, {'compiled' if is_compiled else 'eager'}"
            try:
                made[title] = variant(memory_format, is_compiled)
                seconds = seconds_of(functools.partial(made[title][1], tried))
                trial[title] = 1e3 * seconds / len(tried)
            except Exception as error:  # such as no compiler on this machine
                refused[title] = f"{type(error).__name__}: {error}"[:200]
        best = min(trial, key=trial.__getitem__)
        net, train = made[best]
        load_into_torch(net, start.params)  # what the trial trained is forgotten

        def epoch() -> Means:
            order = torch.randperm(len(labels), device=device)
            means = train(order[: given.numel()].view_as(given)).mean(0)
            return Means(*means.tolist())

        return Peer(
            replay=lambda rows: train(given[: len(rows)])[:, 0].tolist(),
            epoch=epoch,
            about={
                "variant": best,
                "trial_ms_per_step": trial,
                "refused": refused,
                "threads": torch.get_num_threads(),
                "device": device,
            },
        )

    return set_up


def seconds_of(call: Callable[[], Any], repeats: int = 3) -> float:
    """Return the least time of a call, after one that warms it up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def torch_lenet(from_scratch: bool) -> Any:
    """Return the chapter's network, concise or with its batch norm from scratch."""
    from torch import nn

    norm_2d: Any = nn.BatchNorm2d
    norm_1d: Any = nn.BatchNorm1d
    if from_scratch:
        norm_2d = norm_1d = scratch_norm()
    conv1, conv2, dense1, dense2, classes = WIDTHS
    return nn.Sequential(
        nn.Conv2d(1, conv1, 5),
        norm_2d(conv1),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(conv1, conv2, 5),
        norm_2d(conv2),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(conv2 * 4 * 4, dense1),
        norm_1d(dense1),
        nn.Sigmoid(),
        nn.Linear(dense1, dense2),
        norm_1d(dense2),
        nn.Sigmoid(),
        nn.Linear(dense2, classes),
    )


def scratch_norm() -> Any:
    """Return batch norm as a class of elementary PyTorch operations."""
    import torch
    from torch import nn

    class BatchNorm(nn.Module):
        def __init__(self, num_features: int) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(num_features))
            self.beta = nn.Parameter(torch.zeros(num_features))
            self.register_buffer("moving_mean", torch.zeros(num_features))
            self.register_buffer("moving_var", torch.ones(num_features))

        def forward(self, x: Any) -> Any:
            shape = (1, -1, *[1] * (x.ndim - 2))
            axes = [a for a in range(x.ndim) if a != 1]
            if self.training:
                mean = x.mean(axes)
                var = ((x - mean.view(shape)) ** 2).mean(axes)
                with torch.no_grad():
                    self.moving_mean.mul_(MOMENTUM).add_(mean, alpha=1 - MOMENTUM)
                    self.moving_var.mul_(MOMENTUM).add_(var, alpha=1 - MOMENTUM)
            else:
                mean, var = self.moving_mean, self.moving_var
            x_hat = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + EPSILON)
            return self.gamma.view(shape) * x_hat + self.beta.view(shape)

    return BatchNorm


def torch_params(params: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return our parameters as PyTorch has them, in its order.

    Kernels [H, W, in, out] become [out, in, H, W], those of dense layers [in, out]
    become [out, in]. The first dense layer's inputs, pixels before channels in ours,
    are channels before pixels there.
    """
    listed = []
    for layer in (*LAYERS, "dense3"):
        first, second = (
            ("scale", "bias") if layer.startswith("norm") else ("kernel", "bias")
        )
        value = params[f"{layer}/{first}"]
        if layer.startswith("conv"):
            value = value.transpose(3, 2, 0, 1)
        elif layer == "dense1":
            channels = params["conv2/kernel"].shape[-1]
            side = round((len(value) // channels) ** 0.5)
            pixels = value.reshape(side, side, channels, -1)
            value = pixels.transpose(3, 2, 0, 1).reshape(value.shape[::-1])
        elif layer.startswith("dense"):
            value = value.T
        listed += [value, params[f"{layer}/{second}"]]
    return listed


def load_into_torch(net: Any, params: Mapping[str, np.ndarray]) -> None:
    """Give a PyTorch network our parameters; its moving averages stay."""
    import torch

    with torch.no_grad():
        for own, value in zip(net.parameters(), torch_params(params), strict=True):
            own.copy_(torch.tensor(value))


def flax_peer(start: Start) -> Peer:
    """Set up Flax as its examples do: NHWC, a loop over a jitted, donating step."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn
    from flax import traverse_util

    class LeNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            norm = functools.partial(
                nn.BatchNorm,
                use_running_average=not train,
                momentum=MOMENTUM,
                epsilon=EPSILON,
            )
            x = nn.sigmoid(norm(name="norm1")(self.conv(1)(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.sigmoid(norm(name="norm2")(self.conv(2)(x)))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
            x = nn.sigmoid(norm(name="norm3")(nn.Dense(WIDTHS[2], name="dense1")(x)))
            x = nn.sigmoid(norm(name="norm4")(nn.Dense(WIDTHS[3], name="dense2")(x)))
            return nn.Dense(WIDTHS[4], name="dense3")(x)

        def conv(self, i: int) -> Any:
            return nn.Conv(WIDTHS[i - 1], (5, 5), padding="VALID", name=f"conv{i}")

    model, optimizer = LeNet(), optax.sgd(LEARNING_RATE)
    images, labels = jnp.asarray(start.images), jnp.asarray(start.labels)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, images: Any, labels: Any, rows: Any) -> Any:
        params, batch_stats, opt_state = state
        x, y = images[rows].astype(jnp.float32) / 255, labels[rows]

        def loss_of(params: Any) -> Any:
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            accuracy = jnp.mean(logits.argmax(-1) == y)
            return losses.mean(), (accuracy, updates["batch_stats"])

        (loss, (accuracy, batch_stats)), gradients = jax.value_and_grad(
            loss_of, has_aux=True
        )(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, batch_stats, opt_state), (loss, accuracy)

    flat = {name: jnp.array(value) for name, value in start.params.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
    state = (params, variables["batch_stats"], optimizer.init(params))

    def train(order: np.ndarray) -> np.ndarray:
        nonlocal state
        metrics = []
        for rows in order:
            state, of_step = step(state, images, labels, rows)
            metrics.append(of_step)
        return np.asarray(jax.device_get(metrics))

    rng = np.random.default_rng(0)

    def epoch() -> Means:
        order = rng.permutation(len(start.labels)).astype(np.int32)
        order = order[: start.order.size].reshape(start.order.shape)
        return Means(*train(order).mean(0).tolist())

    return Peer(replay=lambda order: train(order)[:, 0].tolist(), epoch=epoch)


def keras_peer(start: Start) -> Peer:
    """Set up Keras as its users do: Sequential, compile, fit."""
    import keras
    from keras import layers

    conv1, conv2, dense1, dense2, classes = WIDTHS

    def norm_sigmoid(i: int) -> list[Any]:
        norm = layers.BatchNormalization(
            momentum=MOMENTUM, epsilon=EPSILON, name=f"norm{i}"
        )
        return [norm, layers.Activation("sigmoid")]

    model = keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(conv1, 5, name="conv1"),
            *norm_sigmoid(1),
            layers.AveragePooling2D(2),
            layers.Conv2D(conv2, 5, name="conv2"),
            *norm_sigmoid(2),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(dense1, name="dense1"),
            *norm_sigmoid(3),
            layers.Dense(dense2, name="dense2"),
            *norm_sigmoid(4),
            layers.Dense(classes, name="dense3"),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    for name in (*LAYERS, "dense3"):
        layer = model.get_layer(name)
        kinds = ("scale", "bias") if name.startswith("norm") else ("kernel", "bias")
        moving = layer.get_weights()[2:]
        layer.set_weights(
            [*(start.params[f"{name}/{kind}"] for kind in kinds), *moving]
        )

    def replay(order: np.ndarray) -> list[float]:
        losses = []
        for rows in order:
            model.reset_metrics()  # else it returns the mean of all steps so far
            x, y = start.images[rows], start.labels[rows]
            losses.append(float(model.train_on_batch(x, y)[0]))
        return losses

    steps, batch_size = start.order.shape
    x, y = (array[: steps * batch_size] for array in (start.images, start.labels))

    def epoch() -> Means:
        fitted = model.fit(
            x, y, batch_size=batch_size, epochs=1, verbose=0, shuffle=True
        )
        history = fitted.history
        return Means(float(history["loss"][-1]), float(history["accuracy"][-1]))

    return Peer(replay=replay, epoch=epoch)


ARMS = {
    "ours": Arm("ours"),
    "ours_no_bias": Arm("ours, no bias before norm", {"bias_before_norm": False}),
    "ours_flax_norm": Arm("ours with Flax's BatchNorm", {"norm": "flax"}),
    "ours_nhwc": Arm("ours, NHWC", layout="NHWC"),
    "ours_2_devices": Arm("ours, 2 devices, exact sync, pmap", devices=2),
    "ours_2_devices_jit": Arm(
        "ours, 2 devices, exact sync, jit", devices=2, parallel="jit"
    ),
    "torch": Arm("PyTorch", peer=torch_peer(from_scratch=False), needs=["torch"]),
    "torch_scratch": Arm(
        "PyTorch, from-scratch norm",
        peer=torch_peer(from_scratch=True),
        needs=["torch"],
    ),
    "flax": Arm("Flax, NHWC, jitted step", peer=flax_peer, needs=["flax"]),
    "keras": Arm(
        "Keras on JAX, fit",
        peer=keras_peer,
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
    with launch.experiment("lenet_speed", {**given, "arms": list(arms)}) as folder:
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
        learning_rate=LEARNING_RATE,
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


def read_start(path: str, data: ImageData) -> Start:
    """Return where all arms start."""
    with np.load(path) as file:
        params = {
            name.removeprefix("params/"): file[name]
            for name in file.files
            if name.startswith("params/")
        }
        return Start(*data.train, params, file["order"])


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
    from bn_jax import plots, results

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
