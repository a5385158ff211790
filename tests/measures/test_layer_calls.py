import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax import transforms
from bn_jax.folding import fold
from bn_jax.linen import BatchNorm
from bn_jax.measures.gap import gap
from bn_jax.measures.layer_calls import layer_calls
from bn_jax.measures.population import batch_moments, exact_statistics
from bn_jax.measures.uncertainty import monte_carlo_batch_norm
from bn_jax.models.nnx_model import NnxModel
from bn_jax.nnx import BatchNorm as NnxBatchNorm
from bn_jax.nnx import Norm as NnxNorm
from marks import slow_but
from reference import normal

X = normal((24, 3), mean=1.0, std=2.0, seed=1)
LABELS = np.arange(24) % 3


class Net(nn.Module):
    """A layer that is called twice, dropout, and another layer."""

    @nn.compact
    def __call__(self, x, training=False):
        shared = BatchNorm(use_running_average=not training, momentum=0.5)
        x = shared(jnp.tanh(shared(x)))
        x = nn.Dropout(0.5, deterministic=not training)(nn.Dense(3)(x))
        return BatchNorm(use_running_average=not training)(nn.relu(x))


class NnxNet(nnx.Module):
    """Two layers and dropout; ours or Flax's own."""

    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norms = nnx.List([norm(4, momentum=0.0, rngs=rngs)])
        self.last = norm(4, momentum=0.0, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.last(nnx.relu(self.norms[0](self.dense(x)))))


class TrainState(train_state.TrainState):
    batch_stats: Any = None


def test_looking_at_a_model_computes_nothing_but_where_statistics_go():
    computed = []

    def squared(x):
        return jax.pure_callback(
            lambda x: computed.append(x.tolist()) or np.square(x), x, x
        )

    class Squared(nn.Module):
        """Takes its statistics for more than to normalise."""

        @nn.compact
        def __call__(self, x):
            norm = BatchNorm(use_running_average=True)
            x = norm(x)
            return x + squared(norm.variables["batch_stats"]["mean"])

    model = Squared()
    variables = model.init(jax.random.key(0), X)
    computed.clear()
    (call,) = layer_calls(model.apply, variables, X)
    assert call.path == ("BatchNorm_0",)
    assert not computed
    exact = exact_statistics(model, variables, X, batch_size=8)
    np.testing.assert_allclose(exact["BatchNorm_0"]["mean"], X.mean(0), rtol=1e-5)


@functools.cache
def net():
    variables = jax.jit(Net().init)(jax.random.key(0), X)
    return Net(), variables, exact_statistics(Net(), variables, X, batch_size=24)


# Variables of Linen in whatever holds them.


def state_of(variables):
    return TrainState.create(
        apply_fn=Net().apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(0.1),
    )


def predict_by_state(state, x):
    return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x)


@pytest.mark.parametrize(
    ("model", "held_in", "kind"),
    [
        (Net(), freeze, FrozenDict),
        pytest.param(jax.jit(Net().apply), freeze, FrozenDict, marks=pytest.mark.slow),
        pytest.param(Net(), state_of, dict, marks=pytest.mark.slow),
        (jax.jit(predict_by_state), state_of, dict),
    ],
    ids=["module, frozen", "function, frozen", "module, state", "function, state"],
)
def test_variables_of_linen_are_taken_as_they_are_kept(model, held_in, kind):
    _, variables, expected = net()
    got = exact_statistics(model, held_in(variables), X, batch_size=16)
    assert isinstance(got, kind)
    got = got.unfreeze() if kind is FrozenDict else got
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gap_and_uncertainty_take_a_train_state():
    model, variables, _ = net()
    of_state, of_dict = (
        (
            gap(predict, held, X, LABELS, measure_on=X, batch_size=12),
            monte_carlo_batch_norm(
                predict, held, X, X, jax.random.key(0), num_passes=2, batch_size=8
            ),
        )
        for predict, held in (
            (jax.jit(predict_by_state), state_of(variables)),
            (model, variables),
        )
    )
    chex.assert_trees_all_close(of_state, of_dict, rtol=1e-5)


# NNX.


def of_whole_set(model):
    trained = nnx.clone(model)
    trained.train()
    trained(X)
    return nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat))


def split(model):
    """A function of the split state that was compiled and called, and the state."""
    graph, state = nnx.split(model)

    @jax.jit
    def predict(state, x):
        merged = nnx.merge(graph, state)
        merged.eval()
        return merged(x)

    predict(state, X[:8])
    return predict, state


GIVEN = {
    "module": lambda model: (model, None),
    "module and state": lambda model: (model, nnx.state(model)),
    "function of the module": lambda model: (lambda m, x: m(x), model),
    "compiled function of the module": lambda model: (nnx.jit(NnxNet.__call__), model),
    "split state": split,
}
NNX_CASES = [(given, norm) for given in GIVEN for norm in (NnxBatchNorm, nnx.BatchNorm)]


