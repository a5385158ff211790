import dataclasses
import functools
import re

import chex
import jax
import numpy as np
import pytest

from bn_jax.fields import ConfigError
from bn_jax.training import loop, parallel


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def fitted(tiny_config, tiny_data, reports):
    return loop.fit(tiny_config, tiny_data, on_epoch=reports.append)


def test_same_config_repeats_bit_for_bit(fitted, tiny_config, tiny_data):
    again = loop.fit(tiny_config, tiny_data)
    chex.assert_trees_all_equal(again.state, fitted.state)
    np.testing.assert_array_equal(again.step_losses, fitted.step_losses)


def test_streamed_run_is_the_stored_run_bit_for_bit(fitted, tiny_config, tiny_data):
    # In parts that begin amid an epoch, of 2, 2 and 1 steps.
    streamed = loop.fit(tiny_config, tiny_data, stream=True, checkpoint_steps=2)
    np.testing.assert_array_equal(streamed.step_losses, fitted.step_losses)
    chex.assert_trees_all_equal(streamed.state, fitted.state)
    for ours, theirs in zip(streamed.history, fitted.history, strict=True):
        assert ours[:6] == theirs[:6]  # all but the times


def test_another_seed_gives_another_start_and_order(fitted, tiny_config, tiny_data):
    other = loop.fit(dataclasses.replace(tiny_config, seed=1), tiny_data)
    assert other.step_losses[0] != fitted.step_losses[0]


def test_history_holds_each_epochs_means(fitted, reports):
    assert reports == fitted.history
    assert [report.epoch for report in reports] == [1, 2]
    assert [report.step for report in reports] == [5, 10]
    by_epoch = fitted.step_losses.reshape(2, 5).mean(1)
    np.testing.assert_allclose([r.loss for r in reports], by_epoch, rtol=1e-6)
    for report in reports:
        assert report.examples_per_second == pytest.approx(150 / report.seconds)
        assert 0 <= report.test_accuracy <= 1


@pytest.mark.parametrize("num_devices", [1, 2])
def test_lowered_loop_is_that_of_the_steps(num_devices, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, batch_size=30)
    placement = parallel.place(config, devices=str(num_devices))
    trainer = loop.Trainer(config, tiny_data, placement=placement)
    program = trainer.lower().compile().as_text()
    assert "transpose(jvp(LeNet))/conv1" in program
    assert ("all-reduce" in program) == (num_devices == 2)
    assert trainer.step == 0


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


KINDS = {
    "sgd, stored": ({}, False),
    "momentum, cosine, stored": (
        {"optimizer": "momentum", "schedule": "cosine"},
        False,
    ),
    "adam, streamed": ({"optimizer": "adam", "learning_rate": 0.01}, True),
}


@pytest.fixture(scope="module", params=list(KINDS))
def paused(request, tiny_config, tiny_data):
    """How to make a trainer, one that is finished, and its progress at each step."""
    choices, stream = KINDS[request.param]
    make = functools.partial(
        loop.Trainer,
        dataclasses.replace(tiny_config, **choices),
        tiny_data,
        stream=stream,
        checkpoint_steps=1,
    )
    trainer = make()
    progress = [trainer.progress()]
    progress += [trainer.progress() for _ in trainer.train()]
    return make, trainer, progress


def test_run_goes_on_from_any_pause_bit_for_bit(paused):
    _, trainer, progress = paused
    assert [len(p.step_losses) for p in progress] == list(range(11))
    end = progress[-1]
    for start in progress:
        trainer.restore(start)
        reports = [report.epoch for report in trainer.train() if report is not None]
        assert reports == [1, 2][len(start.history) :]
        assert_same(trainer.progress(), end)


def test_new_trainer_goes_on_bit_for_bit(paused):
    make, _, progress = paused
    trainer = make()
    trainer.restore(progress[3])
    assert_same(trainer.progress(), progress[3])
    assert (trainer.step, trainer.last_loss) == (3, progress[3].step_losses[-1])
    for _ in trainer.train():
        pass
    assert_same(trainer.progress(), progress[-1])


def assert_same(a, b):
    """Two runs have become the same, but for the times that they took."""
    chex.assert_trees_all_equal(a.state, b.state, strict=True)
    np.testing.assert_array_equal(a.step_losses, b.step_losses)
    np.testing.assert_array_equal(a.step_accuracies, b.step_accuracies)
    assert [report[:6] for report in a.history] == [report[:6] for report in b.history]


