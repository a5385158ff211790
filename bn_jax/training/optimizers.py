"""Optimizers by name, and all that a step does to gradients.

In this order: gradients are clipped, weight decay is added, the optimizer makes updates
of them, rate factors scale the updates, and those of frozen parameters are set to 0. A
part that a config does not use is left out, so that plain SGD is `optax.sgd` alone.
Parameters that are averages are apart from all this: their gradient moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

import optax
from jax import Array

from bn_jax.fields import BELOW_1, POSITIVE, SHARE, ConfigError
from bn_jax.names import TRACEABLE, Table
from bn_jax.training import parameters
from bn_jax.training.parameters import TRAINED
from bn_jax.training.schedules import SCHEDULES, Run

# A TrainConfig, whose module imports this one: it has optimizer, schedule, trained,
# learning_rate, weight_decay, decay, clip_norm, rate_factors, seed, epochs, and
# `traced(field)`, the traced values of the options of a field.
Config: TypeAlias = Any
Rate: TypeAlias = float | Array | optax.Schedule
Mask: TypeAlias = Callable[[Any], Any] | None  # of parameters that decay; None for all

# What weight decay applies to.
DECAYED: dict[str, Mask] = {"kernels": parameters.kernels, "all": None}


def make_optimizer(
    config: Config, *, steps_per_epoch: int
) -> optax.GradientTransformation:
    """Return the optimizer that a config describes.

    Args:
      config: a TrainConfig. Its learning rate, weight decay, norm to clip at and seed
        may be traced.
      steps_per_epoch: number of the optimizer's steps; with gradient accumulation, less
        than that of forward passes.

    Returns:
      An optimizer whose `init` raises ConfigError if a rate factor or `trained` does
      not fit the model's parameters.

    Raises:
      ConfigError: if options do not go together, such as a warm-up that is longer than
        the run.

    References:
      Pascanu, Mikolov and Bengio, 2013, "On the difficulty of training recurrent neural
      networks", arXiv:1211.5063 (clipping).
    """
    rate: Rate = config.learning_rate
    if SCHEDULES.canonical(config.schedule) != "constant":
        rate = make_schedule(config, steps_per_epoch=steps_per_epoch)
    freeze = TRAINED.make(config.trained, seed=config.seed, **config.traced("trained"))
    factors = parameters.parse_rate_factors(config.rate_factors)

    parts = []
    if not _is_zero(config.clip_norm):
        if freeze is not None:  # Frozen parameters are not part of the norm.
            parts.append(freeze)
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(
        OPTIMIZERS.make(
            config.optimizer,
            learning_rate=rate,
            weight_decay=config.weight_decay,
            mask=DECAYED[config.decay],
            **config.traced("optimizer"),
        )
    )
    if factors:
        parts.append(parameters.scale_by(factors))
    if freeze is not None:
        parts.append(freeze)
    optimizer = parts[0] if len(parts) == 1 else optax.chain(*parts)
    return parameters.with_averages(optimizer)


def make_schedule(config: Config, *, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps taken.

    Args:
      config: a TrainConfig.
      steps_per_epoch: number of the optimizer's steps.

    Raises:
      ConfigError: if the warm-up does not end within the run, or not before the rate is
        first reduced, or the shares at which it is reduced do not ascend.
    """
    return SCHEDULES.make(
        config.schedule,
        learning_rate=config.learning_rate,
        run=Run(config.epochs, steps_per_epoch),
    )


