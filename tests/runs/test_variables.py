"""A run that starts from variables that the user passes in."""

import dataclasses
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bn_jax.nnx
from bn_jax import convert, data, runs
from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.runs.interrupt import Interrupted
from bn_jax.runs.json_files import RunError
from bn_jax.training import loop, own_models
from bn_jax.training.config import RunOptions, TrainConfig

CONFIG = TrainConfig(epochs=1, learning_rate=0.1, batch_size=30)
OPTIONS = RunOptions(devices=1, checkpoint_every="2steps")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="dense")(x.reshape(len(x), -1))
        x = BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(10, name="head")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(28 * 28, 4, rngs=rngs)
        self.norm = bn_jax.nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.dense(x.reshape(len(x), -1))))


def made(seed=7):
    """Variables of the model in NumPy, the norm's as PyTorch would hand them over."""
    images = np.zeros((1, 28, 28, 1), np.float32)
    drawn = jax.jit(Net().init, static_argnums=2)(jax.random.key(seed), images, False)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn)
    of_torch = {
        "weight": np.full(4, 2.0),
        "bias": np.zeros(4),
        "running_mean": np.full(4, 0.5),
        "running_var": np.full(4, 3.0),
    }
    params, state, _ = convert.from_torch(of_torch)
    variables["params"]["norm"] = params._asdict()
    variables["batch_stats"]["norm"] = state._asdict()
    return variables


def start_of(variables, tiny_data, config=CONFIG, model=None):
    """The variables before the first step."""
    model = Net() if model is None else model
    named = own_models.named(config, model)
    named, start = own_models.starting_from(named, model, variables)
    trainer = loop.Trainer(named, tiny_data, model=model, start=start)
    return trainer.state().variables


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """A run from such variables, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(tiny_data, folder), folder


def train(tiny_data, folder, variables=None, config=CONFIG):
    variables = made() if variables is None else variables
    return runs.train(
        config,
        tiny_data,
        model=Net(),
        variables=variables,
        workdir=folder,
        options=OPTIONS,
    )


def test_training_starts_from_the_variables(tiny_data):
    start = start_of(made(), tiny_data)
    chex.assert_trees_all_equal(start, jax.tree.map(np.float32, made()))
    fresh = dataclasses.replace(CONFIG, init_statistics="fresh")
    stats = start_of(made(), tiny_data, fresh)["batch_stats"]
    np.testing.assert_array_equal(stats["norm"]["mean"], np.zeros(4))


class Pair(nnx.Variable):
    pass


class Nested(NnxNet):
    """Holds an integer, and several arrays in one variable."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.pair = Pair((jnp.ones(2), jnp.asarray(3)))


def test_made_nnx_module_starts_from_all_that_it_holds(tiny_data):
    module = Nested(nnx.Rngs(1))
    module.norm.mean[...] = jnp.arange(4.0)
    start = start_of(None, tiny_data, model=module)
    np.testing.assert_array_equal(start["batch_stats"]["norm"]["mean"], np.arange(4))
    np.testing.assert_array_equal(start["batch_stats"]["pair"][1], 3)
    half = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.bfloat16),
        start_of(None, tiny_data, model=module),
    )
    with pytest.raises(ConfigError, match="batch_stats/pair/1 has dtype bfloat16, not"):
        start_of(half, tiny_data, model=Nested)


def test_model_by_name_starts_from_variables_too(tiny_data, tmp_path):
    config = dataclasses.replace(CONFIG, model="mlp:widths=4")
    run = runs.train(config, tiny_data, workdir=tmp_path / "first", options=OPTIONS)
    again = runs.train(
        config,
        tiny_data,
        variables=run.variables,
        workdir=tmp_path / "second",
        options=OPTIONS,
    )
    assert again.metrics[0]["loss"] < run.metrics[0]["loss"]


@pytest.mark.slow
def test_variables_in_a_train_state_or_in_nnx_are_taken(tiny_data):
    module = NnxNet(nnx.Rngs(3))
    expected = start_of(None, tiny_data, model=module)
    for given in (module, nnx.state(module)):
        start = start_of(given, tiny_data, model=NnxNet)
        chex.assert_trees_all_equal(start, expected)


