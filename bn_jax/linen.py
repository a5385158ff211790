"""Flax Linen: `BatchNorm`, drop-in for Flax's, and `Norm`, a module of any transform.

`norm` gives the constructor of a layer by name, such as `norm("whitening:method=zca")`.
"""

from __future__ import annotations

from bn_jax import extras

extras.need("flax", "flax")

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array

from bn_jax import modules, transforms
from bn_jax import moments as moments_lib
from bn_jax.averages import BatchNormState
from bn_jax.checks import AVERAGES, check_layer_fits, check_static
from bn_jax.contract import Transform
from bn_jax.moments import Moments
from bn_jax.transforms import Average


def norm(
    spec: str | Transform,
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
    **attributes: Any,
) -> Callable[..., nn.Module] | None:
    """Return the constructor of a normalisation layer.

    It is called as `constructor(use_running_average=..., axis=..., batch_axis=...,
    name=...)`, all of them optional, or with further attributes or options, and the
    layer as `layer(x)`.

    Args:
      spec: a name of `bn_jax.transforms.NORMS` with its options, or a transform.
        "batch_norm" makes `BatchNorm`, "flax" Flax's own layer, "none" is None, and all
        others make `Norm`. Options that are not given have the defaults of `NORMS`: the
        momentum of the first two is 0.9, not Flax's 0.99.
      options: values of options that go before those in `spec`, such as a traced
        `{"momentum": ...}`.
      **attributes: further attributes of the layer, such as `axis_name`, or options,
        such as `momentum`. None is the same as none given.

    Raises:
      ConfigError: if there is no such name, option or attribute, a value is out of
        range, the norm takes no such axis names or ghost batches, or options are given
        for a transform; of what the constructor is given, when it is called.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> layer = norm("group:num_groups=2")()
      >>> x = jnp.array([[1.0, 3.0, 0.0, 0.0]])
      >>> y, _ = layer.init_with_output(jax.random.key(0), x)
      >>> y.round(3).tolist()
      [[-1.0, 1.0, 0.0, 0.0]]
    """
    name, made, values, others = modules.layer_of(spec, options, attributes)
    if made is None:
        return None
    kind: Any = {"batch_norm": BatchNorm, "flax": nn.BatchNorm}.get(name or "", Norm)
    if kind is Norm:
        others["transform"] = made
    bound = {**values, **others} if kind is not Norm else others
    modules.check_attributes(spec, bound, kind)

    def constructor(
        use_running_average: bool | None = None, /, **given: Any
    ) -> nn.Module:
        if use_running_average is not None:  # in the place where Flax's layer has it
            given["use_running_average"] = use_running_average
        if modules.check_attributes(spec, given, kind):  # another transform
            again = norm(spec, options=options, **{**attributes, **given})
            assert again is not None
            return again()
        layer: nn.Module = (_flaxs if name == "flax" else kind)(**{**bound, **given})
        return layer

    return constructor


def _flaxs(*, batch_axis: int = 0, **attributes: Any) -> nn.Module:
    """Return Flax's layer, which needs not know which axis has the examples."""
    del batch_axis
    return nn.BatchNorm(**attributes)


class Norm(nn.Module):
    """A layer of any transform.

    Parameters are in `params` and the state in `batch_stats`, under the names of the
    fields of the transform's NamedTuples.

    Attributes:
      transform: what is applied, such as `bn_jax.transforms.whitening(method="zca")`.
      use_running_average: True in prediction, False in training. Given here or in the
        call; a transform without a state needs it nowhere.
      axis: the feature axis, or several where the transform takes them.
      dtype: of the result (default: that of input and parameters, promoted).
      param_dtype: of the parameters.
      axis_name: name (or tuple of names) of the mapped axes that share statistics. It
        need not be bound while the module is initialised.
      axis_index_groups: partition of that axis into groups that share statistics.
      ghost_batch_size: number of examples, a divisor of the batch, that share
        statistics; see `BatchNorm`.
      batch_axis: axis of the examples.
      zero_masked: whether the result is 0 where `mask` is False or `weights` are 0, as
        padding should be before it is summed; else it is normalised with the rest.
      scale_init: initializer of the scale, such as `nn.initializers.zeros` for the last
        norm of a residual branch; None for the transform's own, ones.
      bias_init: initializer of the bias; None for the transform's own, zeros.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from bn_jax import transforms
      >>> layer = Norm(transforms.center(), use_running_average=False)
      >>> x = jnp.array([[1.0], [5.0]])
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.ravel().tolist(), sorted(variables["batch_stats"])
      ([-2.0, 2.0], ['mean'])
    """

    transform: Transform
    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: Any = None
    axis_index_groups: Any = None
    ghost_batch_size: int | None = None
    batch_axis: int = 0
    zero_masked: bool = False
    scale_init: initializers.Initializer | None = None
    bias_init: initializers.Initializer | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        update_average: bool | None = None,
        statistics: Any = None,
    ) -> Array:
        """Normalise `x`.

        Args:
          x: see `BatchNorm`.
          use_running_average: as the attribute; given in one place, not in both.
          mask: see `BatchNorm`.
          weights: see `BatchNorm`.
          update_average: see `BatchNorm`.
          statistics: see `BatchNorm`.

        Returns:
          Array of x's shape, in `dtype`.

        Raises:
          TypeError: if `use_running_average`, where there is a state, or
            `update_average` is traced or no boolean, or as the transform's function
            says.
          ValueError: if `use_running_average` is given nowhere or twice, both mask and
            weights are given, `batch_stats` lack a part of the state or are of other
            features than x, the transform does not take what is given or lacks a
            parameter that an initializer is given for, or as its function says.
        """
        return _apply(
            self,
            self.transform,
            x,
            use_running_average,
            mask=mask,
            weights=weights,
            update_average=update_average,
            statistics=statistics,
            initializers={"scale": self.scale_init, "bias": self.bias_init},
        )

    @property
    def epsilon(self) -> Any:
        """What prediction adds to the variance, or None where it divides by none."""
        return self.transform.epsilon