def sgd(
    *,
    learning_rate: Rate,
    weight_decay: float | Array,
    mask: Mask,
    momentum: Annotated[float, SHARE, TRACEABLE] = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD, with momentum if it is not 0; weight decay is added to the gradient.

    A step's direction is the gradient plus `momentum` times the last direction: a sum,
    not a mean.

    Raises:
      ConfigError: if `nesterov` is true without momentum.

    References:
      Sutskever et al., 2013, "On the importance of initialization and momentum in deep
      learning".
    """
    if _is_zero(momentum):
        if nesterov:
            raise ConfigError(
                "optimizer='sgd:nesterov=true' without momentum; expected one, such as "
                "sgd:momentum=0.9,nesterov=true"
            )
        optimizer = optax.sgd(learning_rate)
    else:
        optimizer = optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov)
    return _with_l2(optimizer, weight_decay, mask)


def adam(
    *,
    learning_rate: Rate,
    weight_decay: float | Array,
    mask: Mask,
    b1: Annotated[float, BELOW_1] = 0.9,
    b2: Annotated[float, BELOW_1] = 0.999,
    epsilon: Annotated[float, POSITIVE] = 1e-8,
) -> optax.GradientTransformation:
    """Adam; weight decay is added to the gradient.

    `b1` and `b2` are weights of the old averages; `epsilon` is added to the root.

    References:
      Kingma and Ba, 2015, "Adam: a method for stochastic optimization",
      arXiv:1412.6980.
    """
    optimizer = optax.adam(learning_rate, b1=b1, b2=b2, eps=epsilon)
    return _with_l2(optimizer, weight_decay, mask)


def adamw(
    *,
    learning_rate: Rate,
    weight_decay: float | Array,
    mask: Mask,
    b1: Annotated[float, BELOW_1] = 0.9,
    b2: Annotated[float, BELOW_1] = 0.999,
    epsilon: Annotated[float, POSITIVE] = 1e-8,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, which is scaled by the learning rate.

    References:
      Loshchilov and Hutter, 2019, "Decoupled weight decay regularization",
      arXiv:1711.05101.
    """
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask
    )


def rmsprop(
    *,
    learning_rate: Rate,
    weight_decay: float | Array,
    mask: Mask,
    decay: Annotated[float, BELOW_1] = 0.9,
    epsilon: Annotated[float, POSITIVE] = 1e-8,
) -> optax.GradientTransformation:
    """RMSProp; weight decay is added to the gradient.

    `decay` is the weight of the old mean square, which starts from 0 and is not
    debiased; `epsilon` is added under the root.

    References:
      Tieleman and Hinton, 2012, "Lecture 6.5: RMSProp", of the course "Neural networks
      for machine learning".
    """
    optimizer = optax.rmsprop(learning_rate, decay=decay, eps=epsilon)
    return _with_l2(optimizer, weight_decay, mask)


def lamb(
    *,
    learning_rate: Rate,
    weight_decay: float | Array,
    mask: Mask,
    b1: Annotated[float, BELOW_1] = 0.9,
    b2: Annotated[float, BELOW_1] = 0.999,
    epsilon: Annotated[float, POSITIVE] = 1e-6,
) -> optax.GradientTransformation:
    """LAMB: Adam with decoupled weight decay and a rate for each parameter array.

    References:
      You et al., 2020, "Large batch optimization for deep learning: training BERT in 76
      minutes", arXiv:1904.00962.
    """
    return optax.lamb(
        learning_rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask
    )


def lion(
    *,
    learning_rate: Rate,
    weight_decay: float | Array,
    mask: Mask,
    b1: Annotated[float, BELOW_1] = 0.9,
    b2: Annotated[float, BELOW_1] = 0.99,
) -> optax.GradientTransformation:
    """Lion: the sign of a momentum, with decoupled weight decay.

    References:
      Chen et al., 2023, "Symbolic discovery of optimization algorithms",
      arXiv:2302.06675.
    """
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)


OPTIMIZERS: Table[optax.GradientTransformation] = Table(
    "optimizer",
    {
        "sgd": sgd,
        "adam": adam,
        "adamw": adamw,
        "rmsprop": rmsprop,
        "lamb": lamb,
        "lion": lion,
    },
)


def _with_l2(
    optimizer: optax.GradientTransformation, weight_decay: float | Array, mask: Mask
) -> optax.GradientTransformation:
    """Add `weight_decay` times the parameters to the gradients."""
    if _is_zero(weight_decay):
        return optimizer
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), optimizer)


def _is_zero(value: float | Array) -> bool:
    """Return whether a value is a number, not traced, and 0."""
    return isinstance(value, (int, float)) and value == 0
