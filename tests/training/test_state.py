import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.data import DataError, Split
from bn_jax.fields import ConfigError
from bn_jax.training import loop, parallel, scoring
from bn_jax.training.config import TrainConfig
from bn_jax.training.evaluation import Evaluator
from bn_jax.training.members import parse
from bn_jax.training.task import Task, make_network
from marks import slow_but
from small_runs import step_losses, swept, trained

TASK = Task(num_classes=10, image_shape=(28, 28, 1))


def after_steps(config, data, num_steps, **options):
    """The trainer after some steps of its first epoch, before any evaluation."""
    trainer = loop.Trainer(config, data, checkpoint_steps=num_steps, **options)
    assert num_steps < trainer.steps_per_epoch
    next(trainer.train())
    assert trainer.step == num_steps
    return trainer


def moved(config, data):
    """Whether each number of the parameters differs after 8 steps from before."""
    config = dataclasses.replace(config, batch_size=15)
    before = loop.Trainer(config, data).state().params
    after = after_steps(config, data, 8).state().params
    return {
        layer: {name: np.asarray(after[layer][name] != before[layer][name])
                for name in before[layer]}
        for layer in before
    }  # fmt: skip


def share(tree):
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves).mean()


@pytest.mark.slow
def test_norms_alone_learn(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, trained="norms")
    change = moved(config, tiny_data)
    for layer, of_layer in change.items():
        assert (share(of_layer) > 0.9) == layer.startswith("norm"), layer
        assert layer.startswith("norm") or share(of_layer) == 0


def test_last_layer_learns_beside_norms(tiny_config, tiny_data):
    change = moved(
        dataclasses.replace(tiny_config, trained="norms:also=dense3"), tiny_data
    )
    learns = {layer for layer, of_layer in change.items() if share(of_layer) > 0}
    assert learns == {"norm1", "norm2", "dense3"}


@pytest.mark.slow
def test_as_many_parameters_as_norms_have_learn_at_random(tiny_config, tiny_data):
    # At a rate at which each number that learns moves by more than its rounding.
    config = dataclasses.replace(tiny_config, trained="random", learning_rate=3.0)
    change = moved(config, tiny_data)
    assert not any(
        share(of_layer) for layer, of_layer in change.items() if "norm" in layer
    )
    count = sum(np.sum(leaf) for leaf in jax.tree.leaves(change))
    # 2 (16 + 16), of which some weights of the images' borders never see but 0.
    assert 40 < count <= 64
    other = moved(dataclasses.replace(config, seed=1), tiny_data)
    assert not np.array_equal(other["dense1"]["kernel"], change["dense1"]["kernel"])


def test_frozen_gamma_goes_with_norms_alone(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, trained="norms:gamma=false")
    change = moved(config, tiny_data)
    for layer in ("norm1", "norm2"):
        assert not change[layer]["scale"].any()
        assert change[layer]["bias"].all()
    dense = [of_layer for layer, of_layer in change.items() if "dense" in layer]
    assert len(dense) == 3 and share(dense) == 0


