"""Many configs trained side by side in one compiled program.

The members of a sweep (`members`) share the data set on the device, and each has its
own parameters, its own statistics and its own order of examples, so that it trains as
it would alone. How they share the devices is in `mapped`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bn_jax import data as data_lib
from bn_jax import models
from bn_jax.measures import population
from bn_jax.training import (
    evaluation,
    feed,
    loop,
    mapped,
    members,
    own_models,
    parallel,
    scoring,
    task,
)
from bn_jax.training.config import TrainConfig
from bn_jax.training.optimizers import make_optimizer
from bn_jax.training.state import Network, TrainState, init_state
from bn_jax.training.streams import Stream, key_of
from bn_jax.training.task import Task, make_network


class Progress(NamedTuple):
    """A sweep so far; the first axis of its arrays is that of the members."""

    state: TrainState  # NumPy arrays with a leading axis of members
    step_losses: np.ndarray  # shape [members, steps], float32; NaN after divergence
    step_accuracies: np.ndarray  # likewise
    # test_loss and test_accuracy, and those of the validation set where there is one;
    # each of shape [members, epochs], NaN before an epoch or once diverged.
    scores: dict[str, np.ndarray]
    seconds: float  # of training, all members together


class Sweep:
    """Members of a sweep that share a program, trained together.

    A member whose loss or parameters are not finite stops there, and keeps its last
    finite state; the others go on.

    Args:
      configs: of the members; they differ in numbers alone, see `config.traceable`.
      data: the images.
      model: the user's own; see `loop.Trainer`.
      devices: that share the members; by default JAX's first.
      checkpoint_steps: `train` pauses at each multiple of it.
      whole: configs of which these are a part; they then have the program, and so the
        numbers, that they have among them all.

    Raises:
      ConfigError: if configs differ in other fields, or do not fit the data.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        data: data_lib.ImageData,
        *,
        model: Any = None,
        devices: Sequence[jax.Device] | None = None,
        checkpoint_steps: int | None = None,
        whole: Sequence[TrainConfig] | None = None,
    ) -> None:
        if model is not None:
            configs = [own_models.named(config, model) for config in configs]
        members.check(configs)
        data = task.select(configs[0], data)
        self.configs, self.data = list(configs), data
        self.devices = list(devices or jax.local_devices()[:1])
        self._base, self._checkpoint_steps = configs[0], checkpoint_steps
        self.task = Task.of(self._base, data)
        self._model = model
        # Filled up, so that each device has as many; those added are left out later.
        padding = -len(configs) % len(self.devices)
        self._members = [*configs, *[configs[-1]] * padding]
        self._values = members.stack_values(self._members, whole)
        self._orders = {
            seed: self._order_of(seed) for seed in {c.seed for c in configs}
        }
        self.steps_per_epoch = len(data.train.labels) // self._base.batch_size
        self._map = mapped.Mapped(self.devices)
        of_all = (self._base, self.task, model)
        self._pace = parallel.pace(self.devices, steps_per_epoch=self.steps_per_epoch)
        self._run = self._map.compiled(
            functools.partial(
                members.run_member, *of_all, self.steps_per_epoch, self._pace
            ),
            shared=(False, False, True, False, True, True),
            donate=(1,),
        )
        self._evaluate, self._evaluate_by_batch = (
            self._map.compiled(
                functools.partial(members.evaluate_member, *of_all, way),
                shared=(False, False, True, True),
            )
            for way in (Network.predict, Network.predict_by_batch)
        )
        self.compile_seconds = 0.0
        self._is_compiled = False
        self._predict = members.predict_of(*of_all)  # one, so that it is compiled once
        self._test = self._batched(data.test)
        self._scored = {"test": self._test}  # after each epoch
        if data.validation is not None:
            self._scored["validation"] = self._batched(data.validation)
        no_steps = np.zeros((len(configs), 0), np.float32)
        unscored = np.full((len(configs), self._base.epochs), np.nan, np.float32)
        scores = {
            f"{split}_{kind}": unscored
            for split in self._scored
            for kind in ("loss", "accuracy")
        }
        self.restore(Progress(self._init_members(), no_steps, no_steps, scores, 0.0))

    def _order_of(self, seed: int) -> feed.Order:
        key = key_of(seed, Stream.ORDER)
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
        _, self._losses, self._accuracies, self._scores, self._seconds = progress

    def progress(self) -> Progress:
        """Return the sweep so far, on the host."""
        n = len(self.configs)
        state = self._map.get(self._state)
        return Progress(
            jax.tree.map(lambda leaf: leaf[:n], state),
            self._losses,
            self._accuracies,
            self._scores,
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
            max_steps=self._pace.max_steps,
            steps_per_epoch=self.steps_per_epoch,
            checkpoint_steps=self._checkpoint_steps,
        )
        data = feed.Batch(*self._map.put_shared(self.data.train))
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
            for split, batches in self._scored.items():
                variables = self._state.variables
                sums = self._map.get(self._evaluate(values, variables, *batches))
                self._set_scores(epoch, f"{split}_{{}}", sums, batches)
            yield epoch + 1

    def _take(self, metrics: loop.Metrics, size: int) -> None:
        """Append the metrics of `size` steps; NaN where a member was stopped."""
        n = len(self.configs)
        taken = self._map.get(self._state.step)[:n, None]
        steps = np.arange(self.step, self.step + size)
        for name, of_calls in (("loss", "_losses"), ("accuracy", "_accuracies")):
            new = np.where(steps < taken, getattr(metrics, name)[:n, :size], np.nan)
            old = getattr(self, of_calls)
            setattr(self, of_calls, np.append(old, new.astype(np.float32), axis=1))

    def _set_scores(
        self, epoch: int, name: str, sums: evaluation.Sums, batches: Any
    ) -> None:
        """Keep what an evaluation at an epoch's end has found."""
        of_epoch = np.arange(self._base.epochs) == epoch
        means = self._means(name, sums, batches)
        self._scores = self._scores | {
            name: np.where(
                of_epoch, new.astype(np.float32)[:, None], self._scores[name]
            )
            for name, new in means.items()
        }

    def rows(self, *, exact: bool = True, train: bool = False) -> list[dict[str, Any]]:
        """Return a row for each member, of values that JSON can hold.

        Args:
          exact: whether to measure loss and accuracy by exact statistics of the
            training set, too, where the norms have any; it takes about half an epoch a
            member. Of many layers they are measured in one pass, and rows have
            `exact_mode` (see `scoring.exact_mode`).
          train: whether to evaluate on the training set, too.
        """
        progress = self.progress()
        by_epoch = (len(self.configs), -1, self.steps_per_epoch)
        losses = progress.step_losses.reshape(by_epoch).mean(2)
        accuracies = progress.step_accuracies.reshape(by_epoch).mean(2)
        mode = self._exact_mode() if exact else None
        how = {"exact_mode": mode} if mode == "one_pass" else {}
        scores = self._final_scores(mode, train=train)
        return [
            {
                "config": config.to_dict(),
                "diverged_at_step": _diverged_at(progress.step_losses[i]),
                "loss": _json(losses[i]),
                "train_accuracy": _json(accuracies[i]),
                **{name: _json(of[i]) for name, of in progress.scores.items()},
                **{name: _json(values)[i] for name, values in scores.items()},
                **how,
                "first_step_losses": _json(progress.step_losses[i, :20]),
            }
            for i, config in enumerate(self.configs)
        ]

    def _final_scores(
        self, mode: population.Mode | None, *, train: bool
    ) -> dict[str, np.ndarray]:
        """Return the members' scores at the end, but those that each epoch has.

        Returns:
          `SPLIT_loss_STATISTICS` and `SPLIT_accuracy_STATISTICS`, each of shape
          [members]. Splits are the test set, and the validation set where there is one.
          Statistics are the moving averages, exact ones, or those of each batch (of at
          most 500 images) itself. With exact ones, also the ratio of the moving
          variance to the exact one, `LAYER_variance_ratio`, as the median over its
          features: dropout before a norm moves it from 1 (Li et al., 2018,
          arXiv:1801.05134). An average of the weights is "averaged", with exact
          statistics of its own.
        """
        state = self._map.get(self._state)
        variables = state.variables
        states = {"average": variables}
        scores: dict[str, np.ndarray] = {}
        if mode is not None:
            found = self._exact_statistics(variables, mode)
            states["exact"] = {**variables, "batch_stats": found}
            moving = traverse_util.flatten_dict(variables["batch_stats"])
            for path, exact in traverse_util.flatten_dict(found).items():
                if path[-1] == "var":
                    with np.errstate(divide="ignore", invalid="ignore"):
                        ratio = np.median(moving[path] / exact, -1)
                    name = f"{'/'.join(path[:-1])}_variance_ratio"
                    scores[name] = ratio[: len(self.configs)]
            if self._base.average_weights:
                averaged = {**variables, "params": state.average}
                found = self._exact_statistics(averaged, mode)
                states["averaged"] = {**averaged, "batch_stats": found}
        of_train = self._batched(self.data.train) if train else None
        wanted = [
            (split, batches, name)
            for split, batches in self._scored.items()
            for name in states
            if name != "average"
        ]
        wanted += [("train", of_train, name) for name in states if train]
        for split, batches, name in wanted:
            sums = self._sums(self._evaluate, states[name], batches)
            scores |= self._means(f"{split}_{{}}_{name}", sums, batches)
        if self._base.norm != "none":
            sums = self._sums(self._evaluate_by_batch, variables, self._test)
            scores |= self._means("test_{}_batch", sums, self._test)
        return scores

    def _sums(self, evaluate: Any, variables: Any, batches: Any) -> evaluation.Sums:
        placed = self._map.put((self._values, variables))
        sums: evaluation.Sums = self._map.get(evaluate(*placed, *batches))
        return sums

    def _means(
        self, name: str, sums: evaluation.Sums, batches: Any
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

    def _config(self) -> TrainConfig:
        """Return the config of the first member; the others differ in values alone."""
        first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), self._values)
        return self._base.with_traced(first)

    def _network(self) -> Network:
        return make_network(self._config(), self.task, model=self._model)

    def _variables(self, i: int, variables: Any) -> dict[str, Any]:
        """Return the variables of a member, its numbers among them."""
        own: dict[str, Any] = jax.tree.map(lambda leaf: leaf[i], variables)
        swept = jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), self._values)
        return {**own, "swept": swept}

    def _exact_mode(self) -> population.Mode | None:
        """Return how exact statistics are measured; None if there are none."""
        own = self._variables(0, self._map.get(self._state).variables)
        own.pop("swept")
        of_one = (self._network(), own, self.data.train.images[:1])
        if not jax.tree.leaves(own["batch_stats"]) or scoring.exact_refusal(*of_one):
            return None
        return scoring.exact_mode(*of_one)

    def _exact_statistics(self, variables: Any, mode: population.Mode) -> Any:
        """Return each member's exact statistics of the training set, stacked."""
        inputs = jnp.asarray(self.data.train.images)
        stats = [
            population.exact_statistics(
                self._predict,
                self._variables(i, variables),
                inputs,
                batch_size=evaluation.BATCH_SIZE,
                mode=mode,
            )
            for i in range(len(self.configs))
        ]
        stats += stats[-1:] * (len(self._members) - len(self.configs))  # as padding
        return jax.tree.map(lambda *leaves: np.stack(leaves), *stats)

    def _init_members(self) -> TrainState:
        """Return the members' initial states, stacked; those of `loop.Trainer`."""
        of_seed: dict[int, TrainState] = {}
        network, config = self._network(), self._config()
        network.check_fits(config.batch_size)
        init = models.make_init(network.model, network.image_shape)
        for seed in {config.seed for config in self._members}:
            optimizer = make_optimizer(
                config.with_traced({"seed": seed}), steps_per_epoch=self.steps_per_epoch
            )
            key = key_of(seed, Stream.WEIGHTS)
            state = init_state(
                init(key), optimizer, averages=config.average_weights > 0
            )
            of_seed[seed] = jax.tree.map(np.asarray, state)
        return jax.tree.map(
            lambda *leaves: np.stack(leaves), *(of_seed[c.seed] for c in self.configs)
        )


def _diverged_at(losses: np.ndarray) -> int | None:
    """Return the step, from 1, whose loss or update was not finite, or None."""
    finite = np.isfinite(losses)
    return None if finite.all() else int(finite.argmin()) + 1


def _json(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON holds them: None for those that are not finite."""
    return [float(v) if math.isfinite(v) else None for v in values]