@pytest.mark.parametrize(
    ("given", "norm"),
    slow_but([("module", nnx.BatchNorm), ("split state", NnxBatchNorm)], NNX_CASES),
)
def test_nnx_modules_are_measured(given, norm):
    model = NnxNet(norm, nnx.Rngs(0))
    got = exact_statistics(*GIVEN[given](model), X, batch_size=16)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(got), of_whole_set(model), rtol=2e-5, atol=1e-5
    )
    nnx.update(model, got)
    chex.assert_trees_all_close(model.last.mean[...], got["last"]["mean"][...])


def test_gap_and_uncertainty_of_an_nnx_module():
    model = NnxNet(NnxBatchNorm, nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    report = gap(model, None, X, LABELS, measure_on=[X[:5], X[5:]], batch_size=24)
    assert report.loss["training"] == pytest.approx(report.loss["exact"], rel=1e-4)
    assert report.loss["running"] != pytest.approx(report.loss["exact"], rel=1e-2)
    assert sorted(report.running) == ["last", "norms/0"]
    lines = str(report).splitlines()
    assert lines[0].split() == ["statistics", "loss", "accuracy"]
    assert lines[1].split() == ["training", f"{report.loss['training']:.4f}"] + [
        f"{report.accuracy['training']:.4f}"
    ]
    assert lines[-1].startswith("norms/0") or lines[-2].startswith("norms/0")
    passes = monte_carlo_batch_norm(
        model, None, X, X, jax.random.key(0), num_passes=2, batch_size=24
    )
    np.testing.assert_allclose(passes[0], passes[1], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(
        before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    )


def test_nnx_module_inside_our_models_is_measured():
    model = NnxModel(NnxNet(NnxBatchNorm, nnx.Rngs(0)))
    variables = model.init(jax.random.key(0), X)
    predict = functools.partial(model.apply, train=False)
    got = exact_statistics(predict, variables, X, batch_size=16)
    expected = of_whole_set(NnxNet(NnxBatchNorm, nnx.Rngs(0)))
    np.testing.assert_allclose(
        got["last"]["mean"], expected["last"]["mean"], rtol=2e-5, atol=1e-5
    )


def test_nnx_norm_of_other_statistics_is_refused():
    model = NnxNorm(3, transforms.quantile(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="norm='quantile', predicts by"):
        exact_statistics(model, None, X, batch_size=8)


class Shifted(nn.Module):
    """A module that cannot be hashed."""

    shift: Any

    @nn.compact
    def __call__(self, x):
        return BatchNorm(use_running_average=True)(x + self.shift)


def test_module_that_cannot_be_hashed_is_measured():
    model = Shifted(np.arange(3.0, dtype=np.float32))
    variables = model.init(jax.random.key(0), X)
    got = exact_statistics(model, variables, X, batch_size=24)
    mean = got["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, X.mean(0) + np.arange(3), rtol=1e-5)


# Data.


class Loader:
    """Batches of unequal sizes, anew at each iteration."""

    def __iter__(self):
        return iter([X[:7], jnp.asarray(X[7:20]), X[20:]])


@pytest.mark.parametrize("data", [Loader(), list(Loader())], ids=["loader", "list"])
def test_batches_are_measured_as_one_array(data):
    model, variables, expected = net()
    got = exact_statistics(model, variables, data)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    some = exact_statistics(model, variables, data, num_examples=12)
    expected = exact_statistics(model, variables, X[:12], batch_size=12)
    chex.assert_trees_all_close(some, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (iter([X]), {}, "list_iterator, which can be iterated over only once.*a list"),
        (3, {}, "inputs are a int; expected an array"),
        ([], {}, "no examples to measure"),
        ([(X, LABELS)], {}, "a batch is a tuple; expected an array of inputs alone"),
        ([X], {"batch_size": 8}, "batch_size is given for inputs that are a list"),
        ([X], {"weights": jnp.ones(24)}, "weights is given for inputs that are a list"),
        ([X], {"num_examples": 25}, "num_examples=25, but the batches hold 24"),
        (X, {}, "batch_size is not given for an array of 24 examples"),
    ],
)
def test_data_that_cannot_be_measured_are_refused(data, options, message):
    model, variables, _ = net()
    with pytest.raises(ValueError, match=message):
        exact_statistics(model, variables, data, **options)


@pytest.mark.parametrize("is_set", slow_but([True], [True, False]))
def test_data_on_an_explicit_mesh_are_measured_where_they_are(is_set, devices):
    model, variables, expected = net()
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,), devices=devices)
    sharded = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d")))
    replicated = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        got = exact_statistics(model, replicated, sharded, batch_size=16)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(got)} == {mesh}
    chex.assert_trees_all_close(jax.device_get(got), expected, rtol=1e-5, atol=1e-6)


