"""A user's own Linen or NNX module, trained as ours are."""

import dataclasses
import functools
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bn_jax.nnx
from bn_jax import plots, runs
from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.runs import same_model
from bn_jax.runs.interrupt import Interrupted
from bn_jax.runs.json_files import RunError
from bn_jax.training import members
from bn_jax.training.config import RunOptions, TrainConfig
from marks import slow_but
from small_runs import trained as trained_to_the_end


class Own(nn.Module):
    """A model that was not written here: other names, other layers."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = nn.BatchNorm(
            use_running_average=not train, axis_name=self.axis_name, name="bn"
        )(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        x = BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


class OwnNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = bn_jax.nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(14 * 14 * 4, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x).reshape(len(x), -1))


@pytest.fixture(scope="module")
def config(tiny_config):
    """Of a model that is passed in: the choice of one of ours is left as it is."""
    return dataclasses.replace(
        tiny_config, model=TrainConfig().model, learning_rate=0.1
    )


MODELS = {"linen": Own, "nnx": lambda: OwnNnx}


# A checkpoint amid an epoch of five steps.
OPTIONS = RunOptions(devices="1", checkpoint_every="2steps")


@pytest.fixture(scope="module")
def trained(config, tiny_data, tmp_path_factory):
    """Gives the run of a model and its folder; each is trained once for this file."""

    @functools.cache
    def trained(kind):
        folder = tmp_path_factory.mktemp(kind)
        model = MODELS[kind]()
        run = runs.train(
            config, tiny_data, model=model, workdir=folder, options=OPTIONS
        )
        return run, folder

    return trained


@pytest.mark.parametrize("kind", slow_but(["linen"], MODELS))
def test_own_module_trains_and_is_read_back(kind, trained, tiny_data):
    run, folder = trained(kind)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert run.config.model == f"own:{'Own' if kind == 'linen' else 'OwnNnx'}"
    again = runs.load(folder, model=MODELS[kind]())
    chex.assert_trees_all_equal(again.variables, run.variables)
    images = tiny_data.test.images[:3]
    np.testing.assert_array_equal(
        jax.jit(again.predict)(images), jax.jit(run.predict)(images)
    )
    assert np.isfinite(run.results["test_loss_exact"])


def test_own_run_is_not_read_without_its_model(trained):
    _, folder = trained("linen")
    with pytest.raises(ConfigError, match="of the class Own; pass one like it"):
        runs.load(folder)
    with pytest.raises(ConfigError, match="of the class Own, and model is of OwnNnx"):
        runs.load(folder, model=OwnNnx)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_stopped_own_run_resumes_bit_for_bit(
    kind, config, trained, tiny_data, tmp_path, signal_at, monkeypatch
):
    train = functools.partial(
        runs.train,
        config,
        tiny_data,
        model=MODELS[kind](),
        workdir=tmp_path,
        options=OPTIONS,
    )
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(4, signal.SIGTERM, patch)
        train()
    whole, _ = trained(kind)
    chex.assert_trees_all_equal(train().variables, whole.variables)


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but(["linen"], MODELS))
def test_own_module_in_a_sweep_trains_as_alone(kind, config, tiny_data, tmp_path):
    model = MODELS[kind]()
    configs = members.parse("learning_rate=0.05,0.1;seed=0..1", config)
    rows = runs.sweep(configs, tiny_data, workdir=tmp_path / "sweep", model=model)
    alone = runs.train(configs[3], tiny_data, model=model, workdir=tmp_path / "alone")
    assert rows[3]["loss"] == pytest.approx(
        [row["loss"] for row in alone.metrics], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "batch_stats", "axis_name"),
    [("jit", "synced", None), ("pmap", "synced", "data")],
)
def test_devices_share_an_own_modules_statistics(
    parallel, batch_stats, axis_name, config, tiny_data, tmp_path
):
    class Still(Own):
        """Without dropout, whose draws depend on the number of devices."""

        @nn.compact
        def __call__(self, x, *, train: bool):
            x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
            norm = nn.BatchNorm(not train, axis_name=self.axis_name)
            return nn.Dense(10)(nn.relu(norm(x)).reshape(len(x), -1))

    config = dataclasses.replace(config, batch_stats=batch_stats, epochs=1)
    one = runs.train(config, tiny_data, model=Still(), workdir=tmp_path / "one")
    two = runs.train(
        config,
        tiny_data,
        model=Still(axis_name),
        workdir=tmp_path / "two",
        options=RunOptions(devices="2", parallel=parallel),
    )
    chex.assert_trees_all_close(one.variables, two.variables, atol=1e-4)


def test_statistics_that_would_not_be_shared_as_asked_are_refused(
    config, tiny_data, tmp_path
):
    two = RunOptions(devices="2")
    with pytest.raises(ConfigError, match="norms with axis_name='data', which .*bn"):
        runs.train(config, tiny_data, model=Own(), workdir=tmp_path, options=two)
    per_device = dataclasses.replace(config, batch_stats="per_device")
    with pytest.raises(ConfigError, match="name an axis, .*bn of .*without axis_name"):
        runs.train(
            per_device, tiny_data, model=Own("data"), workdir=tmp_path, options=two
        )
    one_program = RunOptions(devices="2", parallel="jit")
    with pytest.raises(ConfigError, match="give parallel='pmap'"):
        runs.train(
            per_device, tiny_data, model=Own(), workdir=tmp_path, options=one_program
        )
    with pytest.raises(ConfigError, match="axis_name='data', .*bn.* without axis_name"):
        runs.train(
            config, tiny_data, model=Own("data"), workdir=tmp_path, options=one_program
        )
    assert not list(tmp_path.iterdir())


class SyncedNnx(nnx.Module):
    def __init__(self, axis_name, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norms = nnx.List(
            [
                layer(4, axis_name=axis_name, rngs=rngs)
                for layer in (bn_jax.nnx.BatchNorm, nnx.BatchNorm)
            ]
        )
        self.head = nnx.Linear(14 * 14 * 4, 10, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = norm(x)
        return self.head(nnx.relu(x).reshape(len(x), -1))


def synced(axis_name):
    return functools.partial(SyncedNnx, axis_name)


@pytest.mark.parametrize(
    ("make", "axis_name"),
    slow_but(
        [(Own, "data"), (synced, "batch")],
        [
            (make, axis_name)
            for make in (Own, synced)
            for axis_name in ("data", "batch", ("data", "model"))
        ],
    ),
)
def test_model_that_names_an_axis_trains_on_one_device_as_without_it(
    make, axis_name, config, tiny_data
):
    config = dataclasses.replace(config, epochs=1, accumulate=2)
    without, named = (
        trained_to_the_end(config, tiny_data, model=make(name)).state().variables
        for name in (None, axis_name)
    )
    chex.assert_trees_all_close(named, without, rtol=1e-5, atol=1e-6)


def test_model_that_names_an_axis_trains_in_a_sweep_and_says_where_it_diverged(
    config, tiny_data, tmp_path
):
    config = dataclasses.replace(config, epochs=1)
    configs = members.parse("learning_rate=0.05,0.1", config)
    rows = runs.sweep(configs, tiny_data, workdir=tmp_path / "a", model=Own("data"))
    assert all(np.isfinite(row["loss"]).all() for row in rows)
    diverging = dataclasses.replace(config, learning_rate=1e30)
    for devices in ("1", "2"):
        with pytest.raises(FloatingPointError, match="not finite at step 2.*those of"):
            runs.train(
                diverging,
                tiny_data,
                model=Own("data"),
                workdir=tmp_path / devices,
                options=RunOptions(devices=devices),
            )


def test_nnx_module_shares_its_statistics_over_devices_by_pmap(
    config, tiny_data, tmp_path
):
    config = dataclasses.replace(config, epochs=1)
    one, two = (RunOptions(devices=n) for n in ("1", "2"))
    with pytest.raises(ConfigError, match="axis_name='data', which norms/0, norms/1"):
        runs.train(
            config, tiny_data, model=synced(None), workdir=tmp_path / "2", options=two
        )
    alone, together = (
        runs.train(
            config,
            tiny_data,
            model=synced(axis_name),
            workdir=tmp_path / options.devices,
            options=options,
        )
        for axis_name, options in ((None, one), ("data", two))
    )
    chex.assert_trees_all_close(alone.variables, together.variables, atol=1e-4)


JITTED_NORM = nn.jit(nn.BatchNorm)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x, *, train: bool):
        x = JITTED_NORM(use_running_average=not train, name="bn")(x.mean((1, 2)))
        return nn.Dense(10)(x)


def test_norms_that_nn_jit_has_cached_are_looked_at_all_the_same(
    config, tiny_data, tmp_path
):
    one = RunOptions(devices="1")
    runs.train(config, tiny_data, model=Jitted(), workdir=tmp_path / "1", options=one)
    with pytest.raises(ConfigError, match="norms with axis_name='data', which .*bn"):
        runs.train(
            config,
            tiny_data,
            model=Jitted(),
            workdir=tmp_path / "2",
            options=RunOptions(devices="2"),
        )


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (NoTrain(), {}, r"train"),
        (jnp.tanh, {}, "Linen"),
        (Own(), {"norm": "none"}, "norm='none' together with a model"),
        (Own(), {"precision": "bfloat16"}, "precision='bfloat16' together with"),
        (Own(), {"inputs": "norm"}, "inputs='norm' together with"),
    ],
)
def test_what_does_not_fit_an_own_model_is_refused_before_anything_is_written(
    model, change, message, config, tiny_data, tmp_path
):
    config = dataclasses.replace(config, **change)
    with pytest.raises(ConfigError, match=message):
        runs.train(config, tiny_data, model=model, workdir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_seed_decides_an_nnx_modules_weights_where_it_is_made_for_the_run(
    config, tiny_data, tmp_path
):
    config = dataclasses.replace(config, epochs=1)
    first, again, other = (
        runs.train(
            dataclasses.replace(config, seed=seed),
            tiny_data,
            model=OwnNnx,
            workdir=tmp_path / name,
        )
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    chex.assert_trees_all_equal(first.variables, again.variables)
    assert not np.array_equal(
        first.variables["params"]["head"]["kernel"],
        other.variables["params"]["head"]["kernel"],
    )


@pytest.mark.slow
def test_names_of_ours_are_loaded_without_anything_else(tiny_data, tmp_path):
    config = TrainConfig(
        model="mlp:widths=8,activation=relu", norm="layer", epochs=1, batch_size=30
    )
    run = runs.train(config, tiny_data, workdir=tmp_path)
    again = runs.load(tmp_path)
    images = tiny_data.test.images[:3]
    np.testing.assert_array_equal(again.predict(images), run.predict(images))
    assert again.config == config and jax.tree.leaves(again.variables["params"])


@pytest.mark.slow
def test_sweep_scores_the_average_of_each_member_as_a_run_does(
    config, tiny_data, tmp_path
):
    config = dataclasses.replace(config, average_weights=0.9, epochs=1)
    configs = members.parse("learning_rate=0.05,0.1", config)
    rows = runs.sweep(configs, tiny_data, workdir=tmp_path / "sweep", model=Own())
    alone = runs.train(configs[1], tiny_data, model=Own(), workdir=tmp_path / "alone")
    assert rows[1]["test_loss_averaged"] == pytest.approx(
        alone.results["test_loss_averaged"], rel=1e-4
    )
    with pytest.raises(RunError, match="holds a sweep, not a run"):
        runs.load(tmp_path / "sweep")


def test_gamma_is_what_multiplies_where_it_is_stored_less_an_offset(
    tmp_path, tiny_data
):
    class Offset(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dense(4)(x.reshape(len(x), -1))
            x = BatchNorm(not train, scale_offset=1.0, name="norm")(x)
            return nn.Dense(10)(x)

    config = TrainConfig(epochs=1, learning_rate=0.01, batch_size=30)
    options = RunOptions(devices="1", log="csv")
    run = runs.train(
        config, tiny_data, model=Offset(), workdir=tmp_path / "run", options=options
    )
    gamma = np.float64(run.variables["params"]["norm"]["scale"]) + 1
    assert abs(gamma - 1).max() < 0.5
    np.testing.assert_allclose(run.results["gamma_beta"]["norm"]["gamma"], gamma)
    _, row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    names = (tmp_path / "run" / "metrics.csv").read_text().split("\n")[0].split(",")
    logged = dict(zip(names, row.split(","), strict=True))
    assert float(logged["norm/gamma/mean"]) == pytest.approx(gamma.mean())


class Plain(nn.Module):
    """Whose attributes leave the shapes of its variables as they are."""

    momentum: float = 0.9
    activation: object = nn.relu
    kernel: object = nn.initializers.lecun_normal()
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(5, kernel_init=self.kernel)(x.reshape(len(x), -1))
        x = BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            axis_name=self.axis_name,
        )(x)
        return nn.Dense(10)(self.activation(x))


@pytest.fixture(scope="module")
def plain(config, tiny_data, tmp_path_factory):
    """The folder of a finished run of `Plain`, and of a sweep of two."""
    folder = tmp_path_factory.mktemp("plain")
    runs.train(config, tiny_data, model=Plain(), workdir=folder / "run")
    configs = members.parse("seed=0..1", config)
    runs.sweep(configs, tiny_data, model=Plain(), workdir=folder / "sweep")
    return folder


OTHERS = {
    "momentum": ({"momentum": 0.5}, "in training the model"),
    "activation": (
        {"activation": nn.tanh},
        "in prediction and training the model",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_run_is_not_read_with_a_model_of_other_attributes(other, plain):
    attributes, message = OTHERS[other]
    with pytest.raises(RunError, match=f"holds a run of another Plain: .*{message}"):
        runs.load(plain / "run", model=Plain(**attributes))
    with pytest.raises(RunError, match=message):
        runs.sweeps.load(plain / "sweep", model=Plain(**attributes))
    # Neither where statistics are shared nor initial values matter to what is read.
    for harmless in ({}, {"axis_name": "data"}):
        assert runs.load(plain / "run", model=Plain(**harmless)).metrics


def test_finished_run_of_other_attributes_is_not_taken_for_it(config, tiny_data, plain):
    for attributes in ({"momentum": 0.5}, {"kernel": nn.initializers.ones}):
        with pytest.raises(RunError, match="another Plain"):
            runs.train_or_load(
                config, tiny_data, model=Plain(**attributes), workdir=plain / "run"
            )
    again = runs.train_or_load(config, tiny_data, model=Plain(), workdir=plain / "run")
    assert again.results == runs.load(plain / "run", model=Plain()).results


def test_sweep_of_other_attributes_is_not_taken_for_it(config, tiny_data, plain):
    configs = members.parse("seed=0..1", config)
    sweep = functools.partial(runs.sweep, configs, tiny_data, workdir=plain / "sweep")
    with pytest.raises(RunError, match="another Plain"):
        sweep(model=Plain(momentum=0.5))
    assert len(sweep(model=Plain())) == 2


def test_stopped_run_is_not_resumed_with_other_attributes(
    config, tiny_data, tmp_path, signal_at, monkeypatch
):
    train = functools.partial(
        runs.train, config, tiny_data, workdir=tmp_path / "run", options=OPTIONS
    )
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(4, signal.SIGTERM, patch)
        train(model=Plain())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="another Plain"):
        train(model=Plain(activation=nn.tanh))
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(train(model=Plain()).metrics) == config.epochs


def test_longer_run_starts_from_a_run_of_other_attributes(
    config, tiny_data, plain, tmp_path
):
    """As fine-tuning does: it takes the variables alone."""
    tuned = dataclasses.replace(config, init_from=str(plain / "run"), epochs=1)
    run = runs.train(
        tuned, tiny_data, model=Plain(momentum=0.5), workdir=tmp_path / "tuned"
    )
    assert run.metrics


@pytest.mark.parametrize("change", ["versions", "before"])
def test_run_of_other_versions_is_known_by_class_and_shapes(
    change, plain, tmp_path, monkeypatch
):
    """What they traced may be another program for the same model."""
    real = same_model.json_files.read_object

    def read(path):
        found = real(path)
        if path.name != "environment.json":
            return found
        if change == "versions":
            return {**found, "jax": "0.1"}
        return {name: v for name, v in found.items() if name != same_model.PROGRAMS}

    monkeypatch.setattr(same_model.json_files, "read_object", read)
    assert runs.load(plain / "run", model=Plain(momentum=0.5)).metrics


class Wider(nn.Module):
    """Of the class name that its run has, with other layers."""

    width: int = 5
    name_of_layer: str = "Dense_0"

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(self.width, name=self.name_of_layer)(x.reshape(len(x), -1))
        x = BatchNorm(use_running_average=not train)(x)
        return nn.Dense(10, name="Dense_1")(nn.relu(x))


Wider.__name__ = "Plain"


@pytest.mark.parametrize(
    ("attributes", "fault"),
    [
        ({"width": 4}, r"BatchNorm_0/mean: float32\[5\] there, float32\[4\] now"),
        ({"name_of_layer": "first"}, "no params/first/bias; .* and 1 other"),
    ],
)
def test_variables_that_do_not_fit_the_model_are_named(attributes, fault, plain):
    message = rf"variables are of another model: .*{fault}.*Give the model of the run$"
    with pytest.raises(RunError, match=message):
        runs.load(plain / "run", model=Wider(**attributes))


def test_curves_of_an_own_model_name_no_norm_that_it_may_not_have(
    config, tiny_data, tmp_path, monkeypatch
):
    titles = []
    curves = plots.curves

    def noted(*args, title, **options):
        titles.append(title)
        return curves(*args, title=title, **options)

    monkeypatch.setattr(plots, "curves", noted)
    runs.train(config, tiny_data, model=Plain(), workdir=tmp_path / "run")
    assert titles == ["own:Plain, rate 0.1"]


@pytest.mark.slow
def test_run_of_an_nnx_class_is_read_by_any_instance_of_it(trained):
    run, folder = trained("nnx")
    for model in (OwnNnx, OwnNnx(nnx.Rngs(5))):
        again = runs.load(folder, model=model)
        chex.assert_trees_all_equal(again.variables, run.variables)


def test_norm_that_always_uses_its_batch_has_no_exact_statistics(
    config, tiny_data, tmp_path
):
    class Always(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dense(10)(x.reshape(len(x), -1))
            return BatchNorm(use_running_average=False)(x)

    class ByBatch(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(784, 10, rngs=rngs)
            self.norm = bn_jax.nnx.BatchNorm(10, rngs=rngs)

        def __call__(self, x):
            x = self.dense(x.reshape(len(x), -1))
            return self.norm(x, use_running_average=False)

    class Forgetful(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return BatchNorm()(nn.Dense(10)(x.reshape(len(x), -1)))

    for model in (Forgetful(), Always()):
        with pytest.raises(
            ConfigError, match="cannot be called: .*give its norms use_"
        ):
            runs.train(config, tiny_data, model=model, workdir=tmp_path / "refused")
    run = runs.train(config, tiny_data, model=ByBatch, workdir=tmp_path / "by_batch")
    assert "normalises by its batch" in run.results["exact_refused"]


def test_model_that_needs_more_images_than_two_trains(config, tiny_data, tmp_path):
    class Ghosts(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dense(10)(x.reshape(len(x), -1))
            size = config.batch_size // 2
            return BatchNorm(use_running_average=not train, ghost_batch_size=size)(x)

    runs.train(config, tiny_data, model=Ghosts(), workdir=tmp_path / "run")
    assert runs.load(tmp_path / "run", model=Ghosts()).metrics
