"""Flax modules of the other transforms, to be put where `bn_jax.linen.BatchNorm` is.

Each is called as `norm(use_running_average=..., axis=..., name=...)(x)`; its
parameters are `params{scale,bias}`, each of shape `[C]`, and its state, where there is
any, is in `batch_stats`. Options beyond those of the functions are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array

from bn_jax import moments as moments_lib
from bn_jax.functional import BatchNormParams
from bn_jax.variants import quantile, whitening
from bn_jax.variants.per_example import group_norm, single_axis


class _Norm(nn.Module):
    """What the modules share.

    Attributes:
      use_running_average: True in prediction, False in training. Given here or in the
        call.
      axis: the feature axis.
      momentum: weight of the OLD average in the running averages.
      epsilon: see the function that the module calls.
      param_dtype: of scale and bias.
      use_bias: whether a bias (beta) is added.
      use_scale: whether the result is multiplied by a scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name (or tuple of names) of the mapped axes that share statistics. It
        need not be bound while the module is initialised.
      batch_axis: axis of the examples.
    """

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    axis_name: Any = None
    batch_axis: int = 0

    def _params(self, num_features: int) -> BatchNormParams:
        shape, dtype = (num_features,), self.param_dtype
        return BatchNormParams(
            self.param("scale", self.scale_init, shape, dtype)
            if self.use_scale
            else None,
            self.param("bias", self.bias_init, shape, dtype) if self.use_bias else None,
        )

    def _num_features(self, x: Array) -> int:
        moments_lib.check_input(x, self.axis)
        return x.shape[single_axis(x, "axis", self.axis)]

    def _run(
        self,
        transform: Callable[..., tuple[Array, Any]],
        x: Array,
        initial: Any,
        use_running_average: bool | None,
        **options: Any,
    ) -> Array:
        """Call a transform whose state, a NamedTuple, is in `batch_stats`."""
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        variables = {
            name: self.variable("batch_stats", name, lambda value=value: value)
            for name, value in initial._asdict().items()
        }
        # While it is initialised: no collective, no average moved.
        moves = not use_running_average and not self.is_initializing()
        y, state = transform(
            x,
            self._params(self._num_features(x)),
            type(initial)(**{name: v.value for name, v in variables.items()}),
            train=not use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            feature_axis=self.axis,
            axis_name=None if self.is_initializing() else self.axis_name,
            update_state=moves,
            **options,
        )
        if moves:
            for name, variable in variables.items():
                variable.value = getattr(state, name)
        return y


class GroupNorm(_Norm):
    """Group normalisation: `bn_jax.variants.per_example.group_norm`.

    It has no state: `use_running_average`, `momentum` and `axis_name` are accepted
    because batch norm takes them, and change nothing.

    Attributes:
      num_groups: number of contiguous groups of features, a divisor of C.

    References:
      Wu and He, 2018, "Group Normalization", arXiv:1803.08494.
    """

    num_groups: int = 2

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Normalise `x`.

        Args:
          x: array of rank 2 or more with the features on `axis`.
          use_running_average: accepted because batch norm takes it.

        Returns:
          Array of x's shape and dtype.

        Raises:
          TypeError: as `group_norm` says.
          ValueError: as `group_norm` says.
        """
        del use_running_average
        x = jnp.asarray(x)
        num_features = self._num_features(x)
        y, _ = group_norm(
            x,
            self._params(num_features),
            num_groups=self._groups(num_features),
            epsilon=self.epsilon,
            feature_axis=self.axis,
            batch_axis=self.batch_axis,
        )
        return y

    def _groups(self, num_features: int) -> int:
        del num_features
        return self.num_groups


class LayerNorm(GroupNorm):
    """Layer normalisation over features and positions: `GroupNorm` of one group.

    References:
      Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv:1607.06450.
    """

    num_groups: int = 1


class InstanceNorm(GroupNorm):
    """Instance normalisation: `GroupNorm` of a group for each feature.

    `num_groups` is not read.

    References:
      Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization: The Missing
      Ingredient for Fast Stylization", arXiv:1607.08022.
    """

    def _groups(self, num_features: int) -> int:
        return num_features


class Whitening(_Norm):
    """Batch whitening: `bn_jax.variants.whitening.whiten`.

    `batch_axis` is accepted because batch norm takes it, and changes nothing.

    Attributes:
      method: "zca", "pca", "cholesky" or "iternorm".
      group_size: features whitened together, a divisor of C; None for all C.
      max_group_size: instead of it, for layers of different C: groups are of the
        greatest divisor of C that is not above.
      num_iterations: of "iternorm".

    References:
      Huang et al., 2018, "Decorrelated Batch Normalization", arXiv:1804.08450.
    """

    method: whitening.Method = "zca"
    group_size: int | None = None
    max_group_size: int | None = None
    num_iterations: int = 5

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Whiten `x`.

        Args:
          x: array of rank 2 or more with the features on `axis`.
          use_running_average: as the attribute; given in one place, not in both.

        Returns:
          Array of x's shape and dtype.

        Raises:
          TypeError: as `whiten` says.
          ValueError: as `whiten` says.
        """
        x = jnp.asarray(x)
        num_features = self._num_features(x)
        group_size = self._group_size(num_features)
        _, initial = whitening.init(num_features, group_size=group_size, dtype=x.dtype)
        return self._run(
            whitening.whiten,
            x,
            initial,
            use_running_average,
            method=self.method,
            group_size=group_size,
            num_iterations=self.num_iterations,
        )

    def _group_size(self, num_features: int) -> int | None:
        if self.max_group_size is None:
            return self.group_size
        if self.group_size is not None or self.max_group_size < 1:
            raise ValueError(
                f"max_group_size={self.max_group_size} with group_size="
                f"{self.group_size}; give one of them, at least 1"
            )
        largest = min(self.max_group_size, num_features)
        return next(d for d in range(largest, 0, -1) if num_features % d == 0)


class QuantileNorm(_Norm):
    """Probability integral transform: `bn_jax.variants.quantile.quantile_norm`.

    `batch_axis` is accepted because batch norm takes it, and changes nothing.

    Attributes:
      epsilon: distance below which knots are tied, as a share of the distance between
        the outer knots.
      target: "uniform" or "gaussian".
      num_quantiles: number of knots.

    References:
      Rosenblatt, 1952, "Remarks on a multivariate transformation".
    """

    epsilon: float = 1e-3
    target: quantile.Target = "uniform"
    num_quantiles: int = 64

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Transform `x`.

        Args:
          x: array of rank 2 or more with the features on `axis`.
          use_running_average: as the attribute; given in one place, not in both.

        Returns:
          Array of x's shape and dtype.

        Raises:
          TypeError: as `quantile_norm` says.
          ValueError: as `quantile_norm` says.
        """
        x = jnp.asarray(x)
        _, initial = quantile.init(
            self._num_features(x),
            target=self.target,
            num_quantiles=self.num_quantiles,
            dtype=x.dtype,
        )
        return self._run(
            quantile.quantile_norm,
            x,
            initial,
            use_running_average,
            target=self.target,
            num_quantiles=self.num_quantiles,
        )
