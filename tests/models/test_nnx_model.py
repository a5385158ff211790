import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bn_jax import nnx as ours
from bn_jax.models.nnx_model import NnxModel

IMAGES = jax.random.uniform(jax.random.key(7), (8, 6, 6, 2))
LABELS = jnp.arange(8) % 3


class Net(nnx.Module):
    """A convolution in a list, a norm, dropout twice, and a dense layer."""

    def __init__(self, rate=0.5, *, rngs):
        self.convs = nnx.List([nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=rngs)])
        self.norm = ours.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)
        self.last_dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = conv(x)
        x = self.dropout(nnx.relu(self.norm(x)))
        return self.last_dropout(self.head(x.mean((1, 2))))


MODEL = NnxModel(Net)


def init(model=MODEL, seed=0):
    return model.init(jax.random.key(seed), IMAGES[:1], train=False)


def loss(params, variables, key, model=MODEL):
    logits, updates = model.apply(
        {**variables, "params": params},
        IMAGES,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
    return losses.mean(), updates


def step(variables, key):
    gradient = jax.grad(loss, has_aux=True)
    gradients, updates = gradient(variables["params"], variables, key)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    return {"params": params, **updates}


@functools.cache
def trained():
    """Three steps, in one compiled loop."""

    def body(carry):
        i, variables = carry
        return i + 1, step(variables, jax.random.fold_in(jax.random.key(1), i))

    run = jax.jit(lambda v: jax.lax.while_loop(lambda c: c[0] < 3, body, (0, v))[1])
    return run(init())


def test_training_is_the_loop_written_by_hand_in_nnx():
    net = Net(rngs=nnx.Rngs(jax.random.key(0)))

    @nnx.jit
    def by_hand(net, key):
        # All streams have the tag of nnx.Rngs(key), "default".
        nnx.reseed(net, default=key)

        def loss(net):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                net(IMAGES), LABELS
            )
            return losses.mean()

        gradients = nnx.grad(loss)(net)
        params = nnx.state(net, nnx.Param)
        nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))

    net.train()
    for i in range(3):
        by_hand(net, jax.random.fold_in(jax.random.key(1), i))
    net.eval()
    variables = trained()
    expected = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    expected["convs"] = {"0": expected["convs"][0]}
    chex.assert_trees_all_close(variables["params"], expected, atol=1e-6)
    np.testing.assert_allclose(
        variables["batch_stats"]["norm"]["mean"], net.norm.mean[...], atol=1e-6
    )
    np.testing.assert_allclose(
        MODEL.apply(variables, IMAGES, train=False), net(IMAGES), atol=1e-5
    )


def test_variables_are_nested_dictionaries_and_move_in_training():
    start, end = init(), trained()
    assert start["params"].keys() == {"convs", "norm", "head"}
    assert start["batch_stats"].keys() == {"norm"}
    assert start["params"]["convs"]["0"]["kernel"].shape == (3, 3, 2, 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
        assert jnp.abs(new - old).max() > 1e-5


def test_each_key_drops_other_values_and_each_layer_its_own():
    variables = init()
    losses = [
        loss(variables["params"], variables, jax.random.key(i))[0] for i in (0, 1)
    ]
    assert losses[0] != losses[1]
    assert losses[0] == loss(variables["params"], variables, jax.random.key(0))[0]

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return [layer(x) for layer in self.layers]

    rngs = {"dropout": jax.random.key(0)}
    x = jnp.ones((4, 8))
    a, b = NnxModel(Twice).apply(
        {"params": {}, "batch_stats": {}}, x, train=True, rngs=rngs
    )
    assert (a != b).any()


def test_the_wrapped_module_is_copied_and_never_changed():
    net = Net(rngs=nnx.Rngs(3))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    model = NnxModel(net)
    variables = init(model)
    chex.assert_trees_all_equal(variables, init(model, seed=1))
    loss(variables["params"], variables, jax.random.key(0), model)
    after = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    chex.assert_trees_all_equal(before, after)
    assert not net.norm.mean[...].any()
    net.head.bias[...] += 1
    jax.tree.map(lambda leaf: leaf.delete(), variables)  # as a donation does
    assert not init(model)["params"]["head"]["bias"].any()


def test_prediction_drops_nothing_and_keeps_the_statistics():
    variables = trained()
    logits, updates = MODEL.apply(
        variables, IMAGES, train=False, mutable=["batch_stats"]
    )
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    alone = MODEL.apply(variables, IMAGES[3:4], train=False)
    np.testing.assert_allclose(alone[0], logits[3], atol=1e-6)


def test_it_runs_under_static_jit_vmap_and_pmap(devices):
    variables = [init(seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
    predict = jax.jit(
        lambda model, v: model.apply(v, IMAGES, train=False), static_argnums=0
    )
    expected = jnp.stack([predict(MODEL, v) for v in variables])
    for mapped in (jax.vmap, functools.partial(jax.pmap, devices=devices[:2])):
        logits = mapped(functools.partial(predict, MODEL))(stacked)
        np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_a_call_that_takes_train_is_given_it():
    class Told(nnx.Module):
        def __call__(self, x, *, train):
            return x + train

    model = NnxModel(lambda rngs: Told())
    assert model.apply(init(model), 1, train=True) == 2
    assert model.apply(init(model), 1, train=False) == 1


def test_random_numbers_without_a_key_are_refused():
    with pytest.raises(ValueError, match='Net draws .*training.*rngs={"dropout": key}'):
        MODEL.apply(init(), IMAGES, train=True)
    without = NnxModel(functools.partial(Net, 0.0))
    without.apply(init(without), IMAGES, train=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "got 3; expected an nnx.Module, or a function"),
        (lambda rngs: None, "returned a NoneType; expected a function that makes"),
    ],
)
def test_what_makes_no_module_is_refused(source, message):
    with pytest.raises(TypeError, match=message):
        NnxModel(source)
