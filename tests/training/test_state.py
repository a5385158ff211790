import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.data import DataError
from bn_jax.fields import ConfigError
from bn_jax.runs import sweeps
from bn_jax.training import loop
from bn_jax.training.config import TrainConfig
from bn_jax.training.members import parse
from bn_jax.training.state import make_model
from bn_jax.training.sweep import Sweep


def moved(config, data):
    """Whether each number of the parameters differs after training from before."""
    trainer = loop.Trainer(config, data)
    before = trainer.state().params
    for _ in trainer.train():
        pass
    after = trainer.state().params
    return {
        layer: {name: np.asarray(after[layer][name] != before[layer][name])
                for name in before[layer]}
        for layer in before
    }  # fmt: skip


def share(tree):
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves).mean()


def test_norms_alone_learn(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, trained="norm")
    change = moved(config, tiny_data)
    for layer, of_layer in change.items():
        assert (share(of_layer) > 0.9) == layer.startswith("norm"), layer
        assert layer.startswith("norm") or share(of_layer) == 0


def test_last_layer_learns_beside_norms(tiny_config, tiny_data):
    change = moved(dataclasses.replace(tiny_config, trained="norm_and_last"), tiny_data)
    learns = {layer for layer, of_layer in change.items() if share(of_layer) > 0}
    assert learns == {"norm1", "norm2", "norm3", "norm4", "dense3"}


def test_as_many_parameters_as_norms_have_learn_at_random(tiny_config, tiny_data):
    # At a rate at which each number that learns moves by more than its rounding.
    config = dataclasses.replace(tiny_config, trained="random", learning_rate=3.0)
    change = moved(config, tiny_data)
    assert not any(
        share(of_layer) for layer, of_layer in change.items() if "norm" in layer
    )
    count = sum(np.sum(leaf) for leaf in jax.tree.leaves(change))
    # 2 (6 + 16 + 120 + 84) = 452, of which those of biases before norms stay at 0.
    assert 400 < count <= 452
    other = moved(dataclasses.replace(config, seed=1), tiny_data)
    assert not np.array_equal(other["dense1"]["kernel"], change["dense1"]["kernel"])


def test_frozen_gamma_goes_with_norms_alone(tiny_config, tiny_data):
    config = dataclasses.replace(tiny_config, trained="norm", train_gamma=False)
    change = moved(config, tiny_data)
    for layer in ("norm1", "norm4"):
        assert not change[layer]["scale"].any()
        assert change[layer]["bias"].all()