class BatchNorm(nn.Module):
    """Batch normalisation, drop-in for `flax.linen.BatchNorm`.

    Attributes, defaults, collections (`params{scale,bias}`, `batch_stats{mean,var}`)
    and results are Flax's, so that a swapped import changes no number and checkpoints
    move either way. Results differ, beyond 1e-5, only where Flax's are wrong:

    - Flax's default variance, E[x^2] - E[x]^2, loses its digits where the mean is large
      beside the deviation; ours holds to |mean| / deviation of 1e4 in float32.
    - Across an axis, Flax averages the instances' means and mean squares whatever their
      masks hold; ours weighs each instance by its count.
    - A batch that is masked out whole gives NaN in Flax; ours is normalised by the
      running averages and leaves them as they are.
    - Statistics are in float32 or wider whatever the options say. The running averages
      of float64 inputs are float64 from the start; Flax's are float32 until the first
      update.

    What normalises, whether the averages move, and whether scale and bias learn are
    three choices: `use_running_average`, `update_average` in the call, and an optimizer
    masked by `bn_jax.variables.norm_param_mask`.

    Attributes:
      use_running_average: True normalises by the running averages (prediction), False
        by the batch (training). Given here or in the call.
      axis: the feature axis, or several; all others are normalised over.
      momentum: weight of the OLD average in the running averages, in [0, 1].
      epsilon: added to the variance, greater than 0.
      dtype: of the result (default: that of input and parameters, promoted).
      param_dtype: of scale and bias.
      use_bias: whether a bias (beta) is added.
      use_scale: whether the result is multiplied by a scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name (or tuple of names) of the mapped axes that share statistics.
        It need not be bound while the module is initialised.
      axis_index_groups: partition of that axis into groups that share statistics.
      use_fast_variance: accepted for Flax's sake; the variance is computed in the one
        way that is both fast and accurate.
      force_float32_reductions: accepted for Flax's sake; taken as True.
      ghost_batch_size: number of examples, a divisor of the batch, that share
        statistics; see `bn_jax.batch_norm`. Under `jit` over a mesh these are groups
        of devices: of a batch of 64 on 8 devices, 16 are each two devices' examples.
      batch_axis: axis of the examples; ghost batches are cut along it.
      average: "exponential", with `momentum`; "debiased", the same without the weight
        of the initial mean 0 and variance 1; or "cumulative", the mean over all
        batches. The last two keep the number of batches as `count` in `batch_stats`.
      zero_masked: whether the result is 0 where `mask` is False or `weights` are 0, as
        padding should be before it is summed; else it is normalised with the rest.
      scale_offset: added to the stored scale. With 1 the parameter is gamma - 1, which
        weight decay draws to a gamma of 1; `scale_init` is of gamma all the same.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bn_jax.linen import BatchNorm
      >>> layer, x = BatchNorm(momentum=0.75), jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y.round(3).ravel().tolist(), updates["batch_stats"]["mean"].tolist()
      ([-1.0, 1.0], [0.5])
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: initializers.Initializer = initializers.zeros
    scale_init: initializers.Initializer = initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    ghost_batch_size: int | None = None
    batch_axis: int = 0
    average: Average = "exponential"
    zero_masked: bool = False
    scale_offset: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        update_average: bool | None = None,
        statistics: BatchNormState | Moments | None = None,
    ) -> Array:
        """Normalise `x`.

        Args:
          x: array of rank 2 or more with the features on `axis`; or of rank 1, one
            example of a batch mapped by `jax.vmap`. Integers are promoted to float32.
          use_running_average: as the attribute; given in one place, not in both.
          mask: booleans that broadcast to `x`; False leaves a value out of the
            statistics (it is normalised all the same, or see `zero_masked`).
          weights: real, non-negative weights in the statistics, as `measure` takes
            them; given instead of `mask`.
          update_average: whether the running averages move; by default where the batch
            normalises.
          statistics: normalise by the mean and var in these, each of shape `[C]`,
            instead.

        Returns:
          Array of x's shape, in `dtype`.

        Raises:
          TypeError: if `use_running_average` or `update_average` is traced, or no
            boolean.
          ValueError: if `use_running_average` is given nowhere or twice, both mask and
            weights are given, `average` is unknown, `batch_stats` lack `count` or
            another part of the state or are of other features than x, or as
            `bn_jax.batch_norm` says.
        """
        transform = transforms.batch_norm(
            momentum=self.momentum,
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            average=self.average,
        )
        scale_init = modules.offset_init(self.scale_init, self.scale_offset)
        return _apply(
            self,
            transform,
            x,
            use_running_average,
            mask=mask,
            weights=weights,
            update_average=update_average,
            statistics=statistics,
            initializers={
                "scale": scale_init if self.use_scale else None,
                "bias": self.bias_init if self.use_bias else None,
            },
            scale_offset=self.scale_offset,
        )


# A function, not a method: `tabulate` would show a method as a call.
def _apply(
    module: Any,
    transform: Transform,
    x: Array,
    use_running_average: bool | None,
    *,
    mask: Array | None,
    weights: Array | None,
    update_average: bool | None,
    statistics: Any,
    initializers: Mapping[str, Callable[..., Array] | None],
    scale_offset: float = 0.0,
) -> Array:
    """Apply a transform to parameters and a state that are variables of a module.

    Args:
      module: whose attributes are those of `Norm` but `transform`.
      transform: what is applied.
      x: see `Norm`, and so are all others but the last two.
      use_running_average: see `x`.
      mask: see `x`.
      weights: see `x`.
      update_average: see `x`.
      statistics: see `x`.
      initializers: of parameters by name; None for the transform's own values.
      scale_offset: see `BatchNorm`.
    """
    modules.check_transform(transform)
    given = jnp.asarray(x)
    # Integers, too, as in Flax.
    x = given.astype(moments_lib.statistics_dtype(given.dtype))
    x, axis, weights = modules.as_batch(x, module.axis, mask, weights)
    moments_lib.check_input(x, axis)
    shape = tuple(x.shape[a] for a in moments_lib.feature_axes(x.ndim, axis))
    num_features = shape if len(shape) > 1 else shape[0]

    _, initial = transform.init(num_features, x.dtype)
    _check_complete(module, transform, initial._fields)
    variables = {
        name: module.variable("batch_stats", name, lambda value=value: value)
        for name, value in initial._asdict().items()
    }
    averages = {k: v.value for k, v in variables.items() if k in AVERAGES}
    check_layer_fits(_name(module), x, axis, **averages)
    first, _ = transform.init(num_features, module.param_dtype)
    drawn_by = modules.check_initializers(transform, first, initializers)

    def param(name: str, value: Array | None) -> Array | None:
        if value is None:
            return None
        initializer = drawn_by.get(name, lambda *_: value)
        return module.param(name, initializer, value.shape, value.dtype)

    params = type(first)(**{k: param(k, v) for k, v in first._asdict().items()})
    params = modules.with_offset(params, scale_offset)
    dtype = nn.dtypes.canonicalize_dtype(given, *params, dtype=module.dtype)

    train = False
    if variables:
        predict = nn.merge_param(
            "use_running_average", module.use_running_average, use_running_average
        )
        check_static(use_running_average=predict)
        train = not predict
    check_static(update_average=update_average, zero_masked=module.zero_masked)
    moves = train if update_average is None else update_average
    is_dummy = module.is_initializing()
    moves = moves and not (train and is_dummy)
    options = modules.options_of(
        module,
        transform,
        x,
        feature_axis=axis,
        is_example=given.ndim == 1,
        weights=weights,
        statistics=statistics,
        train=train,
        update_state=moves,
        is_dummy=is_dummy,
    )
    kept = modules.kept(module, x, axis, weights)
    state = type(initial)(**{name: v.value for name, v in variables.items()})
    y, state = transform.apply(modules.zero_unless(kept, x), params, state, **options)
    if moves:
        for name, variable in variables.items():
            variable.value = getattr(state, name)
    return modules.zero_unless(kept, y).astype(dtype).reshape(given.shape)


def _check_complete(module: Any, transform: Transform, names: Sequence[str]) -> None:
    """Refuse statistics of which some are missing: they would begin anew.

    A count that began at 0 beside averages that were restored would let the first batch
    replace them.
    """
    if module.is_initializing():
        return
    held = [name for name in names if module.has_variable("batch_stats", name)]
    missing = [name for name in names if name not in held]
    if held and missing:
        raise ValueError(
            f"batch_stats of {_name(module)} hold {' and '.join(held)}, but no "
            f"{' and '.join(missing)}, which norm={transform.name!r} keeps, too; add "
            "what is missing: as count the number of batches in the averages, or a "
            "large one such as 10**6 where it is not known"
        )


def _name(module: Any) -> str:
    """Return the name of a module, for messages."""
    return "/".join(module.path) or type(module).__name__
