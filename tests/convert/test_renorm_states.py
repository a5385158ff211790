"""The BatchRenorm of SBX, CrossQ and PureJaxQL, whose entries are written by hand."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bn_jax.linen
from bn_jax import convert, init
from bn_jax.convert import BatchNormLayer
from bn_jax.convert.renorm import (
    RenormOptions,
    from_batch_renorm,
    to_batch_renorm,
)
from convert_trainer import LAYER, TOLERANCE, C, batches

LIBRARIES = {"sbx": 100_000, "crossq": 100_000, "purejaxql": 1_000}


def entries(**changes):
    """The variables of a layer as its first step leaves them: limits are integers."""
    params = {"scale": LAYER.params.scale, "bias": LAYER.params.bias}
    batch_stats = {"mean": LAYER.state.mean, "var": LAYER.state.var}
    batch_stats |= {"r_max": 3, "d_max": 5, "steps": jnp.int32(7)}
    return {"params": params, "batch_stats": batch_stats | changes}


def renorm(library, options, **attributes):
    """The constructor of our layer that goes on as the library's."""
    made = convert.DEFAULTS[library]._asdict() | options._asdict()
    return bn_jax.linen.norm("renorm", options=made, **attributes)


@pytest.mark.parametrize(("library", "start"), LIBRARIES.items())
def test_entries_become_a_layer_and_the_options_it_goes_on_with(library, start):
    layer, options = from_batch_renorm(library, entries())
    chex.assert_trees_all_equal(layer[:2], LAYER[:2])
    assert layer.num_batches == 7
    assert options == (start, 3, 5)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("limits", [(3, 5), (2.5, 0.1), (math.inf, math.inf)])
def test_there_and_back_is_the_same_to_the_bit(library, limits):
    r_max, d_max = map(np.float32, limits)
    given = jax.tree.map(np.asarray, entries(r_max=r_max, d_max=d_max))
    layer, options = from_batch_renorm(library, given)
    written = to_batch_renorm(library, layer, options)
    chex.assert_trees_all_equal_structs(written, given)
    jax.tree.map(np.testing.assert_array_equal, written, given)
    assert written["batch_stats"]["steps"].dtype == np.int32
    again = from_batch_renorm(library, written)
    chex.assert_trees_all_equal(again, (layer, options))


def test_limits_are_written_as_the_integers_they_are_there():
    stats = to_batch_renorm("sbx", LAYER)["batch_stats"]
    assert (stats["r_max"], stats["d_max"], stats["steps"]) == (3, 5, 3)
    assert stats["r_max"].dtype == stats["d_max"].dtype == np.int32


def test_nothing_is_shared_in_memory():
    given = entries(mean=np.zeros(C, np.float32))
    layer, _ = from_batch_renorm("sbx", given)
    given["batch_stats"]["mean"] += 1
    assert layer.state.mean.tolist() == [0] * C
    written = to_batch_renorm("sbx", layer)
    written["batch_stats"]["mean"] += 1
    assert layer.state.mean.tolist() == [0] * C


@pytest.mark.parametrize("options", [{"scale": False}, {"scale": False, "bias": False}])
def test_what_a_layer_lacks_stays_absent(options):
    bare = BatchNormLayer(*init(C, **options), num_batches=1)
    written = to_batch_renorm("sbx", bare)
    assert len(written.get("params", {})) == 2 - len(options)
    back, _ = from_batch_renorm("sbx", written, like=bare)
    chex.assert_trees_all_equal(back, bare)


@pytest.mark.parametrize("library", LIBRARIES)
def test_our_module_goes_on_with_averages_count_and_predictions(library):
    """mean <- m mean + (1 - m) batch's, and so var, as these libraries do."""
    layer, options = from_batch_renorm(library, entries())
    momentum, epsilon = convert.DEFAULTS[library]
    module = renorm(library, options)()
    variables = jax.tree.map(jnp.asarray, convert.to_flax(layer, count=True))
    (batch,) = batches((16, C), 1)
    x = np.float64(batch.x)
    y, updates = module.apply(variables, batch.x, False, mutable=["batch_stats"])
    # Of step 7: batch norm.
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + epsilon)
    scale, bias = map(np.float64, LAYER.params)
    np.testing.assert_allclose(y, expected * scale + bias, **TOLERANCE)

    variables = {**variables, **updates}
    after, _ = from_batch_renorm(
        library, to_batch_renorm(library, convert.from_flax(variables), options)
    )
    assert after.num_batches == 8
    for name in ("mean", "var"):
        old = np.float64(getattr(LAYER.state, name))
        moved = momentum * old + (1 - momentum) * getattr(x, name)(0)
        np.testing.assert_allclose(getattr(after.state, name), moved, rtol=1e-5)
    predicted = module.apply(variables, batch.x, True)
    expected = (x - np.float64(after.state.mean)) / np.sqrt(
        np.float64(after.state.var) + epsilon
    )
    np.testing.assert_allclose(predicted, expected * scale + bias, **TOLERANCE)