@pytest.mark.parametrize("where", ["dense", "last"])
def test_dropout_drops_its_share_of_what_it_follows(where):
    config = TrainConfig(norm="none", dropout_rate=0.25, dropout_at=where)
    model = make_model(config, num_classes=10)
    images = jnp.asarray(np.random.default_rng(0).random((64, 28, 28, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    _, state = model.apply(
        variables,
        images,
        train=True,
        rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda module, _: "Dropout" in type(module).__name__,
        mutable=["intermediates"],
    )
    dropped = [np.mean(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(state)]
    assert len(dropped) == {"dense": 2, "last": 1}[where]
    np.testing.assert_allclose(dropped, 0.25, atol=0.02)
    # Prediction drops nothing, and needs no key.
    predict = model.apply(variables, images, train=False)
    plain = make_model(dataclasses.replace(config, dropout_rate=0.0), num_classes=10)
    np.testing.assert_array_equal(predict, plain.apply(variables, images, train=False))


def test_each_step_seed_and_device_drops_anew(tiny_config, tiny_data):
    config = dataclasses.replace(
        tiny_config, norm="none", dropout_rate=0.5, learning_rate=1e-12
    )
    losses = loop.fit(config, tiny_data).step_losses
    again = loop.fit(config, tiny_data).step_losses
    np.testing.assert_array_equal(losses, again)
    plain = dataclasses.replace(config, dropout_rate=0.0)
    without = loop.fit(plain, tiny_data).step_losses
    # Nothing has learned: what differs is what was dropped.
    assert len(np.unique(np.abs(losses - without).round(7))) > 8
    two = loop.fit(
        config,
        tiny_data,
        placement=loop.parallel.place(config, devices="2"),
    ).step_losses
    assert np.abs(two - losses).max() > 1e-4


def test_members_of_a_sweep_drop_as_they_would_alone(tiny_config, tiny_data):
    base = dataclasses.replace(tiny_config, dropout_rate=0.3, learning_rate=0.1)
    configs = parse("seed=3..4", base)
    members = Sweep(configs, tiny_data)
    for _ in members.train():
        pass
    for i, config in enumerate(configs):
        alone = loop.fit(config, tiny_data).step_losses
        of_sweep = members.progress().step_losses[i]
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


def test_relu_is_after_each_norm(tiny_config):
    config = dataclasses.replace(tiny_config, activation="relu")
    model = make_model(config, num_classes=10)
    assert model.activation is jax.nn.relu
    assert make_model(tiny_config, num_classes=10).activation is jax.nn.sigmoid


def test_unknown_attribute_of_a_norm_is_named(tiny_config):
    config = dataclasses.replace(tiny_config, norm="group:groups=2")
    with pytest.raises(ConfigError, match=r"has no groups; its attributes are.*num_gr"):
        make_model(config, num_classes=10)


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
        tiny_config, norm=norm, activation="relu", learning_rate=0.1, epochs=6
    )
    members = Sweep([config], tiny_data)
    for _ in members.train():
        pass
    losses = members.progress().step_losses[0]
    chex.assert_tree_all_finite(losses)
    assert losses[-5:].mean() < losses[:5].mean() - 0.1
    (row,) = members.rows()
    assert "test_accuracy_exact" not in row  # of batch norm alone
    assert 0 <= row["test_accuracy_batch"] <= 1


def test_scores_of_members_are_those_of_single_evaluations(tiny_config, tiny_data):
    members = Sweep([tiny_config], tiny_data)
    for _ in members.train():
        pass
    (row,) = members.rows(train=True)
    single = loop.fit(tiny_config, tiny_data)
    on_train = loop.score(
        single.model,
        single.state.variables,
        dataclasses.replace(tiny_data, test=tiny_data.train),
    )
    assert row["train_loss_average"] == pytest.approx(on_train.test_loss, rel=1e-4)
    assert row["train_loss_exact"] == pytest.approx(on_train.test_loss_exact, rel=1e-4)
    images = jnp.asarray(tiny_data.test.images) / 255
    logits, _ = single.model.apply(
        single.state.variables, images, train=True, mutable=["batch_stats"]
    )
    right = np.asarray(logits).argmax(-1) == tiny_data.test.labels
    assert row["test_accuracy_batch"] == pytest.approx(right.mean())


def test_variance_ratio_is_of_moving_and_exact_variance(tiny_config, tiny_data):
    # At momentum 0 the moving variance is that of the last batch.
    config = dataclasses.replace(tiny_config, momentum=0.0)
    members = Sweep([config], tiny_data)
    for _ in members.train():
        pass
    (row,) = members.rows()
    assert 0.5 < row["norm1_variance_ratio"] < 2
    frozen = dataclasses.replace(tiny_config, momentum=1.0)
    members = Sweep([frozen], tiny_data)
    for _ in members.train():
        pass
    (row,) = members.rows()
    # The moving variance is still 1; that of the pixels' convolution is far below 1.
    assert row["norm1_variance_ratio"] > 1


def test_variables_of_a_sweep_are_read_back(tmp_path, tiny_config, tiny_data):
    configs = parse("seed=0..1", tiny_config)
    sweeps.sweep_into(tmp_path / "run", configs, tiny_data)
    variables = sweeps.load_variables(tmp_path / "run")
    single = loop.fit(configs[1], tiny_data).state
    np.testing.assert_allclose(
        variables["params"]["norm1"]["scale"][1],
        single.params["norm1"]["scale"],
        atol=1e-5,
    )
