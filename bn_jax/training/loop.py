"""Training of a config on a data set: the loop over epochs, free of disk and flags."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax import data as data_lib
from bn_jax.training import (
    diagnosis,
    feed,
    merging,
    own_models,
    parallel,
    scoring,
    task,
)
from bn_jax.training import step as step_lib
from bn_jax.training.config import TrainConfig
from bn_jax.training.evaluation import Evaluator
from bn_jax.training.optimizers import make_optimizer, make_schedule
from bn_jax.training.scoring import Score
from bn_jax.training.state import TrainState, init_state
from bn_jax.training.streams import Stream, key_of
from bn_jax.training.task import Task

# Of a data set that is streamed, so many examples give the exact statistics.
MAX_STREAMED_EXAMPLES = 2**16


class EpochReport(NamedTuple):
    """One line of a run's history. Accuracies are shares of 1, losses in nats."""

    epoch: int  # from 1
    step: int  # steps taken at its end
    loss: float  # mean over the epoch's batches, in training mode, as they were trained
    train_accuracy: float  # likewise
    test_loss: float  # in prediction mode, by the moving averages
    test_accuracy: float  # likewise
    seconds: float  # of training alone, without evaluation or compilation
    examples_per_second: float  # trained, without evaluation or compilation
    validation_loss: float | None = None  # as that of the test set; None without one
    validation_accuracy: float | None = None  # likewise

    @property
    def best_by(self) -> float:
        """What the best checkpoint is chosen by: accuracy on the validation set.

        Without one it is that on the test set.
        """
        if self.validation_accuracy is None:
            return self.test_accuracy
        return self.validation_accuracy

    def to_row(self) -> dict[str, float]:
        """Return the fields that have a value."""
        return {name: v for name, v in self._asdict().items() if v is not None}


class Progress(NamedTuple):
    """A run so far; training resumes from it as if it had never stopped."""

    state: TrainState  # NumPy arrays; statistics have a leading axis, see parallel.py
    step_losses: np.ndarray  # of each step taken; shape [steps], float32
    step_accuracies: np.ndarray  # likewise
    history: tuple[EpochReport, ...]  # of the epochs that are finished
    seconds: float  # of training in the epoch that is not


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
      make_train_step: called as `step.make_train_step`, for a step that does more.

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
        make_train_step: Callable[..., step_lib.TrainStep] = step_lib.make_train_step,
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
        self._steps = parallel.make_steps(
            placement,
            make_train_step(
                config,
                trained,
                optimizer,
                axis_name=parallel.DATA if placement.uses_axis else None,
            ),
            self._pace,
            float32_products=trained.products == "highest",
        )
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
        return self._steps.compile_seconds + sum(e.compile_seconds for e in evaluators)

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
        compiled = self._steps.compile_seconds
        for call in planned:
            epoch, start = divmod(call.first, self.steps_per_epoch)
            start = 0 if self.stream else start
            size = call.stop - call.first
            self._state, metrics = self._steps.run(
                self._state, source, start, start + size
            )
            source = next(sources, None)  # read while the devices work
            self._take(metrics, size)
            compiled, before = self._steps.compile_seconds, compiled
            now = time.perf_counter()
            self._seconds += now - started - (compiled - before)
            is_end = call.stop % self.steps_per_epoch == 0
            yield self._report(epoch) if is_end else None
            started = time.perf_counter()

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

    def _take(self, metrics: step_lib.Metrics, size: int) -> None:
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
        batch = step_lib.Batch(images, labels)
        rate = make_schedule(self.config, steps_per_epoch=self.steps_per_epoch)
        where = diagnosis.first_not_finite(self.network, self.state(), batch)
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
