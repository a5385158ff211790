"""Bad input to the core is refused with what was given and what was expected."""

import jax
import jax.numpy as jnp
import pytest

from bn_jax import (
    BatchNormParams,
    BatchNormState,
    Moments,
    batch_norm,
    init,
    measure,
    merge,
    normalize,
    update_average,
)

X = [8, 3]  # shape of a good batch


def call(x=None, features=3, state_dtype=jnp.float32, **options):
    """Call batch_norm with everything right but what is given."""
    params, state = init(features)
    state = BatchNormState(*(a.astype(state_dtype) for a in state))
    x = jnp.ones(X) if x is None else x
    return batch_norm(x, params, state, **{"train": True, **options})


@pytest.mark.parametrize(
    "given,words",
    [
        ({"x": jnp.ones(3)}, [r"\[3\]", "rank 2", r"x\[None\]"]),
        ({"x": jnp.ones(())}, [r"\[\]", "rank 2"]),
        ({"features": 5}, [r"\[5\]", r"\[8, 3\]", r"\[3\] features", r"init\(3\)"]),
        ({"feature_axis": 0}, [r"\[3\]", r"\[8\] features", "feature_axis=0"]),
        ({"feature_axis": 2}, ["feature_axis=2", "rank 2", r"\[-2, 1\]"]),
        ({"feature_axis": -3}, ["feature_axis=-3", r"\[-2, 1\]"]),
        ({"feature_axis": (1, -1)}, [r"\(1, -1\)", "distinct"]),
        ({"feature_axis": 1.0}, ["feature_axis=1.0", "integers", r"\[-2, 1\]"]),
        ({"feature_axis": "C"}, ["feature_axis='C'", "integers"]),
        ({"ghost_batch_size": 2.0}, ["ghost_batch_size=2.0", "positive integer", "8"]),
        ({"ghost_batch_size": 0}, ["ghost_batch_size=0", "positive integer"]),
        ({"ghost_batch_size": 3}, ["=3 does not divide", "drop the last 2"]),
        ({"ghost_batch_size": 16}, ["=16 does not divide", "give a divisor$"]),
        ({"feature_axis": ()}, [r"feature_axis=\(\)", "rank 2"]),
        ({"feature_axis": (0, 1)}, [r"\(0, 1\)", r"\[8, 3\]", "batch axis"]),
        ({"x": jnp.ones((0, 3))}, [r"\[0, 3\]", "empty", "at least one"]),
        ({"x": jnp.ones((2, 0, 3))}, [r"\[2, 0, 3\]", "empty"]),
        ({"epsilon": 0.0}, ["epsilon=0.0", "greater than 0"]),
        ({"epsilon": -1e-5}, ["epsilon=-1e-05", "greater than 0"]),
        ({"epsilon": float("nan")}, ["epsilon=nan", "greater than 0"]),
        ({"epsilon": jnp.float32(-100)}, ["epsilon=-100.0", "greater than 0"]),
        ({"epsilon": None}, ["epsilon=None", "greater than 0"]),
        ({"epsilon": "1e-5"}, ["epsilon='1e-5'", "greater than 0"]),
        ({"momentum": None}, ["momentum=None", "old average"]),
        ({"momentum": 1.5}, ["momentum=1.5", "old average", r"\[0, 1\]"]),
        ({"momentum": -0.1}, ["momentum=-0.1", r"\[0, 1\]"]),
        ({"momentum": float("nan")}, ["momentum=nan", r"\[0, 1\]"]),
        ({"state_dtype": jnp.bfloat16}, ["bfloat16", "float32"]),
        ({"state_dtype": jnp.float16}, ["float16", "float32"]),
        ({"weights": jnp.ones(7)}, [r"\[7\]", r"\[8, 3\]", "expected"]),
        ({"weights": jnp.ones((8, 2))}, [r"\[8, 2\]", r"\[8, 3\]", "expected"]),
        ({"weights": jnp.ones((8, 1, 1))}, [r"\[8, 1, 1\]", r"\[8, 3\]"]),
        ({"weights": jnp.arange(8) - 1.0}, ["non-negative", "-1.0"]),
        ({"weights": jnp.full(8, jnp.nan)}, ["non-negative", "nan"]),
        ({"axis_name": "batch"}, ["'batch'", "not bound", "pmap", "vmap", "shard_map"]),
        ({"axis_name": ("a", "b")}, ["'a'", "not bound"]),
        ({"axis_index_groups": [[0, 1]]}, [r"\[\[0, 1\]\]", "axis_name"]),
    ],
)
def test_training_refuses(given, words):
    with pytest.raises(ValueError) as refusal:
        call(**given)
    for word in words:
        refusal.match(word)


