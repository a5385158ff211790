import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.linen import BatchNorm
from bn_jax.models.mlp import MLP

X = jax.random.uniform(jax.random.key(0), (16, 4, 3, 1))
LABELS = jnp.arange(16) % 10
BN = functools.partial(BatchNorm, momentum=0.9)


def loss(model, variables, params):
    logits, updates = model.apply(
        {**variables, "params": params}, X, train=True, mutable=["batch_stats"]
    )
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, LABELS[:, None], 1)), updates


def init(model):
    return model.init(jax.random.key(1), X[:2], train=False)


def standard(x):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("norm", [BN, None])
def test_mlp_is_its_layers_one_after_another(norm, after):
    model = MLP((5, 4), jax.nn.relu, norm=norm, norm_after_activation=after)
    variables = init(model)
    logits, _ = jax.jit(
        functools.partial(model.apply, train=True, mutable=["batch_stats"])
    )(variables, X)
    # Scales are 1 and biases 0 at the start.
    x = X.reshape(16, 12)
    for name in ("dense1", "dense2"):
        x = x @ variables["params"][name]["kernel"]
        if norm is None:
            x = jax.nn.relu(x)
        elif after:
            x = standard(jax.nn.relu(x))
        else:
            x = jax.nn.relu(standard(x))
    expected = x @ variables["params"]["dense3"]["kernel"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_bias_before_a_norm_is_left_out_and_would_receive_no_gradient():
    assert "bias" not in init(MLP(norm=BN))["params"]["dense1"]
    for model in (MLP(), MLP(norm=BN, norm_after_activation=True)):
        assert "bias" in init(model)["params"]["dense1"]
    model = MLP(norm=BN, bias_before_norm=True)
    variables = init(model)
    gradient, _ = jax.jit(
        jax.grad(functools.partial(loss, model, variables), has_aux=True)
    )(variables["params"])
    for layer in ("dense1", "dense2", "dense3"):
        assert jnp.abs(gradient[layer]["bias"]).max() < 1e-6
        assert jnp.abs(gradient[layer]["kernel"]).max() > 1e-4
    assert jnp.abs(gradient["dense4"]["bias"]).max() > 1e-4


def test_linear_network_is_one_matrix():
    model = MLP((5,) * 4, lambda x: x)
    variables = init(model)
    kernels = [variables["params"][f"dense{i}"]["kernel"] for i in range(1, 6)]
    np.testing.assert_allclose(
        model.apply(variables, X, train=False),
        X.reshape(16, 12) @ jnp.linalg.multi_dot(kernels),
        atol=1e-5,
    )


@pytest.mark.parametrize("norm", [BN, None])
def test_steps_lower_the_loss_and_move_the_statistics(norm):
    model = MLP((20, 20), norm=norm)
    variables = init(model)
    step = jax.jit(
        jax.value_and_grad(functools.partial(loss, model, variables), has_aux=True)
    )
    params, losses = variables["params"], []
    for _ in range(30):
        (value, updates), gradient = step(params)
        losses.append(value)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert losses[-1] < losses[0] - 0.05
    assert set(updates) == (set() if norm is None else {"batch_stats"})
    if norm is not None:
        moved = updates["batch_stats"]["norm1"]["mean"]
        assert jnp.abs(moved).min() > 0


def test_prediction_of_an_example_does_not_depend_on_its_company():
    model = MLP(norm=BN)
    variables = init(model)
    together = model.apply(variables, X, train=False)
    alone = model.apply(variables, X[3:4], train=False)
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)
