"""Many configs trained side by side in one compiled program.

The members of a sweep differ in `SWEPT` fields alone: numbers that the program takes as
arguments. They share the data set on the device, and each has its own parameters, its
own statistics and its own order of examples, so that it trains as it would alone.

On GPU and TPU the members are mapped by `vmap`. On CPU, where that makes one large and
slow convolution of many small ones, they take turns (`lax.map`), and the cores are used
by as many host devices. Over several devices members are shared out along the axis
`parallel.MODELS`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bn_jax import data as data_lib
from bn_jax import models, population
from bn_jax.training import evaluation, feed, loop, parallel
from bn_jax.training import step as step_lib
from bn_jax.training.config import TrainConfig
from bn_jax.training.fields import ConfigError
from bn_jax.training.state import (
    TrainState,
    dropout_key,
    init_state,
    make_init,
    make_model,
    make_optimizer,
)

# Fields that a program can take as arguments.
SWEPT = (
    "learning_rate",
    "optimizer_momentum",
    "momentum",
    "epsilon",
    "norm_layers",
    "train_gamma",
    "train_beta",
    "seed",
)

Values = dict[str, Any]  # fields that differ, and the seed, as arrays


def parse(spec: str, base: TrainConfig) -> list[TrainConfig]:
    """Return the configs of a sweep written as "learning_rate=0.1,1.0;seed=0..4".

    Args:
      spec: fields with their values, all of which are combined; the last field varies
        fastest. `a..b` stands for the integers from a to b.
      base: gives the other fields.

    Raises:
      ConfigError: if a field cannot be swept, or a value is none of it.
    """
    fields = {field.name: type(field.default) for field in dataclasses.fields(base)}
    choices: dict[str, list[Any]] = {}
    for part in spec.split(";"):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in SWEPT or not text or name in choices:
            raise ConfigError(
                f"sweep={spec!r}: {part!r}; expected FIELD=VALUE,VALUE,... with each "
                f"field once, of {', '.join(SWEPT)}"
            )
        choices[name] = [v for t in text.split(",") for v in _values(t, fields[name])]
    members = itertools.product(*choices.values())
    return [
        dataclasses.replace(base, **dict(zip(choices, member, strict=True)))
        for member in members
    ]


def _values(text: str, kind: type) -> list[Any]:
    """Return the values that one entry of a list stands for."""
    text = text.strip()
    integers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if kind is int and integers is not None:
        return list(range(int(integers[1]), int(integers[2]) + 1))
    if kind is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in known:
            raise ConfigError(f"{text!r} in a sweep; expected true or false")
        return [known[text.lower()]]
    try:
        return [kind(text)]
    except ValueError:
        raise ConfigError(f"{text!r} in a sweep; expected {kind.__name__}") from None


class Progress(NamedTuple):
    """All that a sweep has become; the first axis is that of the members."""

    state: TrainState  # NumPy arrays with a leading axis of members
    step_losses: np.ndarray  # shape [members, steps], float32; NaN after divergence
    step_accuracies: np.ndarray  # likewise
    test_losses: np.ndarray  # shape [members, epochs]; NaN before, or once diverged
    test_accuracies: np.ndarray  # likewise
    seconds: float  # of training, all members together


class Sweep:
    """The members of a sweep, trained together.

    A member whose loss or parameters are not finite stops there, and keeps its last
    finite state; the others go on.

    Args:
      configs: of the members; they differ in `SWEPT` fields alone.
      data: the images.
      devices: that share the members; by default JAX's first.
      checkpoint_steps: `train` pauses at each multiple of it.

    Raises:
      ConfigError: if configs differ in other fields, or do not fit the data.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        data: data_lib.ImageData,
        *,
        devices: Sequence[jax.Device] | None = None,
        checkpoint_steps: int | None = None,
    ) -> None:
        _check(configs)
        data = data.with_train_examples(configs[0].train_examples)
        self.configs, self.data = list(configs), data
        self.devices = list(devices or jax.local_devices()[:1])
        self._base, self._checkpoint_steps = configs[0], checkpoint_steps
        loop.check_fits(self._base, data)
        self.num_classes = len(data.class_names)
        # Filled up, so that each device has as many; those added are left out later.
        padding = -len(configs) % len(self.devices)
        self._members = [*configs, *[configs[-1]] * padding]
        self._values = stack_values(self._members)
        self._orders = {
            seed: self._order_of(seed) for seed in {c.seed for c in configs}
        }
        self.steps_per_epoch = len(data.train.labels) // self._base.batch_size
        self._map = _Mapped(self.devices)
        self._run = self._map.compiled(
            functools.partial(_run_member, self._base, self.num_classes,
                              self.steps_per_epoch),
            shared=(False, False, True, False, True, True),
            donate=(1,),
        )  # fmt: skip
        self._evaluate, self._evaluate_by_batch = (
            self._map.compiled(
                functools.partial(_evaluate_member, self._base, self.num_classes, way),
                shared=(False, False, True, True),
            )
            for way in (step_lib.predict, step_lib.predict_by_batch)
        )
        self.compile_seconds = 0.0
        self._is_compiled = False
        self._test = self._batched(data.test)
        state = _init_members(self._members, data.train.images.shape[1:], self)
        no_steps = np.zeros((len(configs), 0), np.float32)
        untested = np.full((len(configs), self._base.epochs), np.nan, np.float32)
        self.restore(Progress(state, no_steps, no_steps, untested, untested, 0.0))

    def _order_of(self, seed: int) -> feed.Order:
        _, key = jax.random.split(jax.random.key(seed))
        return feed.Order(
            key,
            num_examples=len(self.data.train.labels),
            batch_size=self._base.batch_size,
        )

    @property
    def step(self) -> int:
        """Number of steps that members have been given to take."""
        return self._losses.shape[1]

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole sweep, a member."""
        return self._base.epochs * self.steps_per_epoch

    def restore(self, progress: Progress) -> None:
        """Go on from `progress`."""
        n = len(self.configs)
        filled = [*range(n), *[n - 1] * (len(self._members) - n)]
        state = jax.tree.map(lambda leaf: leaf[filled], progress.state)
        self._state = self._map.put(state)
        _, self._losses, self._accuracies, *tested, self._seconds = progress
        self._test_losses, self._test_accuracies = tested

    def progress(self) -> Progress:
        """Return what the sweep has become, on the host."""
        n = len(self.configs)
        state = self._map.get(self._state)
        return Progress(
            jax.tree.map(lambda leaf: leaf[:n], state),
            self._losses,
            self._accuracies,
            self._test_losses,
            self._test_accuracies,
            self._seconds,
        )

    def train(self) -> Iterator[int | None]:
        """Train to the end, pausing after each call of the compiled loop.

        Yields:
          The number of the epoch that has ended, or None amid an epoch.
        """
        planned = feed.calls(
            self.step,
            self.num_steps,
            steps_per_epoch=self.steps_per_epoch,
            checkpoint_steps=self._checkpoint_steps,
        )
        data = step_lib.Batch(*self._map.put_shared(self.data.train))
        values = self._map.put(self._values)
        order, of_epoch = None, -1
        for call in planned:
            epoch, start = divmod(call.first, self.steps_per_epoch)
            if epoch != of_epoch:
                by_seed = {s: o.of_epoch(epoch) for s, o in self._orders.items()}
                order = self._map.put(
                    np.stack([by_seed[c.seed] for c in self._members])
                )
                of_epoch = epoch
            first, stop = np.int32(start), np.int32(start + call.stop - call.first)
            if not self._is_compiled:
                started = time.perf_counter()
                # Without a step to take, only compilation takes time.
                self._state, _ = jax.block_until_ready(
                    self._run(values, self._state, data, order, first, first)
                )
                self.compile_seconds = time.perf_counter() - started
                self._is_compiled = True
            started = time.perf_counter()
            self._state, metrics = self._run(
                values, self._state, data, order, first, stop
            )
            self._take(self._map.get(metrics), call.stop - call.first)
            self._seconds += time.perf_counter() - started
            if call.stop % self.steps_per_epoch:
                yield None
                continue
            sums = self._map.get(
                self._evaluate(values, self._state.variables, *self._test)
            )
            self._set_tested(epoch, sums)
            yield epoch + 1

    def _take(self, metrics: step_lib.Metrics, size: int) -> None:
        """Append the metrics of `size` steps; NaN where a member was stopped."""
        n = len(self.configs)
        taken = self._map.get(self._state.step)[:n, None]
        steps = np.arange(self.step, self.step + size)
        for name, of_calls in (("loss", "_losses"), ("accuracy", "_accuracies")):
            new = np.where(steps < taken, getattr(metrics, name)[:n, :size], np.nan)
            old = getattr(self, of_calls)
            setattr(self, of_calls, np.append(old, new.astype(np.float32), axis=1))

    def _set_tested(self, epoch: int, sums: step_lib.Sums) -> None:
        """Keep what an evaluation at an epoch's end has found."""
        n, count = len(self.configs), len(self.data.test.labels)
        alive = np.isfinite(self._losses[:, -1])
        of_epoch = np.arange(self._base.epochs) == epoch
        for values, name in (
            (sums.loss, "_test_losses"),
            (sums.correct, "_test_accuracies"),
        ):
            new = np.where(alive, values[:n] / count, np.nan).astype(np.float32)
            setattr(self, name, np.where(of_epoch, new[:, None], getattr(self, name)))

    def rows(self, *, exact: bool = True, train: bool = False) -> list[dict[str, Any]]:
        """Return a row for each member, of values that JSON can hold.

        Args:
          exact: whether to measure loss and accuracy by exact statistics of the
            training set, too, where the norm is batch norm; it takes about half an
            epoch a member.
          train: whether to evaluate on the training set, too.
        """
        progress = self.progress()
        by_epoch = (len(self.configs), -1, self.steps_per_epoch)
        losses = progress.step_losses.reshape(by_epoch).mean(2)
        accuracies = progress.step_accuracies.reshape(by_epoch).mean(2)
        scores = self._scores(exact=exact, train=train)
        return [
            {
                "config": config.to_dict(),
                "diverged_at_step": _diverged_at(progress.step_losses[i]),
                "loss": _json(losses[i]),
                "train_accuracy": _json(accuracies[i]),
                "test_loss": _json(progress.test_losses[i]),
                "test_accuracy": _json(progress.test_accuracies[i]),
                **{name: _json(values)[i] for name, values in scores.items()},
                "first_step_losses": _json(progress.step_losses[i, :20]),
            }
            for i, config in enumerate(self.configs)
        ]

    def _scores(self, *, exact: bool, train: bool) -> dict[str, np.ndarray]:
        """Return the members' scores at the end, but that on the test set by averages.

        Returns:
          `SPLIT_loss_STATISTICS` and `SPLIT_accuracy_STATISTICS`, each of shape
          [members]; statistics are the moving averages, exact ones, or those of each
          batch (of at most 500 images) itself. With exact ones, also the ratio of the
          moving variance to the exact one, `LAYER_variance_ratio`, as the median over
          its features: dropout before a norm moves it from 1 (Li et al., 2018,
          arXiv:1801.05134).
        """
        variables = self._map.get(self._state).variables
        states = {"average": variables}
        scores: dict[str, np.ndarray] = {}
        if exact and models.is_batch_norm(self._base.norm):
            found = self._exact_statistics()
            states["exact"] = {**variables, "batch_stats": found}
            for layer, of_layer in variables["batch_stats"].items():
                ratio = of_layer["var"] / found[layer]["var"]
                scores[f"{layer}_variance_ratio"] = np.median(ratio, -1)[
                    : len(self.configs)
                ]
        of_train = self._batched(self.data.train) if train else None
        wanted = [("test", self._test, name) for name in states if name != "average"]
        wanted += [("train", of_train, name) for name in states if train]
        for split, batches, name in wanted:
            sums = self._sums(self._evaluate, states[name], batches)
            scores |= self._means(f"{split}_{{}}_{name}", sums, batches)
        if self._base.norm != "none":
            sums = self._sums(self._evaluate_by_batch, variables, self._test)
            scores |= self._means("test_{}_batch", sums, self._test)
        return scores

    def _sums(self, evaluate: Any, variables: Any, batches: Any) -> step_lib.Sums:
        placed = self._map.put((self._values, variables))
        sums: step_lib.Sums = self._map.get(evaluate(*placed, *batches))
        return sums

    def _means(
        self, name: str, sums: step_lib.Sums, batches: Any
    ) -> dict[str, np.ndarray]:
        """Return mean loss and accuracy of each member, NaN of one that diverged."""
        n, alive = len(self.configs), np.isfinite(self._losses[:, -1])
        _, counts = batches
        count = np.asarray(counts).sum()
        values = {"loss": sums.loss, "accuracy": sums.correct}
        return {
            name.format(kind): np.where(alive, value[:n] / count, np.nan)
            for kind, value in values.items()
        }

    def _batched(self, split: data_lib.Split) -> Any:
        """Return a split in equal batches, on the devices, and which examples count."""
        n = len(split.labels)
        num_batches = -(-n // evaluation.BATCH_SIZE)
        return self._map.put_shared(
            evaluation.batched(split, num_batches, -(-n // num_batches))
        )

    def _exact_statistics(self) -> Any:
        """Return each member's exact statistics of the training set, stacked."""
        inputs = jnp.asarray(self.data.train.images)
        predict = _predict_of(self._base, self.num_classes)
        state, values = self._map.get(self._state), self._values
        stats = []
        for i in range(len(self._members)):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], state.variables)
            swept = jax.tree.map(lambda leaf, i=i: leaf[i], values)
            stats.append(
                population.exact_statistics(
                    predict,
                    {**own, "swept": swept},
                    inputs,
                    batch_size=evaluation.BATCH_SIZE,
                )
            )
        return jax.tree.map(lambda *leaves: np.stack(leaves), *stats)


def _check(configs: Sequence[TrainConfig]) -> None:
    """Refuse configs that one program cannot train."""
    if not configs:
        raise ConfigError("a sweep of no configs; give at least one")
    for field in dataclasses.fields(TrainConfig):
        values = {getattr(config, field.name) for config in configs}
        if len(values) > 1 and field.name not in SWEPT:
            raise ConfigError(
                f"configs of a sweep differ in {field.name}: {sorted(map(str, values))}"
                f"; they may in {', '.join(SWEPT)}"
            )
    if not configs[0].bias_before_norm and any(
        config.norm_layers != "1111" for config in configs
    ):
        raise ConfigError(
            "bias_before_norm=False in a sweep with layers without norm, which need a "
            "bias; leave the biases in"
        )


def stack_values(configs: Sequence[TrainConfig]) -> Values:
    """Return the fields that differ as arrays with a leading axis of configs.

    What all configs share stays a constant of the program, which is the faster for it.
    """
    swept: Values = {}
    for name in SWEPT:
        values = [getattr(config, name) for config in configs]
        if name != "seed" and len(set(values)) == 1:
            continue
        if name == "norm_layers":
            swept[name] = np.array([[d == "1" for d in v] for v in values])
        else:
            kind = np.uint32 if name == "seed" else jnp.result_type(type(values[0]))
            swept[name] = np.array(values, kind)
    return swept


def _run_member(
    base: TrainConfig,
    num_classes: int,
    steps_per_epoch: int,
    values: Values,
    state: TrainState,
    data: step_lib.Batch,
    order: Any,
    start: Any,
    stop: Any,
) -> tuple[TrainState, step_lib.Metrics]:
    """Take one member's steps; see `step.run_steps`."""
    config = base.with_traced(values)
    train_step = step_lib.make_train_step(
        make_model(config, num_classes=num_classes),
        make_optimizer(config, steps_per_epoch=steps_per_epoch),
        dropout_key=dropout_key(config),
    )
    return step_lib.run_steps(
        train_step,
        state,
        step_lib.Stored(data, order),
        start,
        stop,
        max_steps=parallel.STEPS_PER_CALL,
    )


def _evaluate_member(
    base: TrainConfig,
    num_classes: int,
    predict: Callable[[Any, Any, Any], Any],
    values: Values,
    variables: Any,
    batches: step_lib.Batch,
    counts: Any,
) -> step_lib.Sums:
    """Evaluate one member, without dropout."""
    config = base.with_traced({**values, "dropout_rate": 0.0})
    model = make_model(config, num_classes=num_classes)
    return step_lib.evaluate(model, variables, batches, counts, predict=predict)


@functools.lru_cache(maxsize=8)
def _predict_of(base: TrainConfig, num_classes: int) -> Callable[[Any, Any], Any]:
    """Return `predict(variables, images)` of a member, whose values are variables.

    It is the same function for the same arguments, so that it is compiled once.
    """

    def predict(variables: Mapping[str, Any], images: Any) -> Any:
        own = {name: variables[name] for name in ("params", "batch_stats")}
        config = base.with_traced(variables["swept"])
        model = make_model(config, num_classes=num_classes)
        return step_lib.predict(model, own, images)

    return predict


def _init_members(
    configs: Sequence[TrainConfig], images_shape: tuple[int, ...], sweep: Sweep
) -> TrainState:
    """Return the members' initial states, stacked; those of `loop.Trainer`."""
    of_seed: dict[int, TrainState] = {}
    # Values differ, shapes do not.
    config = configs[0].with_traced(
        jax.tree.map(lambda leaf: leaf[0], stack_values(configs))
    )
    model = make_model(config, num_classes=sweep.num_classes)
    init = make_init(model, images_shape)
    for seed in {config.seed for config in configs}:
        optimizer = make_optimizer(
            config.with_traced({"seed": seed}), steps_per_epoch=sweep.steps_per_epoch
        )
        key, _ = jax.random.split(jax.random.key(seed))
        state = init_state(init(key), optimizer)
        of_seed[seed] = jax.tree.map(np.asarray, state)
    return jax.tree.map(
        lambda *leaves: np.stack(leaves), *(of_seed[c.seed] for c in configs)
    )


def takes_turns(devices: Sequence[jax.Device]) -> bool:
    """Return whether members that share a device are faster one after another."""
    return devices[0].platform == "cpu"


class _Mapped:
    """Functions of one member, mapped over the members and over devices."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._devices = devices
        self._members = parallel.Members(devices)

    def compiled(
        self,
        function: Callable[..., Any],
        *,
        shared: Sequence[bool],
        donate: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """Return a function of stacked members, compiled for the devices.

        Args:
          function: of one member.
          shared: for each argument, whether all members share it.
          donate: arguments that are used up.
        """
        in_turns = takes_turns(self._devices)

        def of_members(*arguments: Any) -> Any:
            if not in_turns:
                axes = [None if is_shared else 0 for is_shared in shared]
                return jax.vmap(function, axes)(*arguments)
            own = [a for a, s in zip(arguments, shared, strict=True) if not s]

            def of_member(own: Sequence[Any]) -> Any:
                rest = iter(own)
                return function(
                    *(
                        a if s else next(rest)
                        for a, s in zip(arguments, shared, strict=True)
                    )
                )

            return lax.map(of_member, own)

        return self._members.compiled(of_members, shared=shared, donate=donate)

    def put(self, tree: Any) -> Any:
        """Return stacked members on the devices."""
        return jax.tree.map(self._members.put, tree)

    def put_shared(self, tree: Any) -> Any:
        """Return what members share on each device."""
        return jax.tree.map(self._members.put_shared, tree)

    def get(self, tree: Any) -> Any:
        """Return stacked members on the host."""
        return jax.tree.map(self._members.get, tree)


def _diverged_at(losses: np.ndarray) -> int | None:
    """Return the step, from 1, whose loss or update was not finite, or None."""
    finite = np.isfinite(losses)
    return None if finite.all() else int(finite.argmin()) + 1


def _json(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON holds them: None for those that are not finite."""
    return [float(v) if math.isfinite(v) else None for v in values]
