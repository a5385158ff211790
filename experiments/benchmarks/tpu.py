r"""What would a step take on TPUs, and what do the chips say to each other?

No TPU is needed: libtpu compiles for absent chips, here of v5e. Of a batch norm layer
alone, of LeNet's step and of ResNet-20's, with synced statistics by `jax.shard_map` and
by jit over a sharded batch, the command says: collectives in all, and for each norm;
operations, bytes moved and the memory of temporaries on a chip; the seconds that
compilation took; and the least time of a step that arithmetic and bandwidth allow.

  pip install -e '.[tpu]'
  JAX_PLATFORMS=cpu python -m experiments.benchmarks.tpu --workdir=runs/tpu  10 minutes
  JAX_PLATFORMS=cpu python -m experiments.benchmarks.tpu --workdir=runs/tpu-try \
    --programs=layer/shard_map/8,layer/jit/8                               a minute

A layer compiles in seconds, LeNet's step in a minute; only one program at a time can
compile. Each is named MODEL/HOW/CHIPS, and each chip has 256
images of a batch (128 of ResNet-20's). Products are in bfloat16, as a TPU's default is.
pmap, which the trainer uses on chips that are there, cannot compile for absent ones;
`shard_map` is the same program per chip.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bn_jax
from bn_jax.fields import ConfigError
from bn_jax.runs import json_files, provenance
from bn_jax.training import feed, loop, parallel, task
from bn_jax.training.config import TrainConfig
from bn_jax.training.optimizers import make_optimizer
from bn_jax.training.state import init_state
from experiments import launch
from experiments.benchmarks import timing

# Of one v5e chip, from Google's documentation "TPU v5e": operations of bfloat16 and
# bytes of its memory, a second.
OPERATIONS_A_SECOND, BYTES_A_SECOND = 197e12, 819e9
# Else LeNet's step takes seven minutes on two cores, in place of one; what it moves and
# says is the same to 5%.
LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
TOPOLOGIES = {1: "v5e:1x1", 8: "v5e:2x4", 64: "v5e:8x8"}
COLLECTIVE = re.compile(
    r"= \S.* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


class Model(NamedTuple):
    """What is compiled."""

    spec: str  # of `--model`; empty for a batch norm layer alone
    image_shape: tuple[int, int, int]
    images_a_chip: int
    num_norms: int


MODELS = {
    "layer": Model("", (14, 14, 64), 32, 1),
    "lenet": Model("lenet", (28, 28, 1), 256, 4),
    "resnet20": Model("resnet:depth=20,width=16", (32, 32, 3), 128, 19),
}
PROGRAMS = (
    *(f"layer/{how}/8" for how in ("shard_map", "jit")),
    *(f"lenet/{how}/{n}" for n in TOPOLOGIES for how in ("shard_map", "jit")),
    "lenet/groups:2/8",
    *(f"resnet20/{how}/8" for how in ("shard_map", "jit")),
)


class Compiled(NamedTuple):
    """What was counted in a compiled program; counts and bytes are per chip."""

    collectives: dict[str, int]  # by kind
    collectives_a_norm: float  # but for the one of gradients and metrics
    operations: float
    bytes_moved: float
    temporary_bytes: int
    compile_seconds: float
    arithmetic_seconds: float  # of a step, at the chip's bfloat16 rate
    bandwidth_seconds: float  # likewise


def chips(number: int) -> Sequence[jax.Device]:
    """Return descriptions of so many chips of v5e, which need not be there.

    Raises:
      ConfigError: if libtpu is not installed, or another program uses it.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            "libtpu, which compiles for TPUs, is not installed; pip install -e '.[tpu]'"
        ) from None
    from jax.experimental import topologies

    # What a machine without chips cannot find out about itself.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    name = TOPOLOGIES[number]
    options = {"chips_per_host_bounds": [1, 1, 1]} if number == 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" not in str(error):
            raise
        raise ConfigError(
            "another program compiles for TPUs, which one at a time can; wait for it, "
            "or remove /tmp/libtpu_lockfile where none does"
        ) from None
    return found.devices


def compile_program(name: str) -> Compiled:
    """Compile a program of `PROGRAMS`.

    Raises:
      ConfigError: if libtpu is not installed.
    """
    model_name, how, number = name.split("/")
    model = MODELS[model_name]
    devices = chips(int(number))
    mesh = Mesh(np.array(devices), (parallel.DATA,))
    per_chip = how != "jit"
    if model.spec:
        function, state, batch = train_step(model, how, devices)
    else:
        function, state, batch = layer_step(model, per_chip, len(devices))
    of_state, of_batch = PartitionSpec(), PartitionSpec(parallel.DATA)
    if per_chip:
        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(of_state, of_batch),
            out_specs=(of_state, of_state) if model.spec else (of_batch, of_state),
            check_vma=False,
        )

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            tree,
        )

    started = time.perf_counter()
    arguments = placed(state, of_state), placed(batch, of_batch)
    # The trainer's jit sets the mesh, too: norms and convolutions look at it.
    with contextlib.nullcontext() if per_chip else jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile(LEAST_EFFORT)
    seconds = time.perf_counter() - started
    collectives = collections.Counter(COLLECTIVE.findall(compiled.as_text()))
    costs = compiled.cost_analysis()
    operations, moved = costs["flops"], costs["bytes accessed"]
    shared = 1 if model.spec and len(devices) > 1 else 0
    return Compiled(
        dict(collectives),
        (collectives.total() - shared) / model.num_norms,
        operations,
        moved,
        compiled.memory_analysis().temp_size_in_bytes,
        seconds,
        operations / OPERATIONS_A_SECOND,
        moved / BYTES_A_SECOND,
    )


