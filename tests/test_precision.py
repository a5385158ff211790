"""Products that a promise rests on are of float32, whatever a backend's default.

That default is TF32 on a GPU and bfloat16 on a TPU. On a CPU all are the same, so that
programs are read here; conftest.py says how the values are tested on a GPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import folding, linen
from bn_jax.training import feed, loop, task
from bn_jax.training.config import TrainConfig
from bn_jax.training.optimizers import make_optimizer
from bn_jax.training.state import init_state
from bn_jax.transforms import NORMS
from marks import slow_but
from reference import normal


def precisions(function, *arguments):
    """What the products and convolutions of a function's program ask for, as a set."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    return {
        precision
        for line in products
        for precision in re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line) or ["DEFAULT"]
    }


WHITENINGS = ("zca", "cholesky", "pca", "iternorm")


@pytest.mark.parametrize(
    "spec",
    [
        *sorted(set(NORMS) - {"flax", "none", "whitening", "group"}),
        "group:num_groups=2",
        *(f"whitening:method={method}" for method in WHITENINGS),
    ],
)
def test_norms_multiply_in_float32_forward_and_backward(spec):
    transform = NORMS.make(spec)
    x = normal((16, 3, 8))
    params, state = transform.init(8)

    def loss(x, params):
        y, new = transform.apply(x, params, state, train=True)
        return jnp.sum(y**3), new

    found = precisions(jax.value_and_grad(loss, (0, 1), has_aux=True), x, params)
    assert found == ({"HIGHEST"} if spec.startswith("whitening") else set())


@pytest.mark.parametrize(
    ("precision", "expected"),
    slow_but(
        [("highest", "HIGHEST")],
        [("highest", "HIGHEST"), ("default", "DEFAULT"), ("bfloat16", "DEFAULT")],
    ),
)
def test_the_config_decides_of_the_products_of_the_model(
    precision, expected, tiny_data
):
    config = TrainConfig(precision=precision, batch_size=4, model="lenet")
    of_task = task.Task.of(config, tiny_data)
    network = task.make_network(config, of_task)
    optimizer = make_optimizer(config, steps_per_epoch=1)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    state = jax.eval_shape(lambda v: init_state(v, optimizer), variables)
    images = jax.ShapeDtypeStruct((4, 28, 28, 1), jnp.uint8)
    batch = feed.Batch(images, jax.ShapeDtypeStruct((4,), jnp.int32))
    step = loop.make_train_step(config, network, optimizer)
    assert precisions(step, state, batch) == {expected}
    assert precisions(network.predict, variables, images) == {expected}
    assert precisions(network.predict_by_batch, variables, images) == {expected}
    with jax.default_matmul_precision(
        "high"
    ):  # the user's own, where none is asked for
        found = precisions(network.predict, variables, images)
    assert found == ({"HIGHEST"} if precision == "highest" else {"HIGH"})


def test_folding_is_checked_in_float32():
    asked = []

    class Noting(nn.Module):
        norm: bool = True

        @nn.compact
        def __call__(self, x):
            asked.append(jax.config.jax_default_matmul_precision)
            x = nn.Dense(4, name="dense")(x)
            if self.norm:
                x = linen.BatchNorm(use_running_average=True, name="norm")(x)
            return x

    x = np.asarray(normal((5, 3)))
    variables = Noting().init(jax.random.key(0), x)
    asked.clear()
    with jax.default_matmul_precision("bfloat16"):
        folding.fold(Noting(), variables, x, without_norms=Noting(norm=False))
    assert asked and set(asked) == {"highest"}
