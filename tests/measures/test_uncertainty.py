import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.linen import BatchNorm
from bn_jax.measures.population import exact_statistics
from bn_jax.measures.uncertainty import monte_carlo_batch_norm
from reference import normal

KEY = jax.random.key(0)
TRAIN = normal((30, 4), mean=5.0, std=3.0, seed=1)
TEST = normal((6, 4), mean=5.0, std=3.0, seed=2)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Dense(5)(x)))
        return nn.Dense(3)(norm()(x))


MODEL = Model()
VARIABLES = jax.jit(functools.partial(MODEL.init, train=False))(KEY, TRAIN)


def predict(variables, x):
    return MODEL.apply(variables, x, train=False)


def eager_passes(key=KEY, num_passes=8, batch_size=10):
    return monte_carlo_batch_norm(
        predict,
        VARIABLES,
        TEST,
        TRAIN,
        key,
        num_passes=num_passes,
        batch_size=batch_size,
    )


passes = jax.jit(eager_passes, static_argnames=("num_passes", "batch_size"))


def test_batches_of_the_whole_training_set_predict_by_exact_statistics():
    exact = exact_statistics(predict, VARIABLES, TRAIN, batch_size=30)
    expected = jax.jit(predict)({**VARIABLES, "batch_stats": exact}, TEST)
    for outputs in passes(num_passes=3, batch_size=30):
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_each_pass_has_a_batch_of_its_own_and_the_key_decides():
    first = np.asarray(passes(KEY))
    assert first.shape == (8, 6, 3)
    assert len({float(outputs[0, 0]) for outputs in first}) == 8
    np.testing.assert_array_equal(first, passes(KEY))
    assert not np.array_equal(first, passes(jax.random.key(9)))


def test_spread_shrinks_with_the_batch_size():
    small, large = (
        np.std(passes(batch_size=n, num_passes=40), axis=0).mean() for n in (5, 25)
    )
    assert large < small / 2


def test_prediction_compiles():
    np.testing.assert_allclose(passes(KEY), eager_passes(KEY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_passes", "batch_size"), [(0, 5), (3, 0), (3, 31)])
def test_no_pass_or_a_batch_that_cannot_be_drawn_is_refused(num_passes, batch_size):
    with pytest.raises(ValueError, match=f"num_passes={num_passes}.*{batch_size}"):
        eager_passes(num_passes=num_passes, batch_size=batch_size)
