"""Programs that runs/test_distributed.py runs in processes of their own.

Each takes one argument, a JSON object: the program's name, its place among the
processes, and what the program says it needs.
"""

import contextlib
import functools
import json
import operator
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax import data as data_lib
from bn_jax.linen import BatchNorm
from bn_jax.measures.population import exact_statistics
from bn_jax.runs import distributed, interrupt
from bn_jax.runs import run as run_lib
from bn_jax.training import loop, parallel, task
from bn_jax.training.config import RunOptions, TrainConfig
from bn_jax.training.state import Network

LOCAL_DEVICES = 2


class Small(nn.Module):
    """A dense layer with a norm: compiled in a second, where LeNet takes seven."""

    norm_attributes: dict | None = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(16, name="dense1")(x.reshape(len(x), -1))
        x = BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            name="norm1",
            **(self.norm_attributes or {}),
        )(x)
        return nn.Dense(10, name="dense2")(jax.nn.sigmoid(x))


def with_small_model():
    """Let the Trainer train `Small` within this context."""

    def make_network(config, of, *, model=None, norm_attributes=None, **options):
        del config, model, options
        return Network(Small(norm_attributes), of.image_shape, of.num_classes)

    return mock.patch.object(task, "make_network", make_network)


class Recorded(np.ndarray):
    """Images that note which of them are read."""

    rows: list = []

    def __getitem__(self, rows):
        if isinstance(rows, np.ndarray):
            self.rows.append(rows)
        return np.asarray(self)[rows]


def load_data(path):
    """The data set that the test has written."""
    arrays = np.load(path)
    images = arrays["train_images"].view(Recorded)
    return data_lib.ImageData(
        name="tiny",
        train=data_lib.Split(images, arrays["train_labels"]),
        test=data_lib.Split(arrays["test_images"], arrays["test_labels"]),
        class_names=tuple("0123456789"),
        kind="sample",
        source="tiny",
    )


def numbers(data, *, devices, config, program, stream):
    """All that a run comes to, as arrays."""
    config = TrainConfig(**config)
    placement = parallel.place(config, devices=devices, parallel=program)
    assert len(set(placement.devices)) == 4
    with with_small_model():
        trainer = loop.Trainer(config, data, placement=placement, stream=stream)
    list(trainer.train())
    progress = trainer.progress()
    tree = {
        "losses": progress.step_losses,
        "accuracies": progress.step_accuracies,
        "tests": [(r.test_loss, r.test_accuracy) for r in trainer.history],
        "params": progress.state.params,
        "batch_stats": progress.state.batch_stats,
        "merged": trainer.state().batch_stats,
        "score": list(trainer.score().to_row().values()),
    }
    return {
        name: np.asarray(value)
        for name, value in traverse_util.flatten_dict(tree, sep="/").items()
    }


def train_one(name, run, data, out):
    """Train; write what it comes to, and what was read."""
    arrays = numbers(load_data(data), devices="all", **run)
    if run["stream"]:
        arrays["rows"] = np.stack([rows for rows in Recorded.rows if rows.ndim == 2])
    np.savez(f"{out}.{name}.npz", **arrays)


def train_into(workdirs, data, config, checkpoint_every="4steps", kill_at=None):
    """Train into each folder; in the last one, at a step, be asked to stop."""
    loaded = load_data(data)
    config = TrainConfig(**config)
    options = RunOptions(checkpoint_every=checkpoint_every)
    train = loop.Trainer.train

    def killed(trainer):
        for report in train(trainer):
            if trainer.step == kill_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield report

    for workdir in workdirs:
        is_last = workdir == workdirs[-1]
        with contextlib.ExitStack() as stack:
            stack.enter_context(with_small_model())
            if kill_at is not None and is_last:
                stack.enter_context(mock.patch.object(loop.Trainer, "train", killed))
            try:
                run = run_lib.train(config, loaded, workdir=workdir, options=options)
            except interrupt.Interrupted as interrupted:
                print(interrupted, flush=True)
                return
    print(f"done, loss {run.results['train_loss']}", flush=True)


def measure(data, axes):
    """Measure a data set that all processes share out; print how far it is from one."""
    images = load_data(data).train.images[:160] / np.float32(255)
    model = Small()
    variables = jax.device_get(model.init(jax.random.key(0), images[:2], train=False))
    mesh = jax.make_mesh((4,), ("data",), (getattr(AxisType, axes),))

    def put(array, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        part = functools.partial(operator.getitem, array)
        return jax.make_array_from_callback(array.shape, sharding, part)

    shared = jax.tree.map(lambda leaf: put(np.asarray(leaf)), variables)
    for mode in ("layerwise", "one_pass"):
        of_mode = functools.partial(exact_statistics, batch_size=40, mode=mode)
        got = of_mode(model, shared, put(images, "data"))
        expected = of_mode(model, variables, images)
        got = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), got)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    print("measured as by one process", flush=True)


def meet():
    """Meet the others, and have a word with them."""
    any_is_1 = distributed.any_process(jax.process_index() == 1)
    said = distributed.on_primary(lambda: f"from {jax.process_index()}".encode())
    print(
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices, {any_is_1}, "
        f"{said.decode()}",
        flush=True,
    )


def fail_on_primary(error):
    """Fail where process 0 alone works."""

    def function():
        raise OSError(error)

    distributed.on_primary(function)


PROGRAMS = {
    function.__name__: function
    for function in (
        train_one,
        train_into,
        measure,
        meet,
        fail_on_primary,
    )
}


def main(*, program, cache, join=True, address=None, count=None, index=None, **rest):
    jax.config.update("jax_num_cpu_devices", LOCAL_DEVICES)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    seconds = {name: rest.pop(name) for name in ("start_seconds",) if name in rest}
    if join:
        try:
            distributed.initialize(address, count, index, **seconds)
        except distributed.DistributedError as error:
            sys.exit(f"error: {error}")
    PROGRAMS[program](**rest)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(**json.loads(sys.argv[1]))
