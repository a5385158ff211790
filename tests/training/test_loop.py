import dataclasses
import functools
import re

import chex
import jax
import numpy as np
import pytest

from bn_jax import data as data_lib
from bn_jax.fields import ConfigError
from bn_jax.training import loop, parallel, scoring
from bn_jax.training.evaluation import Evaluator
from marks import slow_but
from small_runs import step_losses, trained


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def ended(tiny_config, tiny_data, reports):
    trainer = loop.Trainer(tiny_config, tiny_data)
    reports += trainer.train()
    return trainer


def test_same_config_repeats_bit_for_bit(ended, tiny_config, tiny_data):
    again = trained(tiny_config, tiny_data)
    assert_same(again.progress(), ended.progress())


def test_streamed_run_is_the_stored_run_bit_for_bit(ended, tiny_config, tiny_data):
    # In parts that begin amid an epoch, of 2, 2 and 1 steps.
    streamed = trained(tiny_config, tiny_data, stream=True, checkpoint_steps=2)
    assert_same(streamed.progress(), ended.progress())


def test_another_seed_gives_another_start_and_order(ended, tiny_config, tiny_data):
    other = step_losses(dataclasses.replace(tiny_config, seed=1), tiny_data)
    assert other[0] != ended.progress().step_losses[0]


def test_history_holds_each_epochs_means(ended, reports):
    assert reports == ended.history
    assert [report.epoch for report in reports] == [1, 2]
    assert [report.step for report in reports] == [5, 10]
    by_epoch = ended.progress().step_losses.reshape(2, 5).mean(1)
    np.testing.assert_allclose([r.loss for r in reports], by_epoch, rtol=1e-6)
    for report in reports:
        assert report.examples_per_second == pytest.approx(150 / report.seconds)
        assert 0 <= report.test_accuracy <= 1


@pytest.mark.parametrize("num_devices", slow_but([2], [1, 2]))
def test_lowered_loop_is_that_of_the_steps(num_devices, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, batch_size=30)
    placement = parallel.place(config, devices=str(num_devices))
    trainer = loop.Trainer(config, tiny_data, placement=placement)
    program = trainer.lower().compile().as_text()
    assert "transpose(jvp(MLP))/dense1" in program
    assert ("all-reduce" in program) == (num_devices == 2)
    assert trainer.step == 0


def test_training_learns(tiny_config, tiny_data):
    trainer = trained(dataclasses.replace(tiny_config, epochs=12), tiny_data)
    assert trainer.history[-1].train_accuracy > 0.95
    score = trainer.score()
    assert score.test_accuracy_exact > 0.9
    assert score.test_accuracy == pytest.approx(trainer.history[-1].test_accuracy)


def test_ours_and_flaxs_own_agree_step_by_step(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, epochs=4)
    ours = trained(config, tiny_data)
    flax = step_losses(dataclasses.replace(config, norm="flax"), tiny_data)
    difference = np.abs(ours.progress().step_losses - flax)
    assert difference[0] < 1e-5
    assert difference[:20].max() < 1e-3
    assert len(jax.tree.leaves(ours.state().batch_stats)) == 4


def test_momentum_of_the_statistics_and_epsilon_reach_the_layers(
    tiny_config, tiny_data
):
    plain = dataclasses.replace(tiny_config, epochs=1)
    a = trained(plain, tiny_data)
    b = trained(plain.replaced("norm.momentum", 0.5), tiny_data)
    c = trained(plain.replaced("norm.epsilon", 1e-2), tiny_data)
    losses = [trainer.progress().step_losses for trainer in (a, b, c)]
    # The momentum takes no part in training, and epsilon does.
    np.testing.assert_array_equal(losses[1], losses[0])
    assert not np.array_equal(losses[2], losses[0])
    assert a.history[0].test_loss != b.history[0].test_loss
    # The first layer's batches differ little, so that from 1 the variance moves by
    # .9^5 and .5^5 of the way to theirs.
    of_norm = [t.state().batch_stats["norm1"]["var"] for t in (a, b)]
    of_batch = (of_norm[0] - 0.9**5) / (1 - 0.9**5)
    np.testing.assert_allclose(
        of_norm[1], 0.5**5 + (1 - 0.5**5) * of_batch, rtol=0.3, atol=1e-3
    )