NO_ARRAYS = (None, 3, "images", [[1.0, 2.0]])


@pytest.mark.parametrize("inputs", NO_ARRAYS, ids=str)
def test_inputs_that_are_no_arrays_are_refused(inputs):
    model, variables, _ = net()
    kind = type(inputs).__name__
    for refused in (
        lambda: gap(model, variables, inputs, LABELS, measure_on=X, batch_size=8),
        lambda: monte_carlo_batch_norm(
            model, variables, inputs, X, jax.random.key(0), num_passes=2, batch_size=8
        ),
        lambda: monte_carlo_batch_norm(
            model, variables, X, inputs, jax.random.key(0), num_passes=2, batch_size=8
        ),
    ):
        with pytest.raises(ValueError, match=f"inputs are a {kind}; expected an array"):
            refused()
    with pytest.raises(ValueError, match="inputs are a .*; expected an array of exam"):
        fold(model, variables, inputs, without_norms=model)
    if not isinstance(inputs, list):  # of which these may be batches
        with pytest.raises(ValueError, match=f"inputs are a {kind}; expected an array"):
            exact_statistics(model, variables, inputs, batch_size=8)


def test_labels_sets_sizes_and_models_that_are_none_are_refused():
    model, variables, _ = net()
    for changes, message in (
        ({"labels": None}, "labels are a NoneType; expected an array"),
        ({"measure_on": None}, "measure_on are a NoneType; expected an array"),
        ({"model": type(model)}, "the model is the class Net; give a module made"),
        ({"batch_size": 8.0}, "batch_size=8.0; expected an integer"),
    ):
        given = {"model": model, "labels": LABELS, "measure_on": X, "batch_size": 8}
        given |= changes
        with pytest.raises(ValueError, match=message):
            gap(given.pop("model"), variables, X, given.pop("labels"), **given)


# What no layer would be found in.

MODEL = NnxNet(NnxBatchNorm, nnx.Rngs(0))
PURE = nnx.to_pure_dict(nnx.state(MODEL))


TOOLS = {
    "layer_calls": lambda v: layer_calls(lambda v, x: x, v, X),
    "batch_moments": lambda v: batch_moments(lambda v, x: x, v, X),
    "exact_statistics": lambda v: exact_statistics(lambda v, x: x, v, X, batch_size=2),
    "gap": lambda v: gap(lambda v, x: x, v, X, LABELS, measure_on=X, batch_size=2),
    "monte_carlo": lambda v: monte_carlo_batch_norm(
        lambda v, x: x, v, X, X, jax.random.key(0), num_passes=2, batch_size=2
    ),
}


