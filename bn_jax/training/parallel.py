"""Training steps on several devices at once: by pmap, or by jit over a mesh.

Both run the same `run_steps` and give the same numbers. The devices of one process,
or of many that `jax.distributed` has joined, form one axis, `DATA`: each takes an equal
part of every batch. (Members of a sweep, which share neither statistics nor gradients,
have another axis, `bn_jax.training.mapped.MODELS`.)

`Pmap` runs a program per device, in which the norms find the others by the axis name;
each device has its own copy of the state, and moving averages that differ where
statistics are not shared. `Mesh` runs one program over arrays that are sharded by the
compiler; statistics are global by construction, and ghost batches stand for devices
that do not share theirs.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.training import feed
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import TrainState

DATA = "data"

# Steps in one call of the compiled loop. Between calls a run can be stopped, and the
# batches of one are read ahead where the data set is streamed, so that they are few; a
# call costs less than half a millisecond on a CPU, so that they are not one.
STEPS_PER_CALL = 20
# On a GPU a call costs 2 ms, several steps of a small network.
_STEPS_PER_CALL_OF_ACCELERATORS = 256
# There the host also waits for the answer whether the loop goes on, .03 ms each time.
_MAX_UNASKED, _MIN_UNASKED = 32, 8
# cuDNN convolves float32 with the channels first, unless it may round to TF32. XLA lays
# images out for that, channels last, and would turn them before and after.
_COMPILER_OPTIONS_OF_FLOAT32_ON_GPU = {"xla_gpu_force_conv_nchw": True}


class Pace(NamedTuple):
    """How the compiled loop takes its steps."""

    max_steps: int  # of a call
    unasked: int = 1  # steps from one question whether to go on to the next


def pace(
    devices: Sequence[jax.Device], *, steps_per_epoch: int, streamed: bool = False
) -> Pace:
    """Return how the compiled loop takes its steps on devices.

    Args:
      devices: that train.
      steps_per_epoch: what divides it leaves no step that is computed for nothing.
      streamed: whether the data set is.
    """
    if devices[0].platform == "cpu":
        return Pace(STEPS_PER_CALL)
    most, whole = _STEPS_PER_CALL_OF_ACCELERATORS, steps_per_epoch
    if streamed:
        most = whole = STEPS_PER_CALL
    unasked = max(n for n in range(1, _MAX_UNASKED + 1) if whole % n == 0)
    if unasked < min(_MIN_UNASKED, whole):
        unasked = 2 * _MIN_UNASKED
    return Pace(most // unasked * unasked, unasked)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices that train together, and how they share statistics.

    Attributes:
      devices: of all processes, in the order of their parts of a batch.
      parallel: how they are programmed.
      group_size: number of neighbouring devices that share statistics; all of them,
        unless said otherwise.
    """

    devices: tuple[jax.Device, ...]
    parallel: Literal["pmap", "jit"]
    group_size: int

    @property
    def num_groups(self) -> int:
        """Number of groups of devices that share statistics."""
        return len(self.devices) // self.group_size

    @property
    def local_devices(self) -> tuple[jax.Device, ...]:
        """The devices of this process."""
        index = jax.process_index()
        return tuple(d for d in self.devices if d.process_index == index)

    @property
    def first_local(self) -> int:
        """Number of devices before those of this process."""
        return self.devices.index(self.local_devices[0])

    @property
    def uses_axis(self) -> bool:
        """Whether the program is one per device, with a mapped axis."""
        return self.parallel == "pmap" and len(self.devices) > 1

    @property
    def num_states(self) -> int:
        """Number of moving averages that a layer has."""
        return self.num_groups if self.uses_axis else 1


def place(
    config: TrainConfig, *, devices: str = "1", parallel: str = "pmap"
) -> Placement:
    """Return the devices for `config`, of those that JAX sees.

    Args:
      config: its batch must divide over the devices.
      devices: "all", or their number as digits, over all processes.
      parallel: "pmap" or "jit".

    Raises:
      ConfigError: if there are too few devices, they do not divide the batch, or groups
        do not divide the devices.
    """
    present = jax.devices()
    num_devices = len(present) if devices == "all" else int(devices)
    if num_devices > len(present):
        raise ConfigError(
            f"devices={num_devices}, but JAX sees {len(present)} "
            f"({present[0].platform}); give at most {len(present)}, or all"
            + (
                f", or call jax.config.update('jax_num_cpu_devices', {num_devices}) "
                "before JAX is first used"
                if present[0].platform == "cpu"
                else ""
            )
        )
    if jax.process_count() > 1 and num_devices < len(present):
        raise ConfigError(
            f"devices={num_devices} of the {len(present)} of {jax.process_count()} "
            "processes; several processes train with all of their devices: leave out "
            "devices, or start fewer processes"
        )
    if config.batch_size % num_devices:
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide over {num_devices} "
            f"devices; give a multiple of {num_devices}, or a number of devices that "
            "divides it"
        )
    group_size = _group_size(config.batch_stats, num_devices)
    if config.batch_size % (num_devices * config.accumulate):
        raise ConfigError(
            f"accumulate={config.accumulate} does not divide the "
            f"{config.batch_size // num_devices} images of each of {num_devices} "
            "devices; give a divisor"
        )
    return Placement(
        tuple(present[:num_devices]),
        "pmap" if parallel == "pmap" else "jit",
        group_size,
    )