def test_batch_larger_than_the_data_is_refused(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, batch_size=171)
    with pytest.raises(
        ConfigError, match="batch_size=171 .* 170 images; .*at most 170"
    ):
        loop.Trainer(config, tiny_data)


KINDS = {
    "sgd, stored": ({}, False),
    "momentum, cosine, stored": (
        {"optimizer": "sgd:momentum=0.9", "schedule": "cosine"},
        False,
    ),
    "adam, average, streamed": (
        {"optimizer": "adam", "learning_rate": 0.01, "average_weights": 0.5},
        True,
    ),
    "augmented, dropout, stored": (
        {
            "augment": "crop_and_flip:padding=2",
            "model": "mlp:widths=16,dropout_rate=0.3",
        },
        False,
    ),
}


@pytest.fixture(
    scope="module", params=slow_but(["sgd, stored", "adam, average, streamed"], KINDS)
)
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


@pytest.mark.parametrize("stream", slow_but([False], [False, True]))
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


@pytest.mark.parametrize("layer", ["dense1", "norm1", "dense2", "dense3"])
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


@pytest.fixture(scope="module")
def validated(tiny_config, tiny_data):
    """A trainer at the end of a run in which 30 images are set aside."""
    return trained(dataclasses.replace(tiny_config, validation=30), tiny_data)


def test_images_are_set_aside_and_scored_after_each_epoch(validated, tiny_data):
    images, labels = tiny_data.train
    assert len(validated.data.train.labels) == 140
    np.testing.assert_array_equal(validated.data.train.images, images[:140])
    # 140 // 30 steps an epoch.
    assert [report.step for report in validated.history] == [4, 8]
    aside = data_lib.Split(images[140:], labels[140:])
    evaluate = Evaluator(validated.network.predict, aside, devices=jax.devices()[:1])
    expected = evaluate(validated.state().variables)
    last = validated.history[-1]
    assert last.validation_loss == pytest.approx(expected.loss, rel=1e-5)
    assert last.validation_accuracy == expected.accuracy == last.best_by
    row = last.to_row()
    assert row["validation_loss"] == last.validation_loss
    assert row["validation_accuracy"] == last.validation_accuracy


def test_validation_changes_no_number_of_the_training(
    validated, tiny_config, tiny_data
):
    config = dataclasses.replace(tiny_config, train_examples=140)
    plain = trained(config, tiny_data)
    chex.assert_trees_all_equal(
        plain.progress().state, validated.progress().state, strict=True
    )
    for one, other in zip(plain.history, validated.history, strict=True):
        assert one[:6] == other[:6]


def test_without_validation_there_is_no_score_of_it(ended):
    report = ended.history[-1]
    assert report.validation_loss is report.validation_accuracy is None
    assert not [name for name in report.to_row() if "validation" in name]
    assert report.best_by == report.test_accuracy


def test_bfloat16_keeps_parameters_and_statistics_in_float32(tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config, precision="bfloat16", epochs=12, inputs="norm"
    )
    trainer = trained(config, tiny_data)
    state = trainer.state()
    chex.assert_type(
        jax.tree.leaves((state.params, state.batch_stats, state.opt_state)), np.float32
    )
    program = trainer.lower().as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and all("bf16>" in line for line in products)
    assert trainer.history[-1].train_accuracy > 0.8
    logits = trainer.network.predict(state.variables, tiny_data.test.images[:2])
    assert logits.dtype == np.float32
    # Bits of bfloat16 are lost: the losses differ, but not by much.
    losses = step_losses(dataclasses.replace(config, precision="float32"), tiny_data)
    difference = np.abs(trainer.progress().step_losses[:5] - losses[:5])
    assert 1e-5 < difference.max() < 0.1