@pytest.mark.parametrize(
    ("variables", "given"),
    [(PURE, "a mapping of dense"), ([X], "a list"), (None, "a NoneType")],
    ids=["dict", "list", "none"],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_what_are_no_variables_is_refused_in_words(tool, variables, given):
    with pytest.raises(ValueError, match=f"^variables are {given}.*; expected those"):
        TOOLS[tool](variables)


def test_what_is_no_model_is_refused_in_words():
    _, variables, _ = net()
    with pytest.raises(
        ValueError, match="the model is a ArrayImpl; expected a function"
    ):
        exact_statistics(X, variables, X, batch_size=2)


def test_apply_of_a_module_is_taken_with_a_train_state():
    model, variables, expected = net()
    state = state_of(variables)
    got = exact_statistics(state.apply_fn, state, X, batch_size=24)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_function_that_takes_no_train_state_is_refused_with_what_it_takes():
    _, variables, _ = net()
    with pytest.raises(ValueError, match='not take a TrainState.*"params": state.para'):
        gap(
            jax.jit(Net().apply),
            state_of(variables),
            X,
            LABELS,
            measure_on=X,
            batch_size=12,
        )
    plain = train_state.TrainState.create(
        apply_fn=Net().apply, params=variables["params"], tx=optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match="TrainState without batch_stats .give"):
        exact_statistics(plain.apply_fn, plain, X, batch_size=24)


class Counter(nnx.Variable):
    pass


class NnxTrain(nnx.Module):
    """Told by `train` what to do; it holds a variable of another kind, too."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(3, 4, rngs=rngs), NnxBatchNorm(4, momentum=0.0, rngs=rngs)]
        )
        self.factor = Counter(jnp.ones(()))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train):
        dense, norm = self.layers
        x = norm(dense(x), use_running_average=not train) * self.factor[...]
        return self.dropout(x, deterministic=not train)


def test_nnx_module_that_is_told_by_train_is_measured():
    model = NnxTrain(nnx.Rngs(0))
    got = exact_statistics(model, None, X, batch_size=24)
    dense = model.layers[0](jnp.asarray(X))
    np.testing.assert_allclose(got["layers"][1]["mean"][...], dense.mean(0), rtol=1e-5)


def test_nnx_module_takes_the_variables_that_a_run_returns():
    trained = NnxTrain(nnx.Rngs(1))
    trained.layers[1].mean[...] = jnp.arange(4.0)
    trained.factor[...] = jnp.asarray(2.0)
    variables = NnxModel(trained).init(jax.random.key(0), X)
    assert list(variables["params"]["layers"]) == ["0", "1"]  # texts
    fresh = NnxTrain(nnx.Rngs(0))
    by_name, by_module = (
        gap(fresh, given, X, LABELS, measure_on=X, batch_size=12)
        for given in (variables, trained)
    )
    assert by_name == by_module
    assert fresh.layers[1].mean[...].tolist() == [0, 0, 0, 0]  # as it was
    exact = exact_statistics(fresh, variables, X, batch_size=24)
    nnx.update(fresh, exact)


def test_variables_that_do_not_fit_an_nnx_module_are_refused_by_name():
    variables = NnxModel(NnxTrain(nnx.Rngs(1))).init(jax.random.key(0), X)
    of_norm = variables["params"]["layers"].pop("1")
    variables["params"]["more"] = of_norm
    variables["params"]["layers"]["0"]["kernel"] = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="fit the NNX module NnxTrain: ") as refusal:
        exact_statistics(NnxTrain(nnx.Rngs(0)), variables, X, batch_size=24)
    for words in (
        "no params/layers/1/scale",
        "unknown params/more/bias",
        r"params/layers/0/kernel of shape [2, 4], not [3, 4]",
        "nnx.restore_int_paths",
    ):
        assert words in str(refusal.value)


class NnxLifted(nnx.Module):
    """Calls its block by one of NNX's transforms."""

    def __init__(self, lift, rngs):
        self.lift = lift
        self.first = NnxTrain(rngs)
        if lift != "scan":
            self.block = NnxBatchNorm(4, rngs=rngs)
        else:
            make = nnx.vmap(lambda rngs: NnxBatchNorm(4, rngs=rngs), out_axes=0)
            self.block = make(rngs.split(2))

    def __call__(self, x):
        def call(block, x):
            return block(x)

        lifts = {
            "jit": nnx.jit,
            "remat": nnx.remat,
            "scan": nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry),
            "none": lambda call: call,
        }
        x = nnx.jit(NnxTrain.__call__, static_argnums=2)(self.first, x, False)
        return lifts[self.lift](call)(self.block, x)


@pytest.mark.parametrize("lift", slow_but(["scan"], ["jit", "remat", "scan"]))
def test_nnx_modules_that_call_layers_by_nnx_transforms_are_measured(lift):
    model = NnxLifted(lift, nnx.Rngs(0))
    report = gap(model, None, X, LABELS, measure_on=X, batch_size=12)
    assert set(report.running) == {"first/layers/1", "block"}
    if lift != "scan":
        plain = NnxLifted("none", nnx.Rngs(0))
        expected = gap(plain, None, X, LABELS, measure_on=X, batch_size=12)
        chex.assert_trees_all_close(report, expected, rtol=1e-4)


@pytest.mark.parametrize("tool", ["gap", "exact_statistics", "fold"])
@pytest.mark.parametrize("kind", ["linen", "linen, jitted", "nnx"])
def test_functions_in_training_mode_are_refused(kind, tool):
    """By the batch's own statistics, all that is measured would be the same."""

    class TrainsByDefault(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 3, rngs=rngs)
            self.norm = NnxBatchNorm(3, rngs=rngs)

        def __call__(self, x, train=True):
            return self.norm(self.dense(x), use_running_average=not train)

    if kind == "nnx":
        variables = TrainsByDefault(nnx.Rngs(0))

        def predict(module, x):
            return module(x)
    else:
        model = Net()
        variables = jax.jit(model.init)(jax.random.key(0), X)

        def predict(variables, x):
            y, _ = model.apply(
                variables,
                x,
                training=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return y

        predict = jax.jit(predict) if "jitted" in kind else predict
    tools = {
        "gap": lambda: gap(predict, variables, X, LABELS, measure_on=X, batch_size=8),
        "exact_statistics": lambda: exact_statistics(
            predict, variables, X, batch_size=8
        ),
        "fold": lambda: fold(predict, variables, X, without_norms=predict),
    }
    with pytest.raises(ValueError, match="Norm.* normalises by its batch, as in t"):
        tools[tool]()