def test_stopped_run_resumes_with_its_variables_alone(
    whole, tiny_data, tmp_path, signal_at, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(4, signal.SIGTERM, patch)
        train(tiny_data, tmp_path)
    message = "another config .init_from: 'variables:crc32=.*give the variables, or the"
    with pytest.raises(RunError, match=message):
        train(tiny_data, tmp_path, made(seed=8))
    with pytest.raises(RunError, match="another config .init_from: 'variables:crc32="):
        runs.train(CONFIG, tiny_data, model=Net(), workdir=tmp_path, options=OPTIONS)
    chex.assert_trees_all_equal(
        train(tiny_data, tmp_path).variables, whole[0].variables
    )


def test_finished_run_is_read_with_its_variables_alone(whole, tiny_data):
    run, folder = whole
    assert run.config.init_from.startswith("variables:crc32=")
    again = runs.train_or_load(
        CONFIG, tiny_data, model=Net(), variables=made(), workdir=folder
    )
    chex.assert_trees_all_equal(again.variables, run.variables)
    with pytest.raises(RunError, match="holds another run .init_from: 'variables:"):
        runs.train_or_load(
            CONFIG, tiny_data, model=Net(), variables=made(8), workdir=folder
        )
    loaded = runs.load(folder, model=Net())
    assert loaded.config == run.config
    with pytest.raises(ConfigError, match="pass them again as variables=..."):
        runs.train(loaded.config, tiny_data, model=Net(), workdir=folder)
    with pytest.raises(
        ConfigError, match="in the config, and variables with the check"
    ):
        train(tiny_data, folder, made(8), loaded.config)


def changed(**changes):
    variables = made()
    for path, value in changes.items():
        *parents, name = path.split("__")
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            del node[name]
        else:
            node[name] = value
    return variables


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            changed(params__head=None),
            "params/head/bias is missing; params/head/kernel ",
        ),
        (changed(params__more={"scale": np.ones(2)}), "params/more/scale is unknown"),
        (changed(params__norm__scale=np.ones(3)), r"scale has shape \[3\], not \[4\]"),
        (changed(params__norm__scale=np.ones(4) * 1j), "has dtype complex128, not flo"),
        (changed(batch_stats=None), "batch_stats/norm/mean is missing"),
        (changed(cache={"index": 1}), "variables hold cache; expected params and"),
        (made()["params"], "variables are a mapping of dense, .*; expected those"),
        ([1.0], "variables are a list; expected those"),
    ],
)
def test_variables_of_something_else_are_refused_before_anything_is_written(
    variables, message, tiny_data, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        train(tiny_data, tmp_path / "new", variables)
    assert not (tmp_path / "new").exists()


def test_variables_beside_a_run_to_start_from_are_refused(tiny_data, tmp_path):
    config = dataclasses.replace(CONFIG, init_from=str(tmp_path))
    with pytest.raises(ConfigError, match="together with variables .* one of them"):
        train(tiny_data, tmp_path / "new", config=config)


def test_run_of_a_made_nnx_module_is_not_resumed_from_other_values(tiny_data, tmp_path):
    module, other = NnxNet(nnx.Rngs(0)), NnxNet(nnx.Rngs(1))
    run = runs.train(CONFIG, tiny_data, model=module, workdir=tmp_path, options=OPTIONS)
    again = runs.train_or_load(CONFIG, tiny_data, model=module, workdir=tmp_path)
    chex.assert_trees_all_equal(again.variables, run.variables)
    with pytest.raises(RunError, match="holds another run .init_from: 'variables:"):
        runs.train_or_load(CONFIG, tiny_data, model=other, workdir=tmp_path)


def test_run_of_arrays_is_not_resumed_with_others(tiny_data, tmp_path):
    config = dataclasses.replace(CONFIG, model="mlp:widths=4")
    first, changed = (np.array(tiny_data.train.images) for _ in range(2))
    changed[0] = 255 - changed[0]

    def of(images):
        train = data.Split(images, np.int64(tiny_data.train.labels))
        return data.ImageData(train=train, test=tiny_data.test)

    run = runs.train(config, of(first), workdir=tmp_path, options=OPTIONS)
    again = runs.train_or_load(config, of(first), workdir=tmp_path)
    assert again.results == run.results
    with pytest.raises(RunError, match="holds another run .data: '170 . 37 images, ar"):
        runs.train_or_load(config, of(changed), workdir=tmp_path)