@pytest.mark.parametrize("where", slow_but(["last"], ["dense", "last"]))
def test_dropout_drops_its_share_of_what_it_follows(where):
    config = TrainConfig(
        norm="none", model=f"lenet:dropout_rate=0.25,dropout_at={where}"
    )
    model = make_network(config, TASK).model
    plain = make_network(config.replaced("model.dropout_rate", 0.0), TASK).model

    @jax.jit
    def dropped_predicted_and_plain(images):
        variables = model.init(jax.random.key(0), images, train=False)
        _, state = model.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": jax.random.key(1)},
            capture_intermediates=lambda module, _: "Dropout" in type(module).__name__,
            mutable=["intermediates"],
        )
        predictions = (m.apply(variables, images, train=False) for m in (model, plain))
        return state, *predictions

    images = np.random.default_rng(0).random((64, 28, 28, 1), np.float32)
    state, predicted, expected = dropped_predicted_and_plain(images)
    dropped = [np.mean(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(state)]
    assert len(dropped) == {"dense": 2, "last": 1}[where]
    np.testing.assert_allclose(dropped, 0.25, atol=0.02)
    # Prediction drops nothing, and needs no key.
    np.testing.assert_array_equal(predicted, expected)


def test_each_step_seed_and_device_drops_anew(tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config,
        norm="none",
        model="mlp:widths=16,dropout_rate=0.5",
        learning_rate=1e-12,
        batch_size=16,  # 10 steps an epoch
    )
    of_one = Split(*(np.repeat(a[:1], len(a), axis=0) for a in tiny_data.train))
    data = dataclasses.replace(tiny_data, train=of_one)
    trainer = after_steps(config, data, 9)
    one = trainer.progress().step_losses
    trainer.restore(loop.Trainer(config, data).progress())
    next(trainer.train())
    np.testing.assert_array_equal(trainer.progress().step_losses, one)
    # Nothing has learned, and all images are one: what differs is what was dropped.
    assert len(np.unique(one.round(5))) > 8
    placement = parallel.place(config, devices="2")
    on_two = after_steps(config, data, 9, placement=placement)
    assert np.abs(on_two.progress().step_losses - one).max() > 1e-4


@pytest.mark.slow
def test_members_of_a_sweep_drop_as_they_would_alone(tiny_config, tiny_data):
    base = dataclasses.replace(
        tiny_config, model="mlp:widths=16,dropout_rate=0.3", learning_rate=0.1
    )
    configs = parse("seed=3..4", base)
    sweep = swept(configs, tiny_data)
    for of_sweep, config in zip(sweep.progress().step_losses, configs, strict=True):
        alone = step_losses(config, tiny_data)
        np.testing.assert_allclose(of_sweep, alone, atol=1e-5)


def test_first_examples_alone_are_trained_on(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, train_examples=60)
    trainer = loop.Trainer(config, tiny_data)
    assert trainer.steps_per_epoch == 2
    assert "the first 60 for training" in trainer.data.source
    np.testing.assert_array_equal(
        trainer.data.train.images, tiny_data.train.images[:60]
    )
    with pytest.raises(DataError, match=r"train_examples=171 of tiny.*at most 170"):
        loop.Trainer(dataclasses.replace(config, train_examples=171), tiny_data)


def test_relu_is_after_each_norm():
    config = TrainConfig(model="lenet:activation=relu")
    assert make_network(config, TASK).model.activation is jax.nn.relu
    assert make_network(TrainConfig(), TASK).model.activation is jax.nn.sigmoid


def test_model_of_a_run_that_was_passed_in_is_asked_for():
    with pytest.raises(
        ConfigError, match=r"of the class Mine; pass one .*model=\.\.\."
    ):
        make_network(TrainConfig(model="own:Mine"), TASK)


def test_images_too_small_for_a_model_are_refused():
    network = make_network(TrainConfig(), Task(10, (8, 8, 1)))
    with pytest.raises(ConfigError, match="LeNet does not fit images of 8 x 8 x 1"):
        network.check_fits()


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm",
    [
        "renorm",
        "layer",
        "group:num_groups=2",
        "whitening:method=zca,max_group_size=64",  # several matrices of 30 rows or more
        "whitening:method=iternorm,max_group_size=8,num_iterations=3",
        "quantile:target=gaussian",
    ],
)
def test_lenet_trains_with_any_norm_by_name(norm, tiny_config, tiny_data):
    # With ReLUs, since sigmoids on this little data stay at the loss of guessing.
    config = dataclasses.replace(
        tiny_config,
        norm=norm,
        model="lenet:activation=relu",
        learning_rate=0.1,
        epochs=6,
    )
    members = swept([config], tiny_data)
    losses = members.progress().step_losses[0]
    chex.assert_tree_all_finite(losses)
    assert losses[-5:].mean() < losses[:5].mean() - 0.1
    (row,) = members.rows()
    # Of the norms that predict by a moving mean and variance alone.
    assert ("test_accuracy_exact" in row) == (norm == "renorm")
    assert 0 <= row["test_accuracy_batch"] <= 1


@pytest.mark.slow
def test_scores_of_members_are_those_of_single_evaluations(tiny_config, tiny_data):
    (row,) = swept([tiny_config], tiny_data).rows(train=True)
    single = trained(tiny_config, tiny_data)
    network, variables = single.network, single.state().variables
    devices = jax.devices()[:1]
    on_train = scoring.score(
        network,
        variables,
        Evaluator(network.predict, tiny_data.train, devices=devices),
        tiny_data.train.images,
        devices=devices,
    )
    assert row["train_loss_average"] == pytest.approx(on_train.test_loss, rel=1e-4)
    assert row["train_loss_exact"] == pytest.approx(on_train.test_loss_exact, rel=1e-4)
    images = jnp.asarray(tiny_data.test.images) / 255
    logits, _ = network.model.apply(
        variables, images, train=True, mutable=["batch_stats"]
    )
    right = np.asarray(logits).argmax(-1) == tiny_data.test.labels
    assert row["test_accuracy_batch"] == pytest.approx(right.mean())


@pytest.mark.slow
def test_variance_ratio_is_of_moving_and_exact_variance(tiny_config, tiny_data):
    # At momentum 0 the moving variance is that of the last batch; at 1 it is still 1,
    # and that of the pixels' convolution is far below 1.
    of_last, of_start = swept(parse("norm.momentum=0,1", tiny_config), tiny_data).rows()
    assert 0.5 < of_last["norm1_variance_ratio"] < 2
    assert of_start["norm1_variance_ratio"] > 1