def test_time_of_an_epoch_adds_up_over_its_parts(paused):
    _, trainer, progress = paused
    seconds = [p.seconds for p in progress]
    assert seconds[0] == seconds[5] == seconds[10] == 0  # epochs begin anew
    for of_epoch in (seconds[:5], seconds[5:10]):
        assert of_epoch == sorted(set(of_epoch))
    assert seconds[4] < progress[5].history[0].seconds
    trainer.restore(progress[3]._replace(seconds=1000.0))
    report = next(report for report in trainer.train() if report is not None)
    assert 1000 < report.seconds < 1100


@pytest.mark.parametrize("rule", ["exact", "first"])
def test_progress_of_more_devices_is_merged_by_rule(rule, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, merged_stats=rule)
    trainer = loop.Trainer(config, tiny_data)
    progress = trainer.progress()
    mean = np.float32([[0.0] * 6, [4.0] * 6])
    var = np.float32([[1.0] * 6, [2.0] * 6])
    two = jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0), progress.state.batch_stats)
    two["norm1"] = {**two["norm1"], "mean": mean, "var": var}
    trainer.restore(progress._replace(state=progress.state.replace(batch_stats=two)))
    # Two halves with means 0 and 4 vary by 4 about their own, 2, besides by 1.5.
    expected = {"exact": (2.0, 1.5 + 4.0), "first": (0.0, 1.0)}[rule]
    norm1 = trainer.state().batch_stats["norm1"]
    np.testing.assert_allclose(norm1["mean"], [expected[0]] * 6)
    np.testing.assert_allclose(norm1["var"], [expected[1]] * 6)
    chex.assert_trees_all_equal(
        trainer.state().batch_stats["norm2"],
        jax.tree.map(lambda leaf: leaf[0], progress.state.batch_stats["norm2"]),
    )


def test_progress_of_one_device_is_copied_to_each_of_many(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, batch_stats="per_device")
    placement = parallel.place(config, devices="3")
    trainer = loop.Trainer(config, tiny_data, placement=placement)
    one = loop.Trainer(config, tiny_data).progress()
    trainer.restore(one)
    three = jax.tree.map(lambda leaf: np.repeat(leaf, 3, 0), one.state.batch_stats)
    chex.assert_trees_all_equal(trainer.progress().state.batch_stats, three)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("stream", [False, True])
def test_rate_that_is_too_great_ends_the_run_before_the_step(
    stream, tiny_config, tiny_data
):
    config = dataclasses.replace(tiny_config, norm="none", learning_rate=1e38)
    trainer = loop.Trainer(config, tiny_data, stream=stream)
    with pytest.raises(FloatingPointError) as raised:
        list(trainer.train())
    step = trainer.step
    message = str(raised.value)
    assert f"not finite at step {step + 1} (learning_rate=1e+38): " in message
    assert re.search(r"those of \w+;|but not the loss that they make;", message)
    assert message.endswith("; try a smaller --learning_rate")
    progress = trainer.progress()
    assert 1 <= step == progress.state.step == len(progress.step_losses)
    assert all_finite((progress.state, progress.step_losses))


@pytest.fixture(scope="module")
def broken(tiny_config, tiny_data):
    """Trains to the end from a first state in which one number is another."""
    config = dataclasses.replace(tiny_config, schedule="cosine", learning_rate=0.5)
    trainer = loop.Trainer(config, tiny_data)
    first = trainer.progress()

    def train(group, layer, name, value):
        # A copy, as on CPU devices may share the host's memory.
        state = jax.tree.map(np.array, first.state)
        getattr(state, group)[layer][name].flat[1] = value
        trainer.restore(first._replace(state=state))
        list(trainer.train())

    return train


@pytest.mark.parametrize("layer", ["conv1", "norm1", "conv2", "dense2", "dense3"])
def test_first_layer_that_is_not_finite_is_named(layer, broken):
    name = "scale" if layer.startswith("norm") else "kernel"
    message = (
        r"(the loss is|parameters are) not finite at step 1 "
        r"\(learning_rate=0\.5\): the first "
        f"activations that are not finite are those of {layer}; try a smaller"
    )
    with pytest.raises(FloatingPointError, match=message):
        broken("params", layer, name, np.inf)


def test_test_loss_that_is_not_finite_ends_the_run(broken):
    # Training does not use the moving averages, prediction does.
    message = r"loss on the test set is not finite after epoch 1 .*--learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        broken("batch_stats", "norm2", "mean", np.nan)
