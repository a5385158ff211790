"""`TrainState`: all that a training step changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import Array
from jax.flatten_util import ravel_pytree

from bn_jax import models
from bn_jax.fields import ConfigError
from bn_jax.models.lenet import LeNet
from bn_jax.training.config import TrainConfig

LAST_LAYER = "dense3"  # of LeNet


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
    try:
        norm = models.norm_by_name(
            config.norm,
            momentum=config.momentum,
            epsilon=config.epsilon,
            **(norm_options or {}),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    layers: Any = config.norm_layers
    if isinstance(layers, str):
        layers = tuple(digit == "1" for digit in layers)
    return LeNet(
        norm=norm,
        norm_layers=layers,
        bias_before_norm=config.bias_before_norm,
        activation={"sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}[config.activation],
        dropout_rate=config.dropout_rate,
        dropout_at=config.dropout_at,  # type: ignore[arg-type]
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
    if config.trained == "random":
        return optax.chain(optimizer, _frozen_at_random(config.seed))
    if config.trained == "all" and config.train_gamma is config.train_beta is True:
        return optimizer
    return optax.chain(optimizer, _frozen_layers(config))


def _frozen_layers(config: TrainConfig) -> optax.GradientTransformation:
    """Return what drops the updates of what does not learn, by layer and kind."""
    of_norms = {"scale": config.train_gamma, "bias": config.train_beta}

    def update(path: tuple[Any, ...], value: Array) -> Array:
        layer, name = path[-2].key, path[-1].key
        if layer.startswith("norm"):
            return jnp.where(of_norms[name], value, 0)
        others = {"all": True, "norm": False, "norm_and_last": layer == LAST_LAYER}
        return value if others[config.trained] else jnp.zeros_like(value)

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(update, updates)
    )


class _LearnsState(NamedTuple):
    """Which parameters learn."""

    learns: Any  # booleans, a tree like the parameters


def _frozen_at_random(seed: int | Array) -> optax.GradientTransformation:
    """Return what lets as many parameters learn as norms have, none of them a norm's.

    Args:
      seed: decides which.
    """

    def init(params: Any) -> _LearnsState:
        others = {k: v for k, v in params.items() if not k.startswith("norm")}
        norms = {k: v for k, v in params.items() if k.startswith("norm")}
        count = sum(leaf.size for leaf in jax.tree.leaves(norms))
        flat, unravel = ravel_pytree(others)
        # Another key than that of the initial weights.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        chosen = jax.random.permutation(key, flat.size) < count
        learns = jax.tree.map(jnp.bool_, unravel(chosen.astype(flat.dtype)))
        return _LearnsState(
            {**learns, **jax.tree.map(lambda v: jnp.zeros(v.shape, bool), norms)}
        )

    def update(
        updates: Any, state: _LearnsState, params: Any = None
    ) -> tuple[Any, _LearnsState]:
        del params
        frozen = jax.tree.map(lambda u, w: jnp.where(w, u, 0), updates, state.learns)
        return frozen, state

    return optax.GradientTransformation(init, update)


def dropout_key(config: TrainConfig) -> Array | None:
    """Return the key of what training drops, or None where that is nothing."""
    if config.dropout_rate == 0:
        return None
    return jax.random.fold_in(jax.random.key(config.seed), 2)


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
    return make_init(model, images_shape)(key)


def make_init(
    model: nn.Module, images_shape: tuple[int, ...]
) -> Callable[[Array], dict[str, Any]]:
    """Return `init_variables` as a function of the key, compiled once for all keys."""
    images = jnp.zeros((1, *images_shape))
    init = jax.jit(model.init, static_argnames="train")
    return lambda key: {"batch_stats": {}, **init(key, images, train=False)}


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