def layer_step(model: Model, per_chip: bool, num_chips: int) -> tuple[Any, Any, Any]:
    """Return batch norm, forward and backward, its state and its batch, as shapes."""
    axis_name = parallel.DATA if per_chip else None

    def step(state: Any, batch: Any) -> Any:
        (params, averages), (x, dy) = state, batch
        y, pullback, averages = jax.vjp(
            lambda params, x: bn_jax.batch_norm(
                x, params, averages, train=True, axis_name=axis_name
            ),
            params,
            x,
            has_aux=True,
        )
        dparams, dx = pullback(dy)
        return (y, dx), (dparams, averages)

    state = jax.eval_shape(lambda: bn_jax.init(model.image_shape[-1]))
    shape = (model.images_a_chip * num_chips, *model.image_shape)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return step, state, (x, x)


def train_step(
    model: Model, how: str, devices: Sequence[jax.Device]
) -> tuple[Any, Any, Any]:
    """Return our trainer's step, its state and its batch, as shapes."""
    batch_size = model.images_a_chip * len(devices)
    config = TrainConfig(
        model=model.spec,
        batch_size=batch_size,
        precision="default",
        batch_stats=how if how.startswith("groups") else "synced",
    )
    size = int(how.partition(":")[2] or len(devices))
    mode: Any = "jit" if how == "jit" else "pmap"
    placement = parallel.Placement(tuple(devices), mode, size)
    of_task = task.Task(10, model.image_shape)
    networks = [
        task.make_network(config, of_task, norm_attributes=attributes)
        for attributes in ({}, parallel.norm_attributes(config, placement))
    ]
    initial, trained = (
        dataclasses.replace(network, model=network.model.clone(layout="NHWC"))
        for network in networks  # the layout of TPUs, whatever machine compiles
    )
    optimizer = make_optimizer(config, steps_per_epoch=1)
    step = loop.make_train_step(
        config,
        trained,
        optimizer,
        axis_name=parallel.DATA if placement.uses_axis else None,
    )
    state = jax.eval_shape(
        lambda key: init_state(initial.init(key), optimizer), jax.random.key(0)
    )
    images = jax.ShapeDtypeStruct((batch_size, *model.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return step, state, feed.Batch(images, labels)


COLUMNS: dict[str, Callable[[Compiled], str]] = {
    "collectives": lambda c: (
        ", ".join(f"{n} {kind}" for kind, n in c.collectives.items()) or "none"
    ),
    "a norm": lambda c: f"{c.collectives_a_norm:.3g}",
    "operations, 1e6": lambda c: f"{c.operations / 1e6:.4g}",
    "moved, MB": lambda c: f"{c.bytes_moved / 1e6:.4g}",
    "temporaries, MB": lambda c: f"{c.temporary_bytes / 1e6:.3g}",
    "step at least, ms": lambda c: (
        f"{1e3 * max(c.arithmetic_seconds, c.bandwidth_seconds):.3g}"
    ),
    "compilation, s": lambda c: f"{c.compile_seconds:.0f}",
}


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    names = flags.FLAGS.programs
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown:
        raise ConfigError(
            f"programs={','.join(unknown)}; expected some of {', '.join(PROGRAMS)}"
        )
    chips(1 if names[0].endswith("/1") else 8)  # raises before the folder is touched
    config = {"programs": list(names)}
    with launch.experiment("benchmarks.tpu", config, repeat=False) as folder:
        rows = [["model/how/chips", *COLUMNS]]
        compiled = {}
        for name in names:
            said = compile_program(name)
            compiled[name] = said._asdict()
            rows.append([name, *(column(said) for column in COLUMNS.values())])
            print(timing.table([rows[0], rows[-1]]).splitlines()[-1], flush=True)
        (folder / "table.md").write_text(timing.table(rows))
        json_files.write_json(
            folder / json_files.RESULTS,
            {
                "compiled": compiled,
                "versions": timing.versions(["jax", "jaxlib", "libtpu"]),
                "environment": provenance.environment(),
            },
        )
        print(f"written to {folder}: table.md, {json_files.RESULTS}")


def define_flags() -> None:
    launch.define_workdir_flag()
    flags.DEFINE_list(
        "programs", list(PROGRAMS), f"Which to compile, of {', '.join(PROGRAMS)}."
    )


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(define_flags))