def _group_size(batch_stats: str, num_devices: int) -> int:
    """Return how many devices share statistics."""
    if batch_stats == "synced":
        return num_devices
    if batch_stats == "per_device":
        return 1
    size = int(batch_stats.removeprefix("groups:"))
    if num_devices % size:
        raise ConfigError(
            f"batch_stats={batch_stats!r} does not divide {num_devices} devices into "
            f"groups of {size}; give a divisor of {num_devices}"
        )
    return size


def norm_attributes(config: TrainConfig, placement: Placement) -> dict[str, Any]:
    """Return the attributes by which the norms of our models share statistics."""
    num_devices, group_size = len(placement.devices), placement.group_size
    if num_devices == 1:
        return {}
    if placement.parallel == "jit":
        if group_size == num_devices:
            return {}
        parts = placement.num_groups * config.accumulate
        return {"ghost_batch_size": config.batch_size // parts}
    if group_size == 1:
        return {}
    attributes: dict[str, Any] = {"axis_name": DATA}
    if group_size < num_devices:
        groups = np.arange(num_devices).reshape(-1, group_size)
        attributes["axis_index_groups"] = groups.tolist()
    return attributes


def put(array: np.ndarray | Array, sharding: NamedSharding) -> Array:
    """Return an array that every process has whole, with `sharding`."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


# `loop.run_steps` of a train step: of a state, a source of batches, the number of the
# first step and that after the last. It returns the new state and the steps' metrics.
RunSteps = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class Steps(abc.ABC):
    """A compiled `run_steps` over the devices of a placement; see `Pmap` and `Mesh`.

    A state on the host is a `TrainState` of NumPy arrays whose batch statistics have a
    leading axis of `placement.num_states`.
    """

    def __init__(self, placement: Placement, run_steps: RunSteps) -> None:
        self.placement = placement
        self._run_steps = run_steps

    def columns(self, batch_size: int) -> slice:
        """Return the part of a batch that this process reads."""
        of_device = batch_size // len(self.placement.devices)
        first = self.placement.first_local * of_device
        return slice(first, first + len(self.placement.local_devices) * of_device)

    def lower(self, state: Any, source: Any) -> Any:
        """Return the loop lowered for these arguments, to be looked at."""
        first = np.int32(0)
        with self.tracing():
            return self.compiled(source).lower(state, source, first, first)

    def tracing(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the loop is called."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def compiled(self, source: Any) -> Any:
        """Return the loop, mapped over the devices; its first call compiles it.

        It takes what `RunSteps` takes, on the devices, and uses up the state.

        Args:
          source: of batches, of the kind that it will be called with.
        """

    @abc.abstractmethod
    def put_state(self, state: TrainState) -> Any:
        """Return a host's state on the devices."""

    @abc.abstractmethod
    def get_state(self, state: Any) -> TrainState:
        """Return a state on the host, the same on all processes."""

    @abc.abstractmethod
    def put_data(self, data: data_lib.Split) -> Any:
        """Return a whole data set in the memory of each device."""

    @abc.abstractmethod
    def put_stored(self, data: Any, order: np.ndarray) -> Any:
        """Return a source of batches of what `put_data` returned.

        Args:
          data: the data set.
          order: the examples of each step's batch, `[steps, batch_size]`.
        """

    @abc.abstractmethod
    def put_streamed(self, batches: feed.Batch) -> Any:
        """Return a source of batches.

        Args:
          batches: this process's `columns` of them, `[pace.max_steps, N, ...]`.
        """

    @abc.abstractmethod
    def get_first(self, tree: Any) -> Any:
        """Return on the host what is the same on all devices."""


class Mesh(Steps):
    """One program, partitioned by the compiler; also that of a single device."""

    def __init__(
        self,
        placement: Placement,
        run_steps: RunSteps,
        *,
        float32_products: bool = False,
    ) -> None:
        super().__init__(placement, run_steps)
        mesh = jax.sharding.Mesh(np.array(placement.devices), (DATA,))
        self._mesh = mesh
        on_gpu = placement.devices[0].platform == "gpu"
        self._compiler_options = (
            _COMPILER_OPTIONS_OF_FLOAT32_ON_GPU if on_gpu and float32_products else None
        )
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_column = NamedSharding(mesh, PartitionSpec(None, DATA))

    def compiled(self, source: Any) -> Any:
        del source
        return jax.jit(
            self._run_steps,
            donate_argnums=0,
            out_shardings=self._replicated,
            compiler_options=self._compiler_options,
        )

    def tracing(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self._mesh)  # convolutions look at it

    def put_state(self, state: TrainState) -> Any:
        state = state.replace(
            batch_stats=jax.tree.map(lambda leaf: leaf[0], state.batch_stats)
        )
        return jax.tree.map(lambda leaf: put(leaf, self._replicated), state)

    def get_state(self, state: Any) -> TrainState:
        state = self.get_first(state)
        return state.replace(
            batch_stats=jax.tree.map(lambda leaf: leaf[None], state.batch_stats)
        )

    def put_data(self, data: data_lib.Split) -> Any:
        return feed.Batch(*(put(array, self._replicated) for array in data))

    def put_stored(self, data: Any, order: np.ndarray) -> Any:
        return feed.Stored(data, put(order, self._by_column))

    def put_streamed(self, batches: feed.Batch) -> Any:
        return feed.Streamed(
            jax.tree.map(
                functools.partial(
                    jax.make_array_from_process_local_data, self._by_column
                ),
                batches,
            )
        )

    def get_first(self, tree: Any) -> Any:
        return jax.tree.map(_first_copy, tree)


class Pmap(Steps):
    """A program per device, mapped over the axis `DATA`."""

    def __init__(self, placement: Placement, run_steps: RunSteps) -> None:
        super().__init__(placement, run_steps)
        self._devices = placement.local_devices
        mesh = jax.sharding.Mesh(np.array(self._devices), (DATA,))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_device = NamedSharding(mesh, PartitionSpec(DATA))
        # pmap takes the devices of one process as a list, those of several unnamed.
        devices = placement.devices if jax.process_count() == 1 else None
        self._pmap = functools.partial(jax.pmap, axis_name=DATA, devices=devices)
        self._gather = self._pmap(lambda tree: lax.all_gather(tree, DATA))

    def compiled(self, source: Any) -> Any:
        stored = feed.Stored(data=None, order=0)  # type: ignore[arg-type]
        axes = stored if isinstance(source, feed.Stored) else 0
        return self._pmap(
            self._run_steps, in_axes=(0, axes, None, None), donate_argnums=0
        )

    def _put_stacked(self, array: np.ndarray) -> Array:
        return put(array, self._by_device)

    def put_state(self, state: TrainState) -> Any:
        own = self.placement.first_local + np.arange(len(self._devices))

        def of_devices(leaf: np.ndarray) -> Array:
            return self._put_stacked(leaf[own // self.placement.group_size])

        def copies(leaf: np.ndarray) -> Array:
            stacked = np.broadcast_to(leaf, (len(self._devices), *np.shape(leaf)))
            return self._put_stacked(stacked)

        batch_stats = jax.tree.map(of_devices, state.batch_stats)
        placed = jax.tree.map(copies, state.replace(batch_stats={}))
        return placed.replace(batch_stats=batch_stats)

    def get_state(self, state: Any) -> TrainState:
        batch_stats = state.batch_stats
        if jax.tree.leaves(batch_stats):
            batch_stats = jax.tree.map(
                lambda leaf: _first_copy(leaf)[0][:: self.placement.group_size],
                self._gather(batch_stats),
            )
        first = self.get_first(state.replace(batch_stats={}))
        return first.replace(batch_stats=batch_stats)

    def put_data(self, data: data_lib.Split) -> Any:
        return feed.Batch(*(put(array, self._replicated) for array in data))

    def put_stored(self, data: Any, order: np.ndarray) -> Any:
        own = order[:, self.columns(order.shape[1])]
        return feed.Stored(data, self._put_stacked(self._apart(own)))

    def put_streamed(self, batches: feed.Batch) -> Any:
        return feed.Streamed(
            jax.tree.map(lambda leaf: self._put_stacked(self._apart(leaf)), batches)
        )

    def _apart(self, columns: np.ndarray) -> np.ndarray:
        """Return `[steps, N, ...]` as `[devices, steps, N / devices, ...]`."""
        steps, n, *rest = columns.shape
        parts = (steps, len(self._devices), n // len(self._devices), *rest)
        return columns.reshape(parts).swapaxes(0, 1)

    def get_first(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _first_copy(leaf)[0], tree)


def _first_copy(array: Array) -> np.ndarray:
    """Return the part of an array on the first device of this process."""
    return np.asarray(array.addressable_data(0))


def make_steps(
    placement: Placement,
    run_steps: RunSteps,
    *,
    float32_products: bool = False,
) -> Steps:
    """Return the compiled loop for a placement.

    Args:
      placement: of the devices.
      run_steps: the loop; its step is made with `axis_name=DATA` if
        `placement.uses_axis`.
      float32_products: whether products and convolutions are of float32 everywhere.
        (Then jit lays images out for that on a GPU; pmap takes no such wish.)
    """
    if placement.uses_axis:
        return Pmap(placement, run_steps)
    return Mesh(placement, run_steps, float32_products=float32_products)
