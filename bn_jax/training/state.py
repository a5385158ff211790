"""`TrainState`: all that a training step changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import Array

from bn_jax import models
from bn_jax.models.lenet import LeNet
from bn_jax.training.config import TrainConfig


class TrainState(struct.PyTreeNode):
    """What a step reads and returns."""

    step: Array  # number of steps taken; shape [], int32
    params: Any  # as `model.init` makes them
    batch_stats: Any  # the moving statistics; {} in a model without any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def make_model(
    config: TrainConfig,
    *,
    num_classes: int,
    norm_options: Mapping[str, Any] | None = None,
    ghost_batch_size: int | None = None,
) -> LeNet:
    """Return the model that `config` names.

    Args:
      config: names it.
      num_classes: of the data set.
      norm_options: attributes of the norms besides momentum and epsilon, such as the
        axis that shares statistics.
      ghost_batch_size: number of examples that share statistics; None for the batch.
    """
    norm = models.norm_by_name(
        config.norm,
        momentum=config.momentum,
        epsilon=config.epsilon,
        **(norm_options or {}),
    )
    layers: Any = config.norm_layers
    if isinstance(layers, str):
        layers = tuple(digit == "1" for digit in layers)
    return LeNet(
        norm=norm,
        norm_layers=layers,
        bias_before_norm=config.bias_before_norm,
        first_padding=config.first_padding,
        num_classes=num_classes,
        ghost_batch_size=ghost_batch_size,
    )


def make_optimizer(
    config: TrainConfig, *, steps_per_epoch: int
) -> optax.GradientTransformation:
    """Return the optimizer, with its schedule, that `config` names."""
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.schedule != "constant":
        rate = make_schedule(config, steps_per_epoch=steps_per_epoch)
    if config.optimizer == "momentum":
        optimizer = optax.sgd(rate, momentum=config.optimizer_momentum)
    else:
        optimizer = {"sgd": optax.sgd, "adam": optax.adam}[config.optimizer](rate)
    if config.train_gamma is True and config.train_beta is True:
        return optimizer
    return optax.chain(optimizer, _frozen_norms(config))


def _frozen_norms(config: TrainConfig) -> optax.GradientTransformation:
    """Return what drops the updates of gamma or beta where these do not learn."""

    def update(path: tuple[Any, ...], value: Array) -> Array:
        layer, name = path[-2].key, path[-1].key
        if not layer.startswith("norm"):
            return value
        learns = config.train_gamma if name == "scale" else config.train_beta
        return jnp.where(learns, value, 0)

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(update, updates)
    )


def make_schedule(config: TrainConfig, *, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps taken."""
    if config.schedule == "cosine":
        num_steps = config.epochs * steps_per_epoch
        return optax.cosine_decay_schedule(config.learning_rate, num_steps)
    return optax.constant_schedule(config.learning_rate)


def init_variables(
    model: nn.Module, key: Array, images_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Return a model's initial parameters and moving statistics.

    Args:
      model: called as `model(images, train=...)`.
      key: decides the parameters.
      images_shape: `[H, W, C]`.
    """
    images = jnp.zeros((1, *images_shape))
    variables = jax.jit(model.init, static_argnames="train")(key, images, train=False)
    return {"batch_stats": {}, **variables}


def init_state(
    variables: dict[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state before the first step, from a model's initial variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )
