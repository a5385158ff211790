"""Training of a config on a data set: the step, and the loop that takes it.

`train_step(state, batch) -> (state, metrics)` is pure. `run_steps` takes many of them
in one compiled program, on one device or on several (`bn_jax.training.parallel`). A
`Trainer` goes through the epochs with it. Nothing here knows of disk or flags.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from bn_jax import data as data_lib
from bn_jax.averages import debiased_momentum
from bn_jax.training import (
    diagnosis,
    feed,
    merging,
    own_models,
    parallel,
    scoring,
    task,
)
from bn_jax.training.accumulation import Gradients, accumulated
from bn_jax.training.augment import AUGMENTATIONS
from bn_jax.training.config import TrainConfig
from bn_jax.training.evaluation import Evaluator
from bn_jax.training.feed import Batch
from bn_jax.training.losses import losses
from bn_jax.training.optimizers import make_optimizer, make_schedule
from bn_jax.training.progress import EpochReport, Progress
from bn_jax.training.scoring import Score
from bn_jax.training.state import Network, TrainState, init_state
from bn_jax.training.streams import Stream, key_of
from bn_jax.training.task import Task


class Metrics(NamedTuple):
    """Means over the examples of a batch."""

    loss: Array  # cross-entropy in nats; shape []
    accuracy: Array  # share of examples whose largest logit is the label's; shape []


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def forward(
    network: Network, params: Any, batch_stats: Any, images: Array, dropout_key: Array
) -> tuple[Array, Any]:
    """Return the logits of a batch in training mode, and the moved averages.

    Args:
      network: scales the images, and has the model.
      params: of the model.
      batch_stats: its moving averages.
      images: `[N, H, W, C]`, as bytes.
      dropout_key: decides what is dropped.
    """
    call = functools.partial(
        network.model.apply,
        {"params": params, "batch_stats": batch_stats},
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    with network.tracing():
        logits, updates = network.bound(call)(network.scale(images))
    return logits, updates.get("batch_stats", {})


def make_train_step(
    config: TrainConfig,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
) -> TrainStep:
    """Return `train_step(state, batch) -> (state, metrics)`, a pure function.

    Args:
      config: gives augmentation, accumulation, label smoothing, the average of weights,
        and the seed of dropout and augmentation.
      network: what is trained.
      optimizer: of the parameters.
      axis_name: of the mapped axis whose instances each hold an equal part of the
        batch; gradients and metrics are means over all of it. Each instance drops
        features of its own. Whether statistics are shared, too, is the model's affair.
    """
    dropout_key = key_of(config.seed, Stream.DROPOUT)
    augment_key = key_of(config.seed, Stream.AUGMENTATION)
    augment = AUGMENTATIONS.make(config.augment)
    average_weights = config.average_weights

    def key_of_step(step: Array, key: Array) -> Array:
        key = jax.random.fold_in(key, step)
        if axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        return key

    def augmented(images: Array, step: Array) -> Array:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * len(images)
        return augment(jax.random.fold_in(augment_key, step), images, first=first)

    def gradients_of(
        params: Any, batch_stats: Any, batch: Batch, dropout_key: Array
    ) -> tuple[Any, Any, Metrics]:
        """Return gradients, the moved averages and metrics of a (micro-)batch."""

        def loss_of(params: Any) -> tuple[Array, tuple[Any, Array]]:
            logits, moved = forward(
                network, params, batch_stats, batch.images, dropout_key
            )
            of_examples = losses(
                logits, batch.labels, label_smoothing=config.label_smoothing
            )
            return of_examples.mean(), (moved, logits)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), gradients = gradient_of(params)
        accuracy = jnp.mean(logits.argmax(-1) == batch.labels)
        return gradients, batch_stats, Metrics(loss, accuracy)

    compute: Gradients = gradients_of
    if config.accumulate > 1:
        compute = accumulated(gradients_of, config.accumulate, config.accumulate_stats)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = Batch(augmented(batch.images, state.step), batch.labels)
        gradients, batch_stats, (loss, accuracy) = compute(
            state.params, state.batch_stats, batch, key_of_step(state.step, dropout_key)
        )
        if axis_name is not None:
            gradients, loss, accuracy = _mean_over(
                axis_name, (gradients, loss, accuracy)
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_weights:
            m = debiased_momentum(average_weights, state.step)
            average = jax.tree.map(
                lambda old, new: (m * old + (1 - m) * new).astype(old.dtype),
                average,
                params,
            )
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
        )
        return state, Metrics(loss, accuracy)

    return train_step


def _mean_over(axis_name: str, tree: Any) -> Any:
    """Return the means over a mapped axis, in one collective for the whole tree."""
    flat, unravel = ravel_pytree(tree)
    return unravel(lax.pmean(flat, axis_name))


def run_steps(
    train_step: TrainStep,
    state: TrainState,
    source: feed.Stored | feed.Streamed,
    start: Array,
    stop: Array,
    *,
    pace: parallel.Pace,
) -> tuple[TrainState, Metrics]:
    """Take the steps from `start` to `stop`, or to the first that is not finite.

    As `start` and `stop` are not part of the program, a run that is cut into other
    parts gives the same numbers, bit for bit.

    Args:
      train_step: as `make_train_step` returns it.
      state: to start from.
      source: of the batches.
      start: number of the first step in `source`; shape [], int32.
      stop: number after the last; shape [], int32.
      pace: static; `stop - start` is at most `pace.max_steps`. Of several steps from
        one question to the next, those that are not to be taken are computed and left.

    Returns:
      The state after the last step whose loss and new parameters are finite, and the
      metrics of each step, with a leading axis of `pace.max_steps`; those after the
      last one taken are 0. A step that is not finite leaves its metrics, but not its
      state.
    """
    Carry = tuple[Array, Array, TrainState, Metrics]

    def goes_on(carry: Carry) -> Array:
        i, finite, _, _ = carry
        return (i < stop) & finite

    def step(carry: Carry) -> Carry:
        i, _, old, metrics = carry
        taken = goes_on(carry)
        new, of_step = train_step(old, source.batch(i))
        finite = jnp.isfinite(of_step.loss) & _all_finite(new.params)
        kept = taken & finite
        state = jax.tree.map(lambda n, o: jnp.where(kept, n, o), new, old)
        row = jnp.where(
            taken, i - start, max_steps
        )  # beyond the end, where none is set
        metrics = jax.tree.map(
            lambda m, v: m.at[row].set(v, mode="drop"), metrics, of_step
        )
        return i + taken, jnp.where(taken, finite, carry[1]), state, metrics

    def steps(carry: Carry) -> Carry:
        if pace.unasked == 1:
            return step(carry)
        return lax.fori_loop(0, pace.unasked, lambda _, carry: step(carry), carry)

    max_steps = pace.max_steps
    train_step = jax.jit(train_step, inline=True)  # traced once for both of its uses
    shapes = jax.eval_shape(train_step, state, source.batch(start))[1]
    metrics = jax.tree.map(lambda m: jnp.zeros((max_steps, *m.shape), m.dtype), shapes)
    carry = (start, jnp.asarray(True), state, metrics)
    _, _, state, metrics = lax.while_loop(goes_on, steps, carry)
    return state, metrics


def _all_finite(tree: Any) -> Array:
    """Return whether all numbers of a tree are finite."""
    flat, _ = ravel_pytree(tree)  # one small program on a GPU, rather than one a leaf
    return jnp.all(jnp.isfinite(flat))


# Of a data set that is streamed, so many examples give the exact statistics.
MAX_STREAMED_EXAMPLES = 2**16


class Trainer:
    """A run that can be looked at, saved and gone on from between calls.

    The same config and data give the same numbers, bit for bit, on one machine with the
    same devices, however often the run was stopped.

    Args:
      config: what to train, and how.
      data: the images.
      model: the user's own Linen or NNX module, called as `model(images, train=...)`,
        instead of the one that `config` names.
      placement: the devices; by default JAX's first.
      stream: whether training images are streamed to the devices, which then need not
        hold all of them.
      checkpoint_steps: `train` pauses at each multiple of it.
      start: the variables that training starts from, where `config.init_from` says so.
      make_train_step: called as the function of that name, for a step that does more.

    Raises:
      ConfigError: if the config does not fit the data, the model or the devices.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: data_lib.ImageData,
        *,
        model: Any = None,
        placement: parallel.Placement | None = None,
        stream: bool = False,
        checkpoint_steps: int | None = None,
        start: Any = None,
        make_train_step: Callable[..., TrainStep] = make_train_step,
    ) -> None:
        if model is not None:
            config = own_models.named(config, model)
        data = task.select(config, data)
        placement = placement or parallel.place(config)
        self.config, self.data, self.placement = config, data, placement
        self.stream, self._checkpoint_steps = stream, checkpoint_steps
        self.task = Task.of(config, data)
        self.network = task.make_network(config, self.task, model=model)
        trained = task.make_network(
            config,
            self.task,
            model=model,
            norm_attributes=parallel.norm_attributes(config, placement),
            binds_axes=not placement.uses_axis,
        )
        self.network.check_fits(config.batch_size // len(placement.devices))
        if model is not None:
            own_models.check_sharing(config, placement, trained)
        self.order_key = key_of(config.seed, Stream.ORDER)
        self._order = feed.Order(
            self.order_key,
            num_examples=len(data.train.labels),
            batch_size=config.batch_size,
        )
        self.steps_per_epoch = self._order.steps_per_epoch
        optimizer = make_optimizer(config, steps_per_epoch=self.steps_per_epoch)
        self._pace = parallel.pace(
            placement.devices, steps_per_epoch=self.steps_per_epoch, streamed=stream
        )
        train_step = make_train_step(
            config,
            trained,
            optimizer,
            axis_name=parallel.DATA if placement.uses_axis else None,
        )
        self._steps = parallel.make_steps(
            placement,
            functools.partial(run_steps, train_step, pace=self._pace),
            float32_products=trained.products == "highest",
        )
        self._run_steps: Any = None  # compiled
        self._compile_seconds = 0.0
        self._evaluate = self._evaluator(data.test)
        self._validate = data.validation and self._evaluator(data.validation)
        variables = task.started(
            config, self.network.init(key_of(config.seed, Stream.WEIGHTS)), start
        )
        merging.check(config, variables["batch_stats"], placement)
        state = init_state(variables, optimizer, averages=config.average_weights > 0)
        state = jax.tree.map(np.asarray, state)
        self.restore(
            Progress(
                _with_copies(state, placement.num_states),
                step_losses=np.zeros(0, np.float32),
                step_accuracies=np.zeros(0, np.float32),
                history=(),
                seconds=0.0,
            )
        )

    def _evaluator(self, split: data_lib.Split) -> Evaluator:
        return Evaluator(
            self.network.predict,
            split,
            devices=self.placement.devices,
            stored=not self.stream,
        )

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return len(self._losses)

    @property
    def last_loss(self) -> float:
        """Loss of the last step; NaN before the first."""
        return self._losses[-1] if self._losses else float("nan")

    @property
    def num_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def compile_seconds(self) -> float:
        """Time that compilation of steps and evaluation took."""
        evaluators = filter(None, (self._evaluate, self._validate))
        return self._compile_seconds + sum(e.compile_seconds for e in evaluators)

    def restore(self, progress: Progress) -> None:
        """Go on from `progress`.

        Moving averages of another number of devices are merged by the config's rule.
        """
        state = progress.state
        copies = {len(leaf) for leaf in jax.tree.leaves(state.batch_stats)}
        if copies - {self.placement.num_states}:
            merged = merging.merged(state.batch_stats, self.config.merged_stats)
            state = _with_copies(
                state.replace(batch_stats=merged), self.placement.num_states
            )
        self._state = self._steps.put_state(state)
        self._losses = [float(loss) for loss in progress.step_losses]
        self._accuracies = [float(value) for value in progress.step_accuracies]
        self.history = list(progress.history)
        self._seconds = progress.seconds

    def progress(self) -> Progress:
        """Return the run so far, on the host."""
        return Progress(
            state=self._steps.get_state(self._state),
            step_losses=np.asarray(self._losses, np.float32),
            step_accuracies=np.asarray(self._accuracies, np.float32),
            history=tuple(self.history),
            seconds=self._seconds,
        )

    def state(self) -> TrainState:
        """Return the state on the host, its moving averages merged into one."""
        state = self._steps.get_state(self._state)
        merged = merging.merged(state.batch_stats, self.config.merged_stats)
        return state.replace(batch_stats=merged)

    def train(self) -> Iterator[EpochReport | None]:
        """Train to the end, pausing after each call of the compiled loop.

        Yields:
          The report of the epoch that has ended, or None amid an epoch.

        Raises:
          FloatingPointError: if the loss, the parameters or the loss on the test set
            are not finite, saying where; what was trained before is kept.
        """
        planned = feed.calls(
            self.step,
            self.num_steps,
            max_steps=self._pace.max_steps,
            steps_per_epoch=self.steps_per_epoch,
            checkpoint_steps=self._checkpoint_steps,
        )
        sources = self._sources(planned)
        source = next(sources, None)
        started = time.perf_counter()
        compiled = self._compile_seconds
        for call in planned:
            epoch, start = divmod(call.first, self.steps_per_epoch)
            start = 0 if self.stream else start
            size = call.stop - call.first
            metrics = self._run(source, start, start + size)
            source = next(sources, None)  # read while the devices work
            self._take(metrics, size)
            compiled, before = self._compile_seconds, compiled
            now = time.perf_counter()
            self._seconds += now - started - (compiled - before)
            is_end = call.stop % self.steps_per_epoch == 0
            yield self._report(epoch) if is_end else None
            started = time.perf_counter()

    def _run(self, source: Any, start: int, stop: int) -> Metrics:
        """Take steps, and return their metrics, which may be on their way still.

        Args:
          source: of the batches, on the devices.
          start: number of the first step in the source.
          stop: number after the last, at most `max_steps` of the pace later.
        """
        first, last = np.int32(start), np.int32(stop)
        with self._steps.tracing():
            if self._run_steps is None:
                started = time.perf_counter()
                self._run_steps = self._steps.compiled(source)
                # Without a step to take, only compilation takes time.
                self._state, _ = jax.block_until_ready(
                    self._run_steps(self._state, source, first, first)
                )
                self._compile_seconds += time.perf_counter() - started
            self._state, metrics = self._run_steps(self._state, source, first, last)
        return metrics

    def lower(self) -> Any:
        """Return the compiled loop before compilation, to be looked at."""
        (source,) = self._sources([feed.Call(0, 1)])
        return self._steps.lower(self._state, source)

    def _sources(self, planned: list[feed.Call]) -> Iterator[Any]:
        """Yield the source of each call's batches, on the devices."""
        if self.stream:
            columns = self._steps.columns(self.config.batch_size)
            for batches in feed.stream(
                self.data.train,
                self._order,
                planned,
                columns=columns,
                max_steps=self._pace.max_steps,
            ):
                yield self._steps.put_streamed(batches)
            return
        data = self._steps.put_data(self.data.train)
        source, of_epoch = None, -1
        for call in planned:
            epoch = call.first // self.steps_per_epoch
            if epoch != of_epoch:
                order = self._order.of_epoch(epoch)
                source, of_epoch = self._steps.put_stored(data, order), epoch
            yield source

    def _take(self, metrics: Metrics, size: int) -> None:
        """Append the metrics of `size` steps, or say what was not finite in one."""
        step, metrics = self._steps.get_first((self._state.step, metrics))
        taken = int(step) - self.step
        self._losses += metrics.loss[:taken].tolist()
        self._accuracies += metrics.accuracy[:taken].tolist()
        if taken < size:
            self._refuse_step(float(metrics.loss[taken]))

    def _refuse_step(self, loss: float) -> None:
        """Say what was not finite in the step after the last."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        rows = self._order.of_epoch(epoch)[i]
        images, labels = (jnp.asarray(array[rows]) for array in self.data.train)
        rate = make_schedule(self.config, steps_per_epoch=self.steps_per_epoch)
        where = diagnosis.first_not_finite(
            functools.partial(forward, self.network),
            self.state(),
            Batch(images, labels),
        )
        raise FloatingPointError(
            f"{'the loss is' if not np.isfinite(loss) else 'parameters are'} not "
            f"finite at step {self.step + 1} (learning_rate="
            f"{float(rate(self.step)):.6g}): {where}; try a smaller learning_rate"
        )

    def _report(self, epoch: int) -> EpochReport:
        """Evaluate and return the report of the epoch that has ended."""
        variables = self.state().variables
        tested = self._evaluate(variables)
        if not np.isfinite(tested.loss):
            raise FloatingPointError(
                f"the loss on the test set is not finite after epoch {epoch + 1} "
                f"(learning_rate={self.config.learning_rate}); try a smaller "
                "learning_rate"
            )
        validated = None if self._validate is None else self._validate(variables)
        steps = slice(self.step - self.steps_per_epoch, self.step)
        num_examples = self.steps_per_epoch * self.config.batch_size
        report = EpochReport(
            epoch=epoch + 1,
            step=self.step,
            loss=float(np.mean(self._losses[steps])),
            train_accuracy=float(np.mean(self._accuracies[steps])),
            test_loss=tested.loss,
            test_accuracy=tested.accuracy,
            seconds=self._seconds,
            examples_per_second=num_examples / self._seconds,
            validation_loss=validated and validated.loss,
            validation_accuracy=validated and validated.accuracy,
        )
        self._seconds = 0.0
        self.history.append(report)
        return report

    def score(self) -> Score:
        """Evaluate by moving averages and by exact statistics of the training set."""
        state = self.state()
        return scoring.score(
            self.network,
            state.variables,
            self._evaluate,
            self.data.train.images[: MAX_STREAMED_EXAMPLES if self.stream else None],
            devices=self.placement.local_devices,
            average=state.average,
        )


def _with_copies(state: TrainState, num_copies: int) -> TrainState:
    """Return a state whose moving averages are stacked copies."""

    def copies(leaf: Any) -> np.ndarray:
        return np.stack([np.asarray(leaf)] * num_copies)

    return state.replace(batch_stats=jax.tree.map(copies, state.batch_stats))
