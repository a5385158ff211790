import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from bn_jax import BatchNormParams, BatchNormState, batch_norm
from bn_jax.averages import CountedState
from bn_jax.transforms import NORMS
from bn_jax.variants.renorm import batch_renorm, limits
from marks import rounding_of_plain_code
from reference import normal

X = normal((16, 3), mean=1.0, std=2.0)
PARAMS = BatchNormParams(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, -3.0]))
STATE = BatchNormState(jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0]))
COUNTED = CountedState(*STATE, jnp.float32(3))


def averages(state):
    return BatchNormState(state.mean, state.var)


def loss(y):
    return jnp.sum(jnp.sin(jnp.arange(1.0, y.size + 1).reshape(y.shape) * y / y.size))


def test_without_room_for_a_correction_it_is_batch_norm():
    renorm = functools.partial(batch_renorm, r_max=1, d_max=0)
    y, state = renorm(X, PARAMS, COUNTED, train=True)
    expected = batch_norm(X, PARAMS, STATE, train=True)
    chex.assert_trees_all_close((y, averages(state)), expected, rtol=1e-6)
    gradients = [
        jax.grad(lambda x, f=f, s=s: loss(f(x, PARAMS, s, train=True)[0]))(X)
        for f, s in ((renorm, COUNTED), (batch_norm, STATE))
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5)


def test_without_limits_training_gives_what_prediction_gives():
    y, state = batch_renorm(X, PARAMS, COUNTED, train=True, r_max=1e6, d_max=1e6)
    predicted, same = batch_renorm(X, PARAMS, COUNTED, train=False, r_max=1, d_max=0)
    np.testing.assert_allclose(y, predicted, rtol=1e-4, atol=1e-5)
    assert same is COUNTED
    moved = batch_norm(X, PARAMS, STATE, train=True)[1]
    chex.assert_trees_all_close(state, CountedState(*moved, 4.0))


@pytest.mark.parametrize("scale", [None, PARAMS.scale])
@pytest.mark.parametrize("bias", [None, PARAMS.bias])
def test_is_the_papers_formula_between_the_limits(scale, bias):
    r_max, d_max = 1.5, 0.6
    params = BatchNormParams(scale, bias)
    y, _ = batch_renorm(X, params, COUNTED, train=True, r_max=r_max, d_max=d_max)
    batch = reference.moments(X)
    sigma = np.sqrt(np.float64(STATE.var) + 1e-5)
    r = np.clip(np.sqrt(batch.var + 1e-5) / sigma, 1 / r_max, r_max)
    d = np.clip((batch.mean - np.float64(STATE.mean)) / sigma, -d_max, d_max)
    assert (np.abs(d) == d_max).any() and (np.abs(d) < d_max).any()
    assert (r == r_max).any() and (r < r_max).any()
    x_hat = reference.standardised(X, batch.mean, batch.var) * r + d
    expected = x_hat * (1 if scale is None else scale) + (0 if bias is None else bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_through_the_corrections():
    def y(x):
        return batch_renorm(x, PARAMS, COUNTED, train=True, r_max=2.0, d_max=2.0)[0]

    # With r and d constants, dy / dx is batch norm's with scale gamma r.
    sigma = np.sqrt(np.float64(STATE.var) + 1e-5)
    r = np.clip(np.sqrt(reference.moments(X).var + 1e-5) / sigma, 0.5, 2)
    g = np.float64(jax.grad(loss)(y(X)))
    expected, _, _ = reference.batch_norm_vjp(X, g, np.float64(PARAMS.scale) * r)
    gradient = jax.grad(lambda x: loss(y(x)))(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_devices_share_the_corrections(devices):
    x = normal((8, 4, 3), mean=1.0)
    renorm = functools.partial(batch_renorm, train=True, r_max=1.5, d_max=0.5)
    step = jax.pmap(
        lambda x: renorm(x, PARAMS, COUNTED, axis_name="d"),
        axis_name="d",
        devices=devices,
    )
    y, state = jax.device_get(step(x))
    big_y, big_state = renorm(x.reshape(32, 3), PARAMS, COUNTED)
    chex.assert_trees_all_close(y.reshape(32, 3), big_y, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[3], state), big_state, rtol=1e-5
    )


def test_batch_that_counts_nothing_is_normalised_by_the_averages():
    y, state = batch_renorm(
        X, PARAMS, COUNTED, train=True, r_max=3, d_max=5, weights=jnp.zeros(16)
    )
    predicted, _ = batch_norm(X, PARAMS, STATE, train=False)
    chex.assert_trees_all_close((y, state), (predicted, COUNTED))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("update", [None, True, False])
def test_averages_move_when_told_whatever_normalises(train, update):
    renorm = functools.partial(batch_renorm, X, PARAMS, COUNTED, r_max=1.5, d_max=0.6)
    y, state = renorm(train=train, update_state=update)
    chex.assert_trees_all_equal(y, renorm(train=train)[0])
    if train if update is None else update:
        moved = batch_norm(X, PARAMS, STATE, train=True)[1]
        chex.assert_trees_all_close(state, CountedState(*moved, 4.0))
    else:
        assert state is COUNTED


def test_schedule_is_the_papers():
    # Batch norm to step 5,000; r_max 3 at 40,000 and d_max 5 at 25,000, linearly.
    for step, expected in {
        0: (1, 0),
        5_000: (1, 0),
        15_000: (1 + 2 * 10 / 35, 2.5),
        25_000: (1 + 2 * 20 / 35, 5),
        40_000: (3, 5),
        10**6: (3, 5),
    }.items():
        np.testing.assert_allclose(limits(step), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"r_max": 0.5}, "r_max=0.5.*at least 1"),
        ({"r_max": jnp.float32(0.5)}, "r_max=0.5.*at least 1"),
        ({"r_max": np.nan}, "r_max=nan.*at least 1"),
        ({"d_max": -1}, "d_max=-1.*0 or greater"),
        ({"d_max": np.array(-1)}, "d_max=-1.*0 or greater"),
        ({"start": 5, "r_end": 0}, "r_end=0 is before start=5; give the step"),
        ({"start": 5, "r_end": 9, "d_end": 4}, "d_end=4 is before start=5"),
        ({"start": 2**24 + 1}, "start=16777217 is never reached.* 16777216 or earlier"),
        ({"r_end": 2**25}, "r_end=33554432 is never reached"),
        ({"d_end": 2**25}, "d_end=33554432 is never reached"),
    ],
)
def test_limits_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        batch_renorm(X, PARAMS, COUNTED, train=True, **bad)


@pytest.mark.parametrize("end", [3, None])
def test_ramp_of_no_length_is_a_jump(end):
    at = functools.partial(limits, start=3, r_end=end, d_end=end, r_max=2.0, d_max=4.0)
    chex.assert_trees_all_equal([at(t) for t in (0, 2)], [(1.0, 0.0)] * 2)
    chex.assert_trees_all_equal([at(t) for t in (3, 4)], [(2.0, 4.0)] * 2)


@pytest.mark.parametrize("end", [1, 3])
def test_infinite_limits_are_batch_norm_until_they_begin_and_then_none(end):
    schedule = {"start": 1, "r_end": end, "d_end": end}
    at = functools.partial(limits, r_max=np.inf, d_max=np.inf, **schedule)
    chex.assert_trees_all_equal([at(0), at(2)], [(1.0, 0.0), (np.inf, np.inf)])
    renorm = functools.partial(
        batch_renorm, X, PARAMS, r_max=np.inf, d_max=np.inf, train=True, **schedule
    )
    y, _ = renorm(COUNTED._replace(count=jnp.float32(0)))
    plain, _ = batch_norm(X, PARAMS, STATE, train=True)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    y, _ = renorm(COUNTED)
    predicted, _ = batch_norm(X, PARAMS, STATE, train=False)
    np.testing.assert_allclose(y, predicted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "at"),
    [
        # As in CrossQ: 100,000 steps of batch norm, then the limits at once.
        ("renorm:start=100000", {99_999: (1, 0), 100_000: (3, 5), 10**6: (3, 5)}),
        # One limit rises, the other jumps.
        ("renorm:start=2,r_end=6", {1: (1, 0), 2: (1, 5), 4: (2, 5), 6: (3, 5)}),
    ],
)
def test_warm_up_as_batch_norm_ends_in_a_jump_or_a_ramp(spec, at):
    transform = NORMS.make(spec)
    step = jax.jit(functools.partial(transform.apply, train=True))
    for count, (r_max, d_max) in at.items():
        state = COUNTED._replace(count=jnp.float32(count))
        got = step(X, PARAMS, state)
        expected = batch_renorm(X, PARAMS, state, train=True, r_max=r_max, d_max=d_max)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
        assert got[1].count == count + 1


@pytest.mark.parametrize(
    ("params", "jit"),
    [(PARAMS, jax.jit), (BatchNormParams(None, None), lambda f: f)],
    ids=["affine, jit", "plain, eager"],
)
def test_before_its_start_it_is_batch_norm_to_the_bit_and_then_jumps(params, jit):
    def of(norm, state):
        def outcome(x, params):
            y, new = norm(x, params, state, train=True)
            return loss(y), (y, averages(new))

        differentiate = jax.value_and_grad(outcome, argnums=(0, 1), has_aux=True)
        return jit(differentiate)(X, params)

    plain = of(batch_norm, STATE)
    for start, count in {100_000: 99_999, 1: 0, 10**7: 9_999_999}.items():
        renorm = functools.partial(batch_renorm, start=start)
        before = of(renorm, COUNTED._replace(count=jnp.float32(count)))
        tolerance = rounding_of_plain_code()
        chex.assert_trees_all_close(before, plain, rtol=tolerance, atol=tolerance)
        (_, (y, moved)), _ = of(renorm, COUNTED._replace(count=jnp.float32(start)))
        at_once, _ = batch_renorm(X, params, COUNTED, train=True)
        np.testing.assert_allclose(y, at_once, rtol=1e-5, atol=1e-6)
        assert np.abs(y - plain[0][1][0]).max() > 0.1
        chex.assert_trees_all_close(moved, plain[0][1][1], rtol=1e-6)


def test_schedule_follows_the_batches_that_were_counted():
    # From batch norm at step 1 to no correction left out at step 3.
    schedule = {"start": 1, "r_end": 3, "d_end": 3, "r_max": 3.0, "d_max": 4.0}
    state = COUNTED._replace(count=jnp.float32(0))
    for step in range(5):
        r_max, d_max = limits(step, **schedule)
        expected = batch_renorm(X, PARAMS, state, train=True, r_max=r_max, d_max=d_max)
        y, state = batch_renorm(X, PARAMS, state, train=True, **schedule)
        chex.assert_trees_all_close((y, state), expected, rtol=1e-6)
        assert state.count == step + 1


def test_given_statistics_normalise_without_a_correction():
    y, state = batch_renorm(X, PARAMS, COUNTED, train=True, statistics=STATE)
    expected, _ = batch_norm(X, PARAMS, STATE, train=False)
    chex.assert_trees_all_close(y, expected)
    assert state.count == 4
