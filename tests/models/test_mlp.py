import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.linen import BatchNorm
from bn_jax.models.mlp import MLP

X = np.random.default_rng(0).random((16, 4, 3, 1), np.float32)
LABELS = np.arange(16) % 10
BN = functools.partial(BatchNorm, momentum=0.9)


def loss(model, variables, params):
    logits, updates = model.apply(
        {**variables, "params": params}, X, train=True, mutable=["batch_stats"]
    )
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, LABELS[:, None], 1)), updates


@functools.partial(jax.jit, static_argnums=0)
def init(model):
    return model.init(jax.random.key(1), X[:2], train=False)


@functools.partial(jax.jit, static_argnums=0)
def descend(model):
    """The losses and updates of 30 steps."""
    variables = init(model)
    gradient = jax.value_and_grad(functools.partial(loss, model, variables), 0, True)

    def step(params, _):
        (value, updates), gradients = gradient(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients)
        return params, (value, updates)

    return jax.lax.scan(step, variables["params"], length=30)[1]


@functools.partial(jax.jit, static_argnums=0)
def init_and_train(model):
    """Initial variables, and the logits of training mode."""
    variables = init(model)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    return variables, apply(variables, X)[0]


def standard(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("norm", [BN, None])
def test_mlp_is_its_layers_one_after_another(norm, after):
    model = MLP((5, 4), jax.nn.relu, norm=norm, norm_after_activation=after)
    variables, logits = jax.device_get(init_and_train(model))
    # Scales are 1 and biases 0 at the start.
    x = X.reshape(16, 12)
    for name in ("dense1", "dense2"):
        x = x @ variables["params"][name]["kernel"]
        if norm is None:
            x = relu(x)
        elif after:
            x = standard(relu(x))
        else:
            x = relu(standard(x))
    expected = x @ variables["params"]["dense3"]["kernel"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_bias_before_a_norm_is_left_out_and_would_receive_no_gradient():
    assert "bias" not in jax.eval_shape(init, MLP(norm=BN))["params"]["dense1"]
    for model in (MLP(), MLP(norm=BN, norm_after_activation=True)):
        assert "bias" in jax.eval_shape(init, model)["params"]["dense1"]
    model = MLP(norm=BN, bias_before_norm=True)

    @jax.jit
    def at_start():
        variables = init(model)
        return jax.grad(functools.partial(loss, model, variables), has_aux=True)(
            variables["params"]
        )

    gradient, _ = jax.device_get(at_start())
    for layer in ("dense1", "dense2", "dense3"):
        assert np.abs(gradient[layer]["bias"]).max() < 1e-6
        assert np.abs(gradient[layer]["kernel"]).max() > 1e-4
    assert np.abs(gradient["dense4"]["bias"]).max() > 1e-4


def test_linear_network_is_one_matrix():
    model = MLP((5,) * 4, lambda x: x)
    variables = jax.device_get(init(model))
    kernels = [variables["params"][f"dense{i}"]["kernel"] for i in range(1, 6)]
    np.testing.assert_allclose(
        jax.jit(functools.partial(model.apply, train=False))(variables, X),
        X.reshape(16, 12) @ np.linalg.multi_dot(kernels),
        atol=1e-5,
    )


@pytest.mark.parametrize("norm", [BN, None])
def test_steps_lower_the_loss_and_move_the_statistics(norm):
    losses, updates = jax.device_get(descend(MLP((20, 20), norm=norm)))
    assert losses[-1] < losses[0] - 0.05
    assert set(updates) == (set() if norm is None else {"batch_stats"})
    if norm is not None:
        moved = updates["batch_stats"]["norm1"]["mean"][-1]
        assert np.abs(moved).min() > 0


def test_prediction_of_an_example_does_not_depend_on_its_company():
    model = MLP((5, 4), jax.nn.relu, norm=BN)
    variables = init(model)
    predict = jax.jit(functools.partial(model.apply, train=False))
    together, alone = predict(variables, X), predict(variables, X[3:4])
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