@pytest.mark.parametrize(
    "given,words",
    [
        ({"x": jnp.ones(3)}, [r"\[3\]", "rank 2"]),
        ({"features": 5}, [r"\[5\]", r"\[3\] features"]),
        ({"feature_axis": 2}, ["feature_axis=2", r"\[-2, 1\]"]),
        ({"epsilon": 0.0}, ["epsilon=0.0", "greater than 0"]),
        ({"state_dtype": jnp.bfloat16}, ["bfloat16", "float32"]),
    ],
)
def test_prediction_refuses_what_it_uses(given, words):
    with pytest.raises(ValueError) as refusal:
        call(train=False, **given)
    for word in words:
        refusal.match(word)


def test_prediction_of_an_empty_batch_is_empty():
    assert call(jnp.ones((0, 3)), train=False)[0].shape == (0, 3)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_a_dtype_that_is_not_floating_point_is_refused(dtype, train):
    with pytest.raises(TypeError, match=f"{jnp.dtype(dtype)}.*floating-point"):
        call(jnp.ones(X, dtype), train=train)
    with pytest.raises(TypeError, match="astype"):
        measure(jnp.ones(X, dtype))


def test_a_traced_train_is_refused():
    with pytest.raises(TypeError, match="Python bool.*static_argnames"):
        jax.jit(lambda train: call(train=train))(True)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_parameters_of_the_wrong_shape_are_refused(name):
    params = init(3)[0]._replace(**{name: jnp.ones((1, 3))})
    _, state = init(3)
    for train in (True, False):
        with pytest.raises(ValueError, match=rf"{name} has shape \[1, 3\].*\[3\]"):
            batch_norm(jnp.ones(X), params, state, train=train)


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_of_the_wrong_shape_are_refused(name):
    statistics = {"mean": jnp.zeros(3), "var": jnp.ones(3), name: jnp.ones(1)}
    with pytest.raises(ValueError, match=rf"{name} has shape \[1\].*\[3\]"):
        normalize(jnp.ones(X), **statistics)
    with pytest.raises(ValueError, match=rf"{name} has shape \[1\].*\[3\]"):
        batch_norm(
            jnp.ones(X),
            BatchNormParams(None, None),
            BatchNormState(**statistics),
            train=True,
        )


def test_traced_hyperparameters_and_weights_are_let_through():
    def step(momentum, epsilon, weights):
        return call(momentum=momentum, epsilon=epsilon, weights=weights)[1].mean

    got = jax.jit(step)(0.5, 1e-3, jnp.ones(8))
    assert got.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("num_features", [3.0, -1, (2, -1), "3", None, (), (2, 1.5)])
def test_numbers_of_features_that_are_none_are_refused(num_features):
    with pytest.raises(ValueError, match="num_features=.*expected the number of feat"):
        init(num_features)


PAIR = (jnp.zeros(3), jnp.ones(3))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: call(statistics=PAIR), "statistics is of type tuple.*BatchNormState"),
        (lambda: call(statistics=1.0), "statistics is of type float; expected"),
        (lambda: normalize(jnp.ones(X), *PAIR, PAIR), "params is of type tuple"),
        (lambda: update_average(PAIR, measure(jnp.ones(X))), "state is of type tuple"),
        (lambda: update_average(init(3)[1], PAIR), "moments is of type.*measure"),
        (
            lambda: update_average(BatchNormState([0.0], [1.0]), Moments(1, *PAIR)),
            r"state.mean is a list; expected an array: give jnp.asarray",
        ),
    ],
)
def test_what_is_no_named_tuple_of_arrays_is_refused(refused, message):
    with pytest.raises(TypeError, match=message):
        refused()


def test_moments_of_other_features_are_told_to_be_measured_again():
    x, one = jnp.ones((4, 3)), jnp.ones(1)
    with pytest.raises(ValueError, match=r"^mean has shape \[1\].*measure them of an"):
        normalize(x, one, jnp.ones(3))


def test_statistics_of_other_features_are_not_broadcast():
    one, three = measure(jnp.ones((8, 1))), measure(jnp.ones(X))
    with pytest.raises(ValueError, match=r"means of a \[3\], those of b \[1\] have"):
        merge(three, one)
    with pytest.raises(ValueError, match=r"of state \[3\], those of moments \[1\]"):
        update_average(init(3)[1], one)
