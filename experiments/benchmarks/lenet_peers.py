"""The chapter's LeNet with batch norm in other libraries, as their users train it.

Each peer starts from our parameters, and trains by SGD with its library's own parts.
`experiments.benchmarks.lenet` times them. PyTorch and Keras need not be installed, so
the functions that use them import them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, traverse_util

from experiments.benchmarks import benchmark, timing, torch_training

LEARNING_RATE, MOMENTUM, EPSILON = 1.0, 0.9, 1e-5
WIDTHS = (6, 16, 120, 84, 10)
# The layers, in the order in which PyTorch and Keras list their parameters.
LAYERS = ("conv1", "norm1", "conv2", "norm2", "dense1", "norm3", "dense2", "norm4")


class Start(NamedTuple):
    """Where all arms start."""

    images: np.ndarray  # shape [N, 28, 28, 1], uint8
    labels: np.ndarray  # shape [N], int32
    params: dict[str, np.ndarray]  # ours, by path: "conv1/kernel"
    order: np.ndarray  # examples of each step of the first epoch, [steps, batch], int32


class Means(NamedTuple):
    """Means over the steps of an epoch."""

    loss: float
    accuracy: float


class Peer(NamedTuple):
    """A model of another library, ready to train."""

    replay: Callable[[np.ndarray], list[float]]  # trains in an order; returns losses
    epoch: Callable[[], Means]  # trains an epoch in a new order
    about: Mapping[str, Any] = {}


def ready(peer: Peer, order: np.ndarray, num_checked: int) -> benchmark.Ready:
    """Return a peer as an arm, whose first losses are compared with the others'.

    Args:
      peer: has not trained yet.
      order: examples of each step of the first epoch, `[steps, batch]`.
      num_checked: number of steps whose losses are compared.
    """
    losses = peer.replay(order[:num_checked])

    def epoch() -> timing.Measurement:
        started = time.perf_counter()
        means = peer.epoch()
        seconds = time.perf_counter() - started
        return {
            "examples_per_second": order.size / seconds,
            "epoch_seconds": seconds,
            **means._asdict(),
        }

    return benchmark.Ready(epoch, {"losses": losses, **peer.about})


def compare_speeds(
    measured: benchmark.Measured,
) -> tuple[str, benchmark.Comparison]:
    """Compare examples/s with PyTorch's; titles say which variant of an arm it was.

    Returns:
      The arm by which the others are divided, PyTorch's or, without it, the first;
      and the comparison.
    """
    reference = "torch" if "torch" in measured.titles else next(iter(measured.titles))
    variants = {arm: about.get("variant") for arm, about in measured.about.items()}
    titles = {
        arm: title + (f" ({variants[arm]})" if variants[arm] else "")
        for arm, title in measured.titles.items()
    }
    return reference, benchmark.compare(
        measured._replace(titles=titles),
        "examples_per_second",
        reference,
        ratio=f"examples/s, to {measured.titles[reference]}",
        value="examples/s",
    )


def torch_peer(
    start: Start, *, from_scratch: bool, may_compile: bool, tf32: bool = False
) -> Peer:
    """Set up PyTorch, in the fastest of its ways to train.

    Args:
      start: where to start.
      from_scratch: whether batch norm is the chapter's, made of elementary operations.
      may_compile: as `torch_training.fastest` takes it.
      tf32: likewise.
    """
    task = torch_training.Task(
        functools.partial(torch_lenet, from_scratch),
        start.images,
        start.labels,
        LEARNING_RATE,
        start.order,
    )
    (net, train), about = torch_training.fastest(
        task, may_compile=may_compile, tf32=tf32
    )
    torch_training.load(net, torch_params(start.params))  # the trial has trained it
    return torch_training_peer(task, train, about)


def torch_training_peer(
    task: torch_training.Task, train: Callable[[Any], Any], about: Mapping[str, Any]
) -> Peer:
    """Return a network that trains in PyTorch as a peer."""
    import torch

    def of_rows(rows: np.ndarray) -> list[float]:
        order = torch.tensor(rows, device=torch_training.device(), dtype=torch.int64)
        losses: list[float] = train(order)[:, 0].tolist()
        return losses

    def epoch() -> Means:
        return Means(*train(torch_training.new_order(task)).mean(0).tolist())

    return Peer(of_rows, epoch, about)


def torch_lenet(from_scratch: bool) -> Any:
    """Return the chapter's network, with PyTorch's batch norm or one from scratch."""
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
    """Return a class of batch norm, made of elementary PyTorch operations."""
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

    Kernels [H, W, in, out] become [out, in, H, W]; those of dense layers, [in, out],
    become [out, in]. The inputs of the first dense layer are ordered by pixel, then by
    channel in ours, and by channel, then by pixel there.
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


def flax_peer(start: Start) -> Peer:
    """Set up Flax as its examples do: NHWC, a loop over a jitted step that donates."""

    class LeNet(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> Any:
            norm = functools.partial(
                linen.BatchNorm,
                use_running_average=not train,
                momentum=MOMENTUM,
                epsilon=EPSILON,
            )
            x = linen.sigmoid(norm(name="norm1")(self.conv(1)(x)))
            x = linen.avg_pool(x, (2, 2), (2, 2))
            x = linen.sigmoid(norm(name="norm2")(self.conv(2)(x)))
            x = linen.avg_pool(x, (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
            x = linen.sigmoid(
                norm(name="norm3")(linen.Dense(WIDTHS[2], name="dense1")(x))
            )
            x = linen.sigmoid(
                norm(name="norm4")(linen.Dense(WIDTHS[3], name="dense2")(x))
            )
            return linen.Dense(WIDTHS[4], name="dense3")(x)

        def conv(self, i: int) -> Any:
            return linen.Conv(WIDTHS[i - 1], (5, 5), padding="VALID", name=f"conv{i}")

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
            model.reset_metrics()  # otherwise it returns the mean of all steps so far
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
