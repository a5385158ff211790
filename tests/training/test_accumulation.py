"""Gradient accumulation, and the average of the weights."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bn_jax.fields import ConfigError
from bn_jax.linen import BatchNorm
from bn_jax.training import loop, parallel
from bn_jax.training.config import TrainConfig
from bn_jax.training.feed import Batch
from bn_jax.training.state import Network, init_state
from marks import slow_but
from small_runs import trained

N, PARTS = 24, 3


class Small(nn.Module):
    """A dense layer with batch norm between the pixels and the logits."""

    ghost_batch_size: int | None = None
    momentum: float = 0.7

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5, name="dense")(x.reshape(len(x), -1))
        x = BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            ghost_batch_size=self.ghost_batch_size,
            name="norm",
        )(x)
        return nn.Dense(10, name="head")(jnp.tanh(x))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 4, 4, 1), dtype=np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(np.arange(N) % 10))


class Linear(nn.Module):
    """Logits linear in the pixels."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(x.reshape(len(x), -1))


@functools.cache  # several tests take the same steps
def start_and_step(model, **options):
    """The first state, and the compiled step."""
    network, optimizer = Network(model, (4, 4, 1)), optax.sgd(0.5)
    variables = network.init(jax.random.key(1))
    state = init_state(variables, optimizer, averages="average_weights" in options)
    config = TrainConfig(batch_size=N, **options)
    train_step = loop.make_train_step(config, network, optimizer)
    return state, jax.jit(train_step)


def after_steps(batch, num_steps=3, model=None, **options):
    state, step = start_and_step(model or Small(), **options)
    states = [state]
    for _ in range(num_steps):
        state, metrics = step(state, batch)
        states.append(state)
    return states, metrics


def by_parts(batch):
    """The batch with the micro-batches one after another, as ghost batches are cut."""
    order = np.concatenate([np.arange(j, N, PARTS) for j in range(PARTS)])
    return jax.tree.map(lambda x: x[order], batch)


def test_once_is_ghost_batch_norm_on_the_whole_batch(batch):
    """Each part is normalised by itself, and the moments of all move the averages."""
    accumulated, metrics = after_steps(batch, accumulate=PARTS, accumulate_stats="once")
    ghost, expected = after_steps(
        by_parts(batch), model=Small(ghost_batch_size=N // PARTS)
    )
    chex.assert_trees_all_close(accumulated[-1], ghost[-1], atol=2e-6)
    chex.assert_trees_all_close(metrics, expected, atol=1e-6)


@pytest.mark.parametrize("momentum", slow_but([0.0], [0.0, 0.9, 1.0]))
def test_once_holds_at_the_ends_of_momentum(batch, momentum):
    accumulated, _ = after_steps(
        batch,
        model=Small(momentum=momentum),
        accumulate=PARTS,
        accumulate_stats="once",
    )
    ghost, _ = after_steps(by_parts(batch), model=Small(N // PARTS, momentum=momentum))
    chex.assert_trees_all_close(
        accumulated[-1].batch_stats, ghost[-1].batch_stats, atol=2e-6
    )


def test_each_moves_the_averages_by_one_micro_batch_after_another(batch):
    states, _ = after_steps(batch, num_steps=1, accumulate=PARTS)
    x = np.asarray(batch.images, np.float64).reshape(N, -1) / 255
    dense = states[0].params["dense"]
    h = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"])
    mean, var = np.zeros(5), np.ones(5)
    for j in range(PARTS):
        part = h[j::PARTS]
        mean = 0.7 * mean + 0.3 * part.mean(0)
        var = 0.7 * var + 0.3 * part.var(0)
    stats = states[1].batch_stats["norm"]
    np.testing.assert_allclose(stats["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, atol=1e-6)
    # The same gradients as with "once": the averages take no part in them.
    once, _ = after_steps(batch, num_steps=1, accumulate=PARTS, accumulate_stats="once")
    chex.assert_trees_all_close(states[1].params, once[1].params, atol=1e-7)


def test_without_norm_accumulation_changes_nothing_but_rounding(batch):
    whole, of_whole = after_steps(batch, model=Linear())
    parts, of_parts = after_steps(batch, model=Linear(), accumulate=PARTS)
    chex.assert_trees_all_close(whole[-1].params, parts[-1].params, atol=1e-6)
    chex.assert_trees_all_close(of_whole, of_parts, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel_by", ["pmap", "jit"])
def test_devices_accumulate_as_one_does(parallel_by, tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config,
        model="mlp:widths=8",
        batch_size=32,
        accumulate=4,
        accumulate_stats="once",
    )
    found = []
    for devices in ("1", "2"):
        placement = parallel.place(config, devices=devices, parallel=parallel_by)
        trainer = loop.Trainer(
            config, tiny_data, placement=placement, checkpoint_steps=4
        )
        next(trainer.train())
        assert trainer.step == 4
        found.append(trainer.state())
    chex.assert_trees_all_close(
        found[0].variables, found[1].variables, atol=2e-4, rtol=1e-3
    )


def test_statistics_that_cannot_be_merged_are_refused(tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config,
        model="mlp:widths=8",
        norm="whitening:max_group_size=4",
        accumulate=2,
        accumulate_stats="once",
    )
    with pytest.raises(ConfigError, match="accumulate_stats='once'.*give .*='each'"):
        loop.Trainer(config, tiny_data)


def test_accumulation_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ConfigError, match="accumulate=3 does not divide batch_size=8"):
        TrainConfig(batch_size=8, accumulate=3)
    config = TrainConfig(batch_size=24, accumulate=12)
    with pytest.raises(ConfigError, match="accumulate=12 does not divide the 3 images"):
        parallel.place(config, devices="8")


def test_average_of_the_weights_is_that_of_all_steps_free_of_the_start(batch):
    states, _ = after_steps(batch, num_steps=4, average_weights=0.8)
    kernels = [np.asarray(s.params["head"]["kernel"], np.float64) for s in states[1:]]
    weights = 0.8 ** np.arange(3, -1, -1)
    expected = sum(w * k for w, k in zip(weights, kernels, strict=True)) / weights.sum()
    np.testing.assert_allclose(
        states[-1].average["head"]["kernel"], expected, atol=1e-6
    )
    assert states[0].average["head"]["kernel"].shape == expected.shape


def test_average_changes_no_number_of_the_training(batch):
    plain, _ = after_steps(batch)
    averaged, _ = after_steps(batch, average_weights=0.8)
    chex.assert_trees_all_equal(plain[-1].variables, averaged[-1].variables)
    assert plain[-1].average == {}


@pytest.mark.slow
def test_average_is_scored_with_statistics_of_its_own(tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config, model="mlp:widths=8", epochs=1, average_weights=0.9
    )
    trainer = trained(config, tiny_data)
    score, progress = trainer.score(), trainer.progress()
    swapped = progress.state.replace(params=progress.state.average)
    trainer.restore(progress._replace(state=swapped))
    of_average = trainer.score()
    assert score.test_loss_averaged == pytest.approx(of_average.test_loss_exact)
    assert score.test_loss_averaged != score.test_loss_exact
    assert score.to_row()["test_accuracy_averaged"] == score.test_accuracy_averaged
