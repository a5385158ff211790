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
def long_config(tiny_config):
    """Epochs enough to learn the classes."""
    return dataclasses.replace(tiny_config, epochs=12)


@pytest.fixture(scope="module")
def by_epoch(long_config, tiny_data):
    """A trainer at its end; its report and its progress after each epoch."""
    trainer = loop.Trainer(long_config, tiny_data)
    return trainer, *zip(
        *[(report, trainer.progress()) for report in trainer.train()], strict=True
    )


@pytest.fixture(scope="module")
def ended(by_epoch):
    return by_epoch[0]


def test_same_config_repeats_bit_for_bit(ended, long_config, tiny_data):
    again = trained(long_config, tiny_data)
    assert_same(again.progress(), ended.progress())


def test_streamed_run_is_the_stored_run_bit_for_bit(by_epoch, tiny_config, tiny_data):
    # In parts that begin amid an epoch, of 2, 2 and 1 steps.
    streamed = trained(tiny_config, tiny_data, stream=True, checkpoint_steps=2)
    _, _, progress = by_epoch
    assert_same(streamed.progress(), progress[1])


def make_looking_step(config, network, optimizer, **options):
    """A step that trains nothing; the labels of its batch make the metrics."""
    del config, network, optimizer, options

    def step(state, batch):
        hashed = (batch.labels * np.arange(len(batch.labels))).sum()
        metrics = loop.Metrics(hashed.astype(np.float32), np.float32(0))
        return state.replace(step=state.step + 1), metrics

    return step


def test_another_seed_gives_another_start_and_order(tiny_config, tiny_data):
    trainers = [
        loop.Trainer(
            dataclasses.replace(tiny_config, seed=seed),
            tiny_data,
            checkpoint_steps=4,
            make_train_step=make_looking_step,
        )
        for seed in (0, 1)
    ]
    for trainer in trainers:
        next(trainer.train())
    one, other = (trainer.progress() for trainer in trainers)
    kernels = [p.state.params["dense1"]["kernel"] for p in (one, other)]
    assert (kernels[0] != kernels[1]).all()
    assert (one.step_losses != other.step_losses).all()


def test_history_holds_each_epochs_means(by_epoch):
    ended, reports, _ = by_epoch
    assert list(reports) == ended.history
    assert [report.epoch for report in reports] == list(range(1, 13))
    assert [report.step for report in reports] == list(range(5, 61, 5))
    means = ended.progress().step_losses.reshape(12, 5).mean(1)
    np.testing.assert_allclose([r.loss for r in reports], means, rtol=1e-6)
    for report in reports:
        assert report.examples_per_second == pytest.approx(150 / report.seconds)
        assert 0 <= report.test_accuracy <= 1


@pytest.mark.parametrize("num_devices", slow_but([2], [1, 2]))
def test_lowered_loop_is_that_of_the_steps(num_devices, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, model="mlp:widths=8")
    placement = parallel.place(config, devices=str(num_devices))
    trainer = loop.Trainer(config, tiny_data, placement=placement)
    program = trainer.lower().compile().as_text()
    assert "transpose(jvp(MLP))/dense1" in program
    assert ("all-reduce" in program) == (num_devices == 2)
    assert trainer.step == 0


def test_training_learns(ended):
    assert ended.history[-1].train_accuracy > 0.95
    score = ended.score()
    assert score.test_accuracy_exact > 0.9
    assert score.test_accuracy == pytest.approx(ended.history[-1].test_accuracy)


def test_ours_and_flaxs_own_agree_step_by_step(ended, tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, epochs=4, norm="flax")
    flax = step_losses(config, tiny_data)
    assert len(flax) == 20
    difference = np.abs(ended.progress().step_losses[:20] - flax)
    assert difference[0] < 1e-5
    assert difference.max() < 1e-3
    assert len(jax.tree.leaves(ended.state().batch_stats)) == 4


