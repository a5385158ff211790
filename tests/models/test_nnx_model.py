import functools

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from bn_jax import nnx as ours
from bn_jax.models.nnx_model import NnxModel

IMAGES = np.random.default_rng(7).random((8, 6, 6, 2), np.float32)
LABELS = np.arange(8) % 3


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


class Twice(nnx.Module):
    """Dropout twice of the same, without variables."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return [layer(x) for layer in self.layers]


MODEL, TWICE = NnxModel(Net), NnxModel(Twice)
NO_VARIABLES = {"params": {}, "batch_stats": {}}
ONES = np.ones((4, 8), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def init(model=MODEL, seed=0):
    return model.init(jax.random.key(seed), IMAGES[:1], train=False)


@functools.partial(jax.jit, static_argnums=0)
def predict(model, variables, x=IMAGES):
    return model.apply(variables, x, train=False)


@functools.partial(jax.jit, static_argnames="model")
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
    return jax.device_get(run(init()))


def test_training_is_the_loop_written_by_hand_in_nnx():
    net = nnx.jit(lambda key: Net(rngs=nnx.Rngs(key)))(jax.random.key(0))

    @nnx.jit
    def by_hand(net, i):
        # All streams have the tag of nnx.Rngs(key), "default".
        nnx.reseed(net, default=jax.random.fold_in(jax.random.key(1), i))

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
        by_hand(net, i)
    net.eval()
    variables = trained()
    expected = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    expected["convs"] = {"0": expected["convs"][0]}
    chex.assert_trees_all_close(variables["params"], expected, atol=1e-6)
    np.testing.assert_allclose(
        variables["batch_stats"]["norm"]["mean"], net.norm.mean[...], atol=1e-6
    )
    logits = nnx.jit(lambda net: net(IMAGES))(net)
    np.testing.assert_allclose(predict(MODEL, variables), logits, atol=1e-5)


def test_variables_are_nested_dictionaries_and_move_in_training():
    start, end = init(), trained()
    assert start["params"].keys() == {"convs", "norm", "head"}
    assert start["batch_stats"].keys() == {"norm"}
    assert start["params"]["convs"]["0"]["kernel"].shape == (3, 3, 2, 3)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
        assert np.abs(new - np.asarray(old)).max() > 1e-5


def test_each_key_drops_other_values_and_each_layer_its_own():
    variables = init()
    losses = [
        loss(variables["params"], variables, jax.random.key(i))[0] for i in (0, 1)
    ]
    assert losses[0] != losses[1]
    assert losses[0] == loss(variables["params"], variables, jax.random.key(0))[0]
    rngs = {"dropout": jax.random.key(0)}
    train = jax.jit(functools.partial(TWICE.apply, train=True))
    a, b = train(NO_VARIABLES, ONES, rngs=rngs)
    assert np.not_equal(a, b).any()


def test_the_wrapped_module_is_copied_and_never_changed():
    net = nnx.jit(lambda: Net(rngs=nnx.Rngs(3)))()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    model = NnxModel(net)
    variables = model.init(jax.random.key(0), IMAGES[:1])
    other = model.init(jax.random.key(1), IMAGES[:1])
    chex.assert_trees_all_equal(variables, other)
    loss(variables["params"], variables, jax.random.key(0), model=model)
    after = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    chex.assert_trees_all_equal(before, after)
    assert not np.any(net.norm.mean[...])
    net.head.bias[...] += 1
    jax.tree.map(lambda leaf: leaf.delete(), variables)  # as a donation does
    variables = model.init(jax.random.key(0), IMAGES[:1])
    assert not np.any(variables["params"]["head"]["bias"])


def test_prediction_drops_nothing_and_keeps_the_statistics():
    variables = trained()
    apply = functools.partial(MODEL.apply, train=False, mutable=["batch_stats"])
    logits, updates = jax.jit(apply)(variables, IMAGES)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    alone = predict(MODEL, variables, IMAGES[3:4])
    np.testing.assert_allclose(alone[0], logits[3], atol=1e-6)


def test_it_runs_under_static_jit_vmap_and_pmap(devices):
    variables = [init(MODEL, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *variables)
    expected = np.stack([predict(MODEL, v) for v in variables])
    for mapped in (jax.vmap, functools.partial(jax.pmap, devices=devices[:2])):
        logits = mapped(functools.partial(predict, MODEL))(stacked)
        np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_a_call_that_takes_train_is_given_it():
    class Told(nnx.Module):
        def __call__(self, x, *, train):
            return x + train

    model = NnxModel(lambda rngs: Told())
    variables = init(model)
    assert model.apply(variables, 1, train=True) == 2
    assert model.apply(variables, 1, train=False) == 1


def test_random_numbers_without_a_key_are_refused():
    message = 'Twice draws .*training.*rngs={"dropout": key}'
    for apply in (TWICE.apply, jax.jit(TWICE.apply, static_argnames="train")):
        with pytest.raises(ValueError, match=message):
            apply(NO_VARIABLES, ONES, train=True)
    without = NnxModel(functools.partial(Net, 0.0))
    jax.eval_shape(functools.partial(without.apply, train=True), init(), IMAGES)


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