@pytest.mark.parametrize("steps", [999, 1_000])
def test_the_warm_up_ends_at_the_step_where_theirs_ends(steps):
    layer, options = from_batch_renorm("purejaxql", entries(steps=steps))
    variables = jax.tree.map(jnp.asarray, convert.to_flax(layer, count=True))
    (batch,) = batches((16, C), 1)

    def output(options):
        module = renorm("purejaxql", options)()
        return module.apply(variables, batch.x, False, mutable=["batch_stats"])[0]

    at_once, plain = output(options._replace(start=0)), output(RenormOptions(10**6))
    assert np.abs(at_once - plain).max() > 0.1
    expected = at_once if steps == 1_000 else plain
    np.testing.assert_allclose(output(options), expected, **TOLERANCE)


def test_an_ensemble_of_critics_is_converted_with_its_axis_of_members():
    class Critic(nn.Module):
        norm: object

        @nn.compact
        def __call__(self, x):
            return self.norm(use_running_average=False, name="BatchRenorm_0")(x)

    axes = {"params": 0, "batch_stats": 0}
    critics = nn.vmap(Critic, axes, {"params": True}, in_axes=None, axis_size=2)
    norm = renorm("crossq", RenormOptions())
    (batch,) = batches((16, C), 1)
    ours = critics(norm).init(jax.random.key(0), batch.x)

    def stacked(leaf):
        return jnp.stack([jnp.asarray(leaf)] * 2)

    theirs = {
        kind: {"BatchRenorm_0": jax.tree.map(stacked, tree)}
        for kind, tree in entries().items()
    }
    theirs["batch_stats"]["BatchRenorm_0"]["mean"] += jnp.array([[0.0], [1.0]])
    names = {"BatchRenorm_0": "norm"}
    layers = convert.layers_from("crossq", theirs, names)
    assert layers["norm"].num_batches == 7
    filled = convert.layers_into("flax", ours, layers, names)
    chex.assert_trees_all_equal_shapes_and_dtypes(filled, ours)
    assert filled["batch_stats"]["BatchRenorm_0"]["count"].tolist() == [7, 7]
    _, updates = critics(norm).apply(filled, batch.x, mutable=["batch_stats"])
    assert updates["batch_stats"]["BatchRenorm_0"]["count"].tolist() == [8, 8]

    read = convert.layers_from("flax", filled, names)
    back = convert.layers_into("crossq", theirs, read, names)
    chex.assert_trees_all_equal(back, theirs)


def test_all_that_does_not_fit_is_named_at_once():
    given = entries(
        var=np.array([1.0, -2.0, 3.0, 4.0]), r_max=0.5, d_max=-1, steps=2.5, count=3
    )
    given["params"] = {"scale": np.array([1.0, np.nan, 1.0, 1.0])}
    with pytest.raises(ValueError) as caught:
        from_batch_renorm("crossq", given)
    message = str(caught.value)
    for words in [
        "expected for crossq: params/<layer>/scale",
        "missing.*: params/bias",
        "extra.*: batch_stats/count",
        "batch_stats/var has the value -2.0",
        "batch_stats/r_max is 0.5",
        "batch_stats/d_max is -1",
        "batch_stats/steps is 2.5",
        "params/scale has 1 of 4 values that are not finite",
    ]:
        assert re.search(words, message), words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r_max": np.nan}, "r_max at least 1.*r_max is nan"),
        ({"steps": [7, 7]}, r"steps has shape \[2\], expected \[\]"),
        (
            {"mean": np.zeros([2, C]), "steps": [7, 8]},
            "same scalars in all members.*steps has the values 7, 8",
        ),
        ({"steps": None}, "missing.*batch_stats/steps"),
    ],
)
def test_scalars_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError) as caught:
        from_batch_renorm("sbx", entries(**changes))
    assert re.search(words, str(caught.value), re.DOTALL)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_batch_renorm("torch", {}), "library='torch' has no.*sbx, crossq"),
        (lambda: to_batch_renorm("flax", LAYER), "library='flax' has no"),
        (
            lambda: to_batch_renorm("crossq", LAYER, RenormOptions(start=5)),
            "start=5, but the code of crossq fixes it at 100000; give that",
        ),
        (
            lambda: to_batch_renorm("purejaxql", LAYER, RenormOptions()),
            "start=100000, but the code of purejaxql fixes it at 1000",
        ),
        (
            lambda: to_batch_renorm("sbx", LAYER, RenormOptions(r_max=0.5)),
            "r_max=0.5; expected a number at least 1",
        ),
        (
            lambda: to_batch_renorm("sbx", LAYER, RenormOptions(d_max=-1)),
            "d_max=-1; expected a number 0 or greater",
        ),
        (
            lambda: to_batch_renorm("sbx", LAYER, RenormOptions(start=-1)),
            "start=-1; expected",
        ),
        (
            lambda: to_batch_renorm("sbx", LAYER._replace(num_batches=None)),
            "num_batches is None, but sbx needs",
        ),
        (
            lambda: to_batch_renorm(
                "sbx", LAYER._replace(state=LAYER.state._replace(var=-LAYER.state.var))
            ),
            "var has the value -3.0",
        ),
    ],
)
def test_an_argument_out_of_place_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