def test_momentum_of_the_statistics_and_epsilon_reach_the_layers(
    by_epoch, tiny_config, tiny_data
):
    _, _, (a, *_) = by_epoch
    plain = dataclasses.replace(tiny_config, epochs=1)
    b = trained(plain.replaced("norm.momentum", 0.5), tiny_data).progress()
    # The first steps, which are not scored.
    c = loop.Trainer(
        plain.replaced("norm.epsilon", 1e-2), tiny_data, checkpoint_steps=4
    )
    next(c.train())
    # The momentum takes no part in training, and epsilon does.
    np.testing.assert_array_equal(b.step_losses, a.step_losses)
    assert not np.array_equal(c.progress().step_losses, a.step_losses[:4])
    assert a.history[0].test_loss != b.history[0].test_loss
    # The first layer's batches differ little, so that from 1 the variance moves by
    # .9^5 and .5^5 of the way to theirs.
    of_norm = [p.state.batch_stats["norm1"]["var"][0] for p in (a, b)]
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


@pytest.fixture(scope="module")
def paused(request, tiny_config, tiny_data):
    """How to make a trainer, one that is finished, and its progress at each step."""
    choices, stream = KINDS[request.param]
    make = functools.partial(
        loop.Trainer,
        dataclasses.replace(tiny_config, **({"model": "mlp:widths=8"} | choices)),
        tiny_data,
        stream=stream,
        checkpoint_steps=1,
    )
    trainer = make()
    progress = [trainer.progress()]
    progress += [trainer.progress() for _ in trainer.train()]
    return make, trainer, progress


@pytest.mark.parametrize(
    "paused", slow_but(["sgd, stored", "adam, average, streamed"], KINDS), indirect=True
)
def test_run_goes_on_from_any_pause_bit_for_bit(paused):
    _, trainer, progress = paused
    assert [len(p.step_losses) for p in progress] == list(range(11))
    end = progress[-1]
    for start in progress:
        trainer.restore(start)
        reports = [report.epoch for report in trainer.train() if report is not None]
        assert reports == [1, 2][len(start.history) :]
        assert_same(trainer.progress(), end)


@pytest.mark.parametrize(
    "paused", slow_but(["adam, average, streamed"], KINDS), indirect=True
)
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


@pytest.mark.parametrize(
    "paused", slow_but(["adam, average, streamed"], KINDS), indirect=True
)
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
    mean = np.float32([[0.0] * 16, [4.0] * 16])
    var = np.float32([[1.0] * 16, [2.0] * 16])
    two = jax.tree.map(lambda leaf: np.repeat(leaf, 2, 0), progress.state.batch_stats)
    two["norm1"] = {**two["norm1"], "mean": mean, "var": var}
    trainer.restore(progress._replace(state=progress.state.replace(batch_stats=two)))
    # Two halves with means 0 and 4 vary by 4 about their own, 2, besides by 1.5.
    expected = {"exact": (2.0, 1.5 + 4.0), "first": (0.0, 1.0)}[rule]
    norm1 = trainer.state().batch_stats["norm1"]
    np.testing.assert_allclose(norm1["mean"], [expected[0]] * 16)
    np.testing.assert_allclose(norm1["var"], [expected[1]] * 16)
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
    config = dataclasses.replace(
        tiny_config, model="mlp:widths=16", norm="none", learning_rate=1e38
    )
    trainer = loop.Trainer(config, tiny_data, stream=stream)
    with pytest.raises(FloatingPointError) as raised:
        list(trainer.train())
    step = trainer.step
    message = str(raised.value)
    assert f"not finite at step {step + 1} (learning_rate=1e+38): " in message
    assert re.search(r"those of \w+;|but not the loss that they make;", message)
    assert message.endswith("; try a smaller learning_rate")
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


@pytest.mark.parametrize(
    "layer", slow_but(["norm1", "dense3"], ["dense1", "norm1", "dense2", "dense3"])
)
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
    message = (
        r"loss on the test set is not finite after epoch 1 .*smaller learning_rate"
    )
    with pytest.raises(FloatingPointError, match=message):
        broken("batch_stats", "norm2", "mean", np.nan)


@pytest.fixture(scope="module")
def standardised_config(long_config):
    return dataclasses.replace(
        long_config, model="mlp:widths=16", inputs="standardised"
    )


@pytest.fixture(scope="module")
def validated(standardised_config, tiny_data):
    """A trainer at the end of a run in which 30 images are set aside."""
    return trained(dataclasses.replace(standardised_config, validation=30), tiny_data)


def test_images_are_set_aside_and_scored_after_each_epoch(validated, tiny_data):
    images, labels = tiny_data.train
    assert len(validated.data.train.labels) == 140
    np.testing.assert_array_equal(validated.data.train.images, images[:140])
    # 140 // 30 steps an epoch.
    assert [report.step for report in validated.history] == list(range(4, 49, 4))
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
    validated, standardised_config, tiny_data
):
    config = dataclasses.replace(standardised_config, train_examples=140)
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


