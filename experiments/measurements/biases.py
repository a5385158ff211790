"""How biases before a norm change the loss and the output of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bn_jax.data import ImageData
from bn_jax.training.config import TrainConfig, value_of
from bn_jax.training.task import Task, make_network
from experiments.scores import Row

LAYERS = ("conv1", "conv2", "dense1", "dense2")  # of LeNet, each before a norm


def effects(row: Row, variables: Mapping[str, Any], data: ImageData) -> Row:
    """Measure, in float64 on 256 images, how biases before a norm change a network.

    Returns:
      `parameters`, their number; and where there are biases, `gradient_ratio`, for each
      layer the largest gradient of a bias divided by the largest of a weight, and
      `output_change`, the largest change of a logit when a standard normal number is
      added to each bias.
    """
    params = variables["params"]
    found: Row = {"parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(params))}
    if not value_of(row["config"], "model.bias_before_norm"):
        return found
    with jax.enable_x64(True):
        config = TrainConfig.from_dict(row["config"])
        network = make_network(config, Task.of(config, data))
        variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables)
        params = variables["params"]
        images = jnp.asarray(data.train.images[:256])
        labels = jnp.asarray(data.train.labels[:256])

        def logits_of(params: Any) -> Array:
            return network.predict_by_batch({**variables, "params": params}, images)

        def loss_of(params: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(
                logits_of(params), labels
            ).mean()

        gradients = jax.jit(jax.grad(loss_of))(params)
        rng = np.random.default_rng(0)
        moved = {
            layer: {**own, "bias": own["bias"] + rng.normal(size=own["bias"].shape)}
            for layer, own in params.items()
            if layer in LAYERS
        }
        apply = jax.jit(logits_of)
        change = jnp.abs(apply({**params, **moved}) - apply(params)).max()

        def ratio(gradient: Mapping[str, Array]) -> float:
            bias, kernel = (jnp.abs(gradient[k]).max() for k in ("bias", "kernel"))
            return float(bias / kernel)

        return {
            **found,
            "gradient_ratio": {layer: ratio(gradients[layer]) for layer in LAYERS},
            "output_change": float(change),
        }
