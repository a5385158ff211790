import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bn_jax.training import step as step_lib
from bn_jax.training.config import TrainConfig
from bn_jax.training.loop import on_device
from bn_jax.training.state import (
    init_state,
    init_variables,
    make_model,
    make_optimizer,
)
from bn_jax.training.step import Batch, Metrics


class Linear(nn.Module):
    """Logits linear in the pixels, so that gradients can be written by hand."""

    @nn.compact
    def __call__(self, x, train):
        del train
        return nn.Dense(10, use_bias=False, name="dense")(x.reshape(len(x), -1))


def test_step_is_gradient_descent_on_the_cross_entropy(tiny_data):
    batch = Batch(*on_device(tiny_data.test))
    model, optimizer = Linear(), optax.sgd(0.1)
    variables = init_variables(model, jax.random.key(0), (28, 28, 1))
    state = init_state(variables, optimizer)
    new, metrics = step_lib.make_train_step(model, optimizer)(state, batch)
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


def test_epoch_takes_each_example_once_and_drops_the_remainder():
    data = Batch(jnp.arange(23)[:, None], jnp.arange(23))

    def count(seen, batch):
        chex.assert_shape(batch.labels, (5,))
        np.testing.assert_array_equal(batch.images.shape, (5, 1))
        return seen.at[batch.labels].add(1), Metrics(batch.labels[0], batch.labels[-1])

    for seed in range(3):
        seen, metrics = step_lib.train_epoch(
            count, jnp.zeros(23, int), data, jax.random.key(seed), batch_size=5
        )
        assert sorted(seen.tolist()) == [0] * 3 + [1] * 20
        chex.assert_shape(metrics.loss, (4,))


def test_images_and_labels_stay_together_and_the_key_decides_their_order():
    data = Batch(jnp.arange(20) * 10, jnp.arange(20))

    def first_labels(key):
        def check(state, batch):
            together = jnp.all(batch.images == 10 * batch.labels)
            return state & together, Metrics(batch.labels[0], batch.labels[1])

        together, metrics = step_lib.train_epoch(
            check, jnp.asarray(True), data, key, batch_size=4
        )
        assert bool(together)
        return metrics.loss.tolist()

    assert first_labels(jax.random.key(0)) == first_labels(jax.random.key(0))
    assert first_labels(jax.random.key(0)) != first_labels(jax.random.key(1))


@pytest.mark.parametrize("batch_size", [37, 10, 100, 1])
def test_evaluation_counts_every_example_once_whatever_the_batch_size(
    tiny_data, batch_size
):
    batch = on_device(tiny_data.test)
    model = Linear()
    variables = init_variables(model, jax.random.key(1), (28, 28, 1))
    logits = np.asarray(step_lib.predict(model, variables, batch.images), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = np.asarray(batch.labels)
    evaluate = jax.jit(
        functools.partial(step_lib.evaluate, model, batch_size=batch_size)
    )
    metrics = evaluate(variables, batch)
    np.testing.assert_allclose(
        metrics.loss, -log_p[np.arange(37), labels].mean(), rtol=1e-5
    )
    assert float(metrics.accuracy) == pytest.approx(
        (logits.argmax(1) == labels).mean(), abs=1e-6
    )


def test_evaluation_does_not_move_statistics_or_depend_on_the_other_images(tiny_data):
    model = make_model(TrainConfig(), num_classes=10)
    variables = init_variables(model, jax.random.key(1), (28, 28, 1))
    batch = on_device(tiny_data.test)
    logits = step_lib.predict(model, variables, batch.images)
    alone = step_lib.predict(model, variables, batch.images[5:6])
    np.testing.assert_allclose(alone[0], logits[5], atol=1e-5)


def updates(config, steps):
    """The updates of a parameter whose gradient is 2 at each step."""
    optimizer = make_optimizer(config, steps_per_epoch=2)
    state, taken = optimizer.init(jnp.ones(())), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.asarray(2.0), state, jnp.ones(()))
        taken.append(float(update))
    return taken


def test_optimizers_and_schedules_are_what_their_names_say():
    config = functools.partial(TrainConfig, epochs=2, learning_rate=0.5)
    assert updates(config(), 2) == [-1.0, -1.0]
    # Heavy ball: the second step adds 0.9 of the first.
    assert updates(config(optimizer="momentum"), 2) == pytest.approx([-1.0, -1.9])
    # Adam's first steps on a constant gradient have the size of the rate.
    assert updates(config(optimizer="adam"), 2) == pytest.approx([-0.5] * 2, rel=1e-4)
    # A cosine over 4 steps: rates .5 (1 + cos(pi t / 4)) / 2.
    cosine = [-(1 + np.cos(np.pi * t / 4)) / 2 for t in range(5)]
    assert updates(config(schedule="cosine"), 5) == pytest.approx(cosine, abs=1e-6)