def test_standardised_inputs_are_those_of_the_training_set(tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config, inputs="standardised", validation=30, epochs=12
    )
    trainer = trained(config, tiny_data)
    x = tiny_data.train.images[:140] / 255
    np.testing.assert_allclose(
        trainer.network.scale(tiny_data.test.images),
        (tiny_data.test.images / 255 - x.mean()) / x.std(),
        atol=1e-5,
    )
    assert trainer.history[-1].train_accuracy > 0.9
    assert trainer.score().test_accuracy_exact > 0.8


def test_norm_on_the_inputs_has_statistics_of_its_own(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, inputs="norm", epochs=12)
    trainer = trained(config, tiny_data)
    state = trainer.state()
    assert state.batch_stats["input_norm"]["mean"].shape == (1,)
    x = tiny_data.train.images / 255
    # From 0 the mean has moved by 1 - .9^60 of the way.
    np.testing.assert_allclose(
        state.batch_stats["input_norm"]["mean"], x.mean(), rtol=0.02
    )
    assert state.params["input_norm"].keys() == {"scale", "bias"}
    assert trainer.history[-1].train_accuracy > 0.9
    exact = trainer.score()
    assert exact.exact_refused is None and exact.test_accuracy_exact > 0.8


def test_exact_statistics_of_a_norm_on_the_inputs_are_those_of_the_pixels(
    tiny_config, tiny_data
):
    config = dataclasses.replace(tiny_config, inputs="norm")
    trainer = loop.Trainer(config, tiny_data)
    stats = scoring.exact_statistics(
        trainer.network,
        trainer.state().variables,
        tiny_data.train.images,
        devices=jax.devices()[:1],
    )
    x = tiny_data.train.images / 255
    np.testing.assert_allclose(stats["input_norm"]["mean"], [x.mean()], rtol=1e-5)
    np.testing.assert_allclose(stats["input_norm"]["var"], [x.var()], rtol=1e-5)


AUGMENTED = {"augment": "crop_and_flip:padding=2,size=26", "learning_rate": 0.1}


@pytest.mark.parametrize("program", slow_but(["pmap"], ["pmap", "jit"]))
def test_augmented_images_do_not_depend_on_devices(program, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, **AUGMENTED, epochs=1)
    one = trained(config, tiny_data)
    assert one.network.image_shape == (26, 26, 1)
    losses = one.progress().step_losses
    placement = parallel.place(config, devices="2", parallel=program)
    two = trained(config, tiny_data, placement=placement)
    np.testing.assert_allclose(two.progress().step_losses, losses, atol=1e-4)
    chex.assert_trees_all_close(two.state().params, one.state().params, atol=1e-4)
    assert two.history[-1].test_loss == pytest.approx(
        one.history[-1].test_loss, rel=1e-4
    )
    # The images are others than the crops in the middle.
    still = dataclasses.replace(config, augment="crop_and_flip:padding=0,size=26")
    assert np.abs(step_losses(still, tiny_data) - losses).max() > 1e-3


@pytest.mark.slow
def test_seed_decides_the_augmentation_and_evaluation_sees_the_middle(
    tiny_config, tiny_data
):
    config = dataclasses.replace(tiny_config, **AUGMENTED, epochs=1)
    first, again, other = (
        step_losses(dataclasses.replace(config, seed=seed), tiny_data)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    network = loop.Trainer(config, tiny_data).network
    variables = network.init(jax.random.key(0))
    images = tiny_data.test.images[:3]
    chex.assert_trees_all_close(
        network.predict(variables, images),
        network.model.apply(
            variables, network.scale(images[:, 1:-1, 1:-1]), train=False
        ),
        rtol=1e-5,
        atol=1e-6,
    )


def test_augmentation_that_does_not_fit_the_images_is_refused(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, augment="crop_and_flip:size=37")
    with pytest.raises(ConfigError, match="size=37.* 28 x 28 .*at most 36"):
        loop.Trainer(config, tiny_data)
