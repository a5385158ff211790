import dataclasses

import chex
import jax
import numpy as np
import pytest

from bn_jax.training import loop
from bn_jax.training.config import ConfigError


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture
def fitted(tiny_config, tiny_data, reports):
    reports.clear()
    return loop.fit(tiny_config, tiny_data, on_epoch=reports.append)


def test_same_config_repeats_bit_for_bit(fitted, tiny_config, tiny_data):
    again = loop.fit(tiny_config, tiny_data)
    chex.assert_trees_all_equal(again.state, fitted.state)
    np.testing.assert_array_equal(again.step_losses, fitted.step_losses)


def test_another_seed_gives_another_start_and_order(fitted, tiny_config, tiny_data):
    other = loop.fit(dataclasses.replace(tiny_config, seed=1), tiny_data)
    assert other.step_losses[0] != fitted.step_losses[0]


def test_history_holds_each_epochs_means(fitted, tiny_config, reports):
    assert reports == fitted.history
    assert [report.epoch for report in reports] == [1, 2]
    assert [report.step for report in reports] == [5, 10]
    by_epoch = fitted.step_losses.reshape(2, 5).mean(1)
    np.testing.assert_allclose([r.loss for r in reports], by_epoch, rtol=1e-6)
    for report in reports:
        assert report.examples_per_second == pytest.approx(150 / report.seconds)
        assert 0 <= report.test_accuracy <= 1


def test_training_learns(tiny_config, tiny_data):
    fitted = loop.fit(dataclasses.replace(tiny_config, epochs=12), tiny_data)
    assert fitted.history[-1].train_accuracy > 0.95
    score = loop.score(fitted.model, fitted.state.variables, tiny_data)
    assert score.test_accuracy_exact > 0.9
    assert score.test_accuracy == pytest.approx(fitted.history[-1].test_accuracy)


def test_ours_and_flaxs_own_agree_step_by_step(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, epochs=4)
    ours = loop.fit(config, tiny_data)
    flax = loop.fit(dataclasses.replace(config, norm="flax"), tiny_data)
    difference = np.abs(ours.step_losses - flax.step_losses)
    assert difference[0] < 1e-5
    assert difference[:20].max() < 1e-3
    assert len(jax.tree.leaves(ours.state.batch_stats)) == 8


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
def test_momentum_of_the_statistics_and_epsilon_reach_the_layers(
    norm, tiny_config, tiny_data
):
    plain = dataclasses.replace(tiny_config, norm=norm, epochs=1)
    other = dataclasses.replace(plain, momentum=0.5, epsilon=1e-2)
    a, b = loop.fit(plain, tiny_data), loop.fit(other, tiny_data)
    same_loss = np.array_equal(a.step_losses, b.step_losses)
    assert same_loss == (norm == "none")


def test_batch_larger_than_the_data_is_refused(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, batch_size=171)
    with pytest.raises(
        ConfigError, match="batch_size=171 .* 170 images; .*at most 170"
    ):
        loop.fit(config, tiny_data)


def test_loss_that_is_not_finite_stops_the_run_and_says_where(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, norm="none", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"at step \d+ .*learning_rate=1e\+38"):
        loop.fit(config, tiny_data)
