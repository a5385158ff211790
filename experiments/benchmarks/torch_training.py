"""Training loops of PyTorch, as its users write them, and the fastest of them.

PyTorch need not be installed, so the functions that use it import it.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

NUM_TRIED = 10  # steps, of each way to train

# A loop of calls; one of calls that `torch.compile` made; or these, with the optimizer,
# captured once as one CUDA graph and launched as a whole for each step.
Way = Literal["eager", "compiled", "one graph"]


class Task(NamedTuple):
    """What is trained."""

    make_net: Callable[[], Any]  # takes images `[N, C, H, W]`, gives logits
    images: np.ndarray  # shape [N, H, W, C], uint8
    labels: np.ndarray  # shape [N], int32
    learning_rate: float  # of plain SGD
    order: np.ndarray  # examples of each step of the first epoch, [steps, batch]


class Trained(NamedTuple):
    """A network in training."""

    net: Any
    train: Callable[
        [Any], Any
    ]  # trains in an order; returns [steps, 2]: losses, shares


class Fastest(NamedTuple):
    """The fastest way to train."""

    trained: Trained
    about: Mapping[str, Any]


def device() -> str:
    """Return the device that PyTorch trains on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fastest(
    task: Task, *, may_compile: bool, tf32: bool = False, bfloat16: bool = False
) -> Fastest:
    """Try PyTorch's ways to train on a few steps, and return the fastest.

    Args:
      task: what is trained. The trial has trained the network of the result.
      may_compile: whether to try `torch.compile`, too, and on a GPU one graph.
      tf32: whether products of float32 may round their factors to TF32, on a GPU.
      bfloat16: whether to compute in bfloat16, by autocast.
    """
    import torch

    # Each for matrix products and for convolutions.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # tries algorithms, as XLA does
    formats = {
        "NCHW": torch.contiguous_format,
        "channels last": torch.channels_last,
    }
    ways: tuple[Way, ...] = ("eager",)
    if may_compile:
        ways += ("compiled",) if device() == "cpu" else ("compiled", "one graph")
    refused: dict[str, str] = {}
    made: dict[str, Trained] = {}
    tried = torch.tensor(task.order[:NUM_TRIED], device=device(), dtype=torch.int64)
    for (name, memory_format), way in itertools.product(formats.items(), ways):
        title = f"{name}, {way}"
        try:
            trained = _make(task, memory_format, way, bfloat16)
            trained.train(tried)
            made[title] = trained
        except Exception as error:  # such as no compiler on this machine
            refused[title] = f"{type(error).__name__}: {error}"[:200]
    trial = least_seconds(
        {
            title: functools.partial(trained.train, tried)
            for title, trained in made.items()
        }
    )
    best = min(trial, key=trial.__getitem__)
    about = {
        "variant": best,
        "trial_ms_per_step": {
            title: 1e3 * seconds / len(tried) for title, seconds in trial.items()
        },
        "refused": refused,
        "threads": torch.get_num_threads(),
        "device": device(),
    }
    return Fastest(made[best], about)


def _make(task: Task, memory_format: Any, way: Way, bfloat16: bool) -> Trained:
    """Set up one way to train."""
    import torch

    n, h, w, channels = task.images.shape
    # Copied into a new array: with one channel a permuted one, contiguous or not,
    # counts as channels last, too. A convolution would pass that on to batch norm,
    # which is far slower then, and less exact.
    images = torch.empty((n, channels, h, w), dtype=torch.uint8, device=device())
    images.copy_(torch.tensor(task.images).permute(0, 3, 1, 2))
    labels = torch.tensor(task.labels, device=device(), dtype=torch.int64)
    net = task.make_net().to(device(), memory_format=memory_format)
    optimizer = torch.optim.SGD(net.parameters(), task.learning_rate)

    def scores(x: Any, y: Any) -> tuple[Any, Any]:
        with torch.autocast(device(), torch.bfloat16, enabled=bfloat16):
            logits = net(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        return loss, (logits.argmax(1) == y).float().mean()

    scored = scores if way == "eager" else torch.compile(scores)

    def step(rows: Any) -> Any:
        x = (images[rows].float() / 255).contiguous(memory_format=memory_format)
        loss, accuracy = scored(x, labels[rows])
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach(), accuracy])

    if way == "one graph":
        return Trained(net, _captured(step, optimizer, *task.order.shape))

    def train(order: Any) -> Any:
        metrics = []
        for rows in order:
            optimizer.zero_grad()
            metrics.append(step(rows))
        return torch.stack(metrics).cpu()

    return Trained(net, train)


def _captured(
    step: Callable[[Any], Any], optimizer: Any, num_steps: int, batch_size: int
) -> Callable[[Any], Any]:
    """Return a loop whose steps are one CUDA graph, which finds its batch by itself."""
    import torch

    order = torch.zeros((num_steps, batch_size), dtype=torch.int64, device="cuda")
    metrics = torch.zeros((num_steps, 2), device="cuda")
    i = torch.zeros(1, dtype=torch.int64, device="cuda")

    def whole() -> None:
        metrics.index_copy_(0, i, step(order.index_select(0, i)[0])[None])
        i.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            optimizer.zero_grad()
            i.zero_()
            whole()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()  # so that the graph writes gradients and adds none
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()

    # The graph does not own what it reads, such as the images: `whole` keeps them.
    def train(given: Any, kept: Any = whole) -> Any:
        order[: len(given)] = given
        i.zero_()
        for _ in range(len(given)):
            graph.replay()
        return metrics[: len(given)].cpu()

    return train


def load(net: Any, params: list[np.ndarray]) -> None:
    """Copy parameters into a network, in its order; its moving averages stay."""
    import torch

    with torch.no_grad():
        for own, value in zip(net.parameters(), params, strict=True):
            own.copy_(torch.tensor(value))


def new_order(task: Task) -> Any:
    """Return a new order of an epoch, on the device."""
    import torch

    order = torch.randperm(len(task.labels), device=device())
    return order[: task.order.size].view(task.order.shape)


def least_seconds(
    calls: Mapping[str, Callable[[], Any]], repeats: int = 5
) -> dict[str, float]:
    """Return the least time of each call.

    The calls take turns, so that a machine that slows down slows all of them.
    """
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds
