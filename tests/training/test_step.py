"""The pure step, the compiled loop of them, the order of examples, evaluation."""

import functools
import itertools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bn_jax.training import evaluation, feed, loop, parallel
from bn_jax.training.config import TrainConfig
from bn_jax.training.feed import Batch
from bn_jax.training.loop import Metrics
from bn_jax.training.optimizers import make_optimizer
from bn_jax.training.state import Network, init_state
from marks import slow_but


class Linear(nn.Module):
    """Logits linear in the pixels, so that gradients can be written by hand."""

    @nn.compact
    def __call__(self, x, train):
        del train
        return nn.Dense(10, use_bias=False, name="dense")(x.reshape(len(x), -1))


make_train_step = functools.partial(loop.make_train_step, TrainConfig())


def test_step_is_gradient_descent_on_the_cross_entropy(tiny_data):
    batch = Batch(*map(jnp.asarray, tiny_data.test))
    network, optimizer = Network(Linear(), (28, 28, 1)), optax.sgd(0.1)
    state = init_state(network.init(jax.random.key(0)), optimizer)
    new, metrics = jax.jit(make_train_step(network, optimizer))(state, batch)
    # d loss / d W = x^T (softmax(x W) - onehot) / N.
    x = np.asarray(batch.images, np.float64).reshape(37, -1) / 255
    w = np.asarray(state.params["dense"]["kernel"], np.float64)
    p = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
    onehot = np.eye(10)[np.asarray(batch.labels)]
    expected = w - 0.1 * x.T @ (p - onehot) / 37
    np.testing.assert_allclose(new.params["dense"]["kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(metrics.loss, -np.log(p[onehot > 0]).mean(), rtol=1e-5)
    assert float(metrics.accuracy) == pytest.approx(
        (p.argmax(1) == np.asarray(batch.labels)).mean()
    )
    assert int(new.step) == 1


@pytest.mark.parametrize(("num_examples", "steps"), [(23, 4), (20, 4), (5, 1)])
def test_epoch_takes_each_example_at_most_once(num_examples, steps):
    epoch_order = jax.jit(
        functools.partial(feed.epoch_order, num_examples=num_examples, batch_size=5)
    )
    for seed in range(3):
        order = epoch_order(jax.random.key(seed))
        chex.assert_shape(order, (steps, 5))
        taken = np.asarray(order).ravel()
        assert len(set(taken)) == 5 * steps and set(taken) <= set(range(num_examples))


order_of_20 = jax.jit(
    functools.partial(feed.epoch_order, num_examples=20, batch_size=4)
)


def test_key_decides_the_order():
    first = order_of_20(jax.random.key(0))
    np.testing.assert_array_equal(order_of_20(jax.random.key(0)), first)
    assert not np.array_equal(order_of_20(jax.random.key(1)), first)


def run(train_step, state, source, start, stop, unasked=1):
    """Take steps as training does, compiled, the bounds no part of the program."""
    pace = parallel.Pace(8, unasked)
    run_steps = jax.jit(functools.partial(loop.run_steps, train_step, pace=pace))
    return run_steps(state, source, np.int32(start), np.int32(stop))


@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_steps_take_their_batches_with_images_and_labels_together(kind):
    data = Batch(np.arange(20) * 10, np.arange(20))
    order = np.asarray(order_of_20(jax.random.key(0)))
    source = feed.Stored(data, order)
    if kind == "streamed":
        source = feed.Streamed(jax.tree.map(lambda leaf: leaf[order], data))

    def count(state, batch):
        seen, together = state
        together &= jnp.all(batch.images == 10 * batch.labels)
        seen = seen.at[batch.labels].add(1.0)
        return Counts(seen, together), Metrics(batch.labels[0], batch.labels[3])

    state = Counts(np.zeros(20, np.float32), np.bool_(True))
    state, metrics = run(count, state, source, 1, 4)
    assert bool(state.together)
    expected = np.zeros(20)
    expected[order[1:4].ravel()] = 1
    np.testing.assert_array_equal(state.params, expected)
    assert metrics.loss.tolist() == [*order[1:4, 0].tolist(), 0, 0, 0, 0, 0]
    assert metrics.accuracy.tolist() == [*order[1:4, 3].tolist(), 0, 0, 0, 0, 0]


class Counts(NamedTuple):
    """A state whose parameters count how often an example was taken."""

    params: jax.Array
    together: jax.Array


@pytest.fixture(scope="module")
def linear():
    """A step of SGD with momentum, its first state, and the source of its batches."""
    network, optimizer = Network(Linear(), (4, 4, 1)), optax.sgd(0.1, momentum=0.9)
    variables = network.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    data = Batch(
        jnp.asarray(rng.integers(0, 256, (70, 4, 4, 1), dtype=np.uint8)),
        jnp.asarray(np.arange(70) % 10),
    )
    order = jnp.asarray(rng.permutation(70).reshape(7, 10))
    train_step = make_train_step(network, optimizer)
    return train_step, init_state(variables, optimizer), feed.Stored(data, order)


@pytest.mark.parametrize(
    ("cuts", "unasked"),
    slow_but(
        [([0, 3, 7], 3)],
        itertools.product(
            ([0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 7], [0, 6, 7], [0, 2, 2, 5, 7]),
            (1, 3, 7, 8),
        ),
    ),
)
def test_steps_in_several_calls_give_the_bits_of_one_call(linear, cuts, unasked):
    train_step, state, source = linear
    whole, of_whole = run(train_step, state, source, 0, 7)
    losses = []
    for start, stop in itertools.pairwise(cuts):
        state, metrics = run(train_step, state, source, start, stop, unasked)
        assert not np.any(metrics.loss[stop - start :])
        losses += metrics.loss[: stop - start].tolist()
    chex.assert_trees_all_equal(state, whole)
    assert int(state.step) == 7
    assert losses == of_whole.loss[:7].tolist()


def test_bounds_are_no_part_of_the_program(linear):
    train_step, state, source = linear

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run_steps(state, source, start, stop):
        return loop.run_steps(
            train_step, state, source, start, stop, pace=parallel.Pace(8)
        )

    for start, stop in ((0, 7), (2, 5), (6, 6)):
        run_steps(state, source, np.int32(start), np.int32(stop))


@pytest.mark.parametrize("unasked", [1, 2, 8])
@pytest.mark.parametrize("fault", ["loss", "params"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_steps_end_before_the_first_that_is_not_finite(fault, value, unasked):
    def add(state, batch):
        broken = batch.labels[0] == 13
        loss, params = jnp.asarray(1.0), state.params + batch.labels[0]
        if fault == "loss":
            loss = jnp.where(broken, value, loss)
        else:
            params = params.at[1].set(jnp.where(broken, value, params[1]))
        return Counts(params, state.together), Metrics(loss, jnp.asarray(0.5))

    batches = Batch(np.zeros((5, 1)), np.array([[10], [11], [12], [13], [14]]))
    state = Counts(np.zeros(2, np.float32), np.bool_(True))
    state, metrics = run(add, state, feed.Streamed(batches), 1, 5, unasked)
    # Steps 1 and 2 add 11 and 12; step 3 leaves its metrics, step 4 nothing.
    assert state.params.tolist() == [23, 23]
    of_fault = value if fault == "loss" else 1.0
    np.testing.assert_array_equal(metrics.loss, [1, 1, of_fault, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(metrics.accuracy, [0.5] * 3 + [0] * 5)


def test_mean_over_devices_is_one_collective(linear):
    _, state, source = linear
    network, optimizer = Network(Linear(), (4, 4, 1)), optax.sgd(0.1, momentum=0.9)
    for axis_name, expected in ((None, 0), ("data", 1)):
        train_step = make_train_step(network, optimizer, axis_name=axis_name)
        jaxpr = jax.make_jaxpr(train_step, axis_env=[("data", 2)])(
            state, source.batch(0)
        )
        assert (
            len(re.findall(r"= (psum|all_reduce|pmean)\w*\[", str(jaxpr))) == expected
        )


def test_step_on_parts_of_a_batch_is_the_step_on_the_whole(linear):
    whole_step, state, source = linear
    train_step = make_train_step(
        Network(Linear(), (4, 4, 1)), optax.sgd(0.1, momentum=0.9), axis_name="data"
    )
    batch = source.batch(0)
    parts = jax.tree.map(lambda leaf: leaf.reshape(2, 5, *leaf.shape[1:]), batch)
    mapped = jax.jit(jax.vmap(train_step, in_axes=(None, 0), axis_name="data"))
    of_parts, expected = mapped(state, parts), jax.jit(whole_step)(state, batch)
    twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), expected)
    chex.assert_trees_all_close(of_parts, twice, rtol=1e-5, atol=1e-6)


def test_evaluation_leaves_out_what_does_not_count(tiny_data):
    batch = Batch(*tiny_data.test)
    network = Network(Linear(), (28, 28, 1))
    variables = network.init(jax.random.key(1))
    counts = np.arange(36) % 3 != 0
    evaluate = jax.jit(functools.partial(evaluation.evaluate, network.predict))
    batches = jax.tree.map(lambda leaf: leaf[:36].reshape(4, 9, *leaf.shape[1:]), batch)
    sums = evaluate(variables, batches, counts.reshape(4, 9))
    predict = jax.jit(network.predict)
    logits = np.asarray(predict(variables, batch.images), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    counted, labels = np.flatnonzero(counts), batch.labels
    np.testing.assert_allclose(
        sums.loss, -log_p[counted, labels[counted]].sum(), rtol=1e-5
    )
    assert int(sums.correct) == (logits.argmax(1) == labels)[counted].sum()


def updates(config, steps):
    """The updates of a parameter whose gradient is 2 at each step."""
    optimizer = make_optimizer(config, steps_per_epoch=2)
    gradient, param = jnp.asarray(2.0), jnp.asarray(1.0)

    def update_once(state, _):
        update, state = optimizer.update(gradient, state, param)
        return state, update

    def updated():
        return jax.lax.scan(update_once, optimizer.init(param), length=steps)[1]

    return jax.jit(updated)().tolist()


def test_optimizers_and_schedules_are_what_their_names_say():
    config = functools.partial(TrainConfig, epochs=2, learning_rate=0.5)
    assert updates(config(), 2) == [-1.0, -1.0]
    # Heavy ball: the second step adds 0.9 of the first.
    assert updates(config(optimizer="sgd:momentum=0.9"), 2) == pytest.approx(
        [-1.0, -1.9]
    )
    # Adam's first steps on a constant gradient have the size of the rate.
    assert updates(config(optimizer="adam"), 2) == pytest.approx([-0.5] * 2, rel=1e-4)
    # A cosine over 4 steps: rates .5 (1 + cos(pi t / 4)) / 2.
    cosine = [-(1 + np.cos(np.pi * t / 4)) / 2 for t in range(5)]
    assert updates(config(schedule="cosine"), 5) == pytest.approx(cosine, abs=1e-6)


def test_smoothing_is_in_the_loss_of_training_alone(linear):
    _, state, source = linear
    network, optimizer = Network(Linear(), (4, 4, 1)), optax.sgd(0.1, momentum=0.9)
    batch = source.batch(0)
    step = jax.jit(
        loop.make_train_step(TrainConfig(label_smoothing=0.3), network, optimizer)
    )
    plain = jax.jit(make_train_step(network, optimizer))
    (_, smooth), (_, sharp) = step(state, batch), plain(state, batch)
    predict = jax.jit(network.predict)
    logits = np.asarray(predict(state.variables, batch.images), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    of_label = log_p[np.arange(10), np.asarray(batch.labels)]
    expected = -(0.7 * of_label + 0.3 * log_p.mean(1)).mean()
    np.testing.assert_allclose(smooth.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sharp.loss, -of_label.mean(), rtol=1e-5)
    assert smooth.accuracy == sharp.accuracy