@pytest.fixture(scope="module")
def with_input_norm(long_config, tiny_data):
    """A trainer at the end of a run whose model begins with a norm."""
    config = dataclasses.replace(long_config, model="mlp:widths=16", inputs="norm")
    return trained(config, tiny_data)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(
    with_input_norm, tiny_data
):
    config = dataclasses.replace(with_input_norm.config, precision="bfloat16")
    trainer = trained(config, tiny_data)
    state = trainer.state()
    chex.assert_type(
        jax.tree.leaves((state.params, state.batch_stats, state.opt_state)), np.float32
    )
    program = trainer.lower().as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and all("bf16>" in line for line in products)
    assert trainer.history[-1].train_accuracy > 0.8
    logits = jax.eval_shape(
        trainer.network.predict, state.variables, tiny_data.test.images[:2]
    )
    assert logits.dtype == np.float32
    # Bits of bfloat16 are lost: the losses differ, but not by much.
    losses = with_input_norm.progress().step_losses
    difference = np.abs(trainer.progress().step_losses[:5] - losses[:5])
    assert 1e-5 < difference.max() < 0.1


def test_standardised_inputs_are_those_of_the_training_set(validated, tiny_data):
    x = tiny_data.train.images[:140] / 255
    np.testing.assert_allclose(
        validated.network.scale(tiny_data.test.images),
        (tiny_data.test.images / 255 - x.mean()) / x.std(),
        atol=1e-5,
    )
    assert validated.history[-1].train_accuracy > 0.9
    assert validated.score().test_accuracy_exact > 0.8


def test_norm_on_the_inputs_has_statistics_of_its_own(with_input_norm, tiny_data):
    state = with_input_norm.state()
    assert state.batch_stats["input_norm"]["mean"].shape == (1,)
    x = tiny_data.train.images / 255
    # From 0 the mean has moved by 1 - .9^60 of the way.
    np.testing.assert_allclose(
        state.batch_stats["input_norm"]["mean"], x.mean(), rtol=0.02
    )
    assert state.params["input_norm"].keys() == {"scale", "bias"}
    assert with_input_norm.history[-1].train_accuracy > 0.9
    exact = with_input_norm.score()
    assert exact.exact_refused is None and exact.test_accuracy_exact > 0.8


def test_exact_statistics_of_a_norm_on_the_inputs_are_those_of_the_pixels(
    with_input_norm, tiny_data
):
    stats = scoring.exact_statistics(
        with_input_norm.network,
        with_input_norm.state().variables,
        tiny_data.train.images,
        devices=jax.devices()[:1],
    )
    x = tiny_data.train.images / 255
    np.testing.assert_allclose(stats["input_norm"]["mean"], [x.mean()], rtol=1e-5)
    np.testing.assert_allclose(stats["input_norm"]["var"], [x.var()], rtol=1e-5)


AUGMENTED = {"augment": "crop_and_flip:padding=2,size=26", "learning_rate": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pmap", "jit"])
def test_augmented_images_do_not_depend_on_devices(program, tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config, **AUGMENTED, epochs=1, model="mlp:widths=8x8"
    )
    one = trained(config, tiny_data)
    assert one.network.image_shape == (26, 26, 1)
    losses = one.progress().step_losses
    placement = parallel.place(config, devices="2", parallel=program)
    two = trained(config, tiny_data, placement=placement)
    np.testing.assert_allclose(two.progress().step_losses, losses, atol=1e-4)
    chex.assert_trees_all_close(
        two.state().variables, one.state().variables, atol=1e-4, rtol=0
    )
    assert two.history[-1].test_loss == pytest.approx(
        one.history[-1].test_loss, rel=1e-4
    )
    assert two.score().test_loss_exact == pytest.approx(
        one.score().test_loss_exact, rel=1e-3
    )
    # The images are others than the crops in the middle.
    still = loop.Trainer(
        dataclasses.replace(config, augment="crop_and_flip:padding=0,size=26"),
        tiny_data,
        checkpoint_steps=4,
    )
    next(still.train())
    assert np.abs(still.progress().step_losses - losses[:4]).max() > 1e-3


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
