"""Flax NNX: `BatchNorm`, drop-in for Flax's, and `Norm`, a module of any transform.

`norm` gives the constructor of a layer by name, such as `norm("whitening:method=zca")`.
"""

from __future__ import annotations

from bn_jax import extras

extras.need("flax", "flax")

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn import dtypes
from jax import Array, lax

from bn_jax import modules, transforms
from bn_jax import moments as moments_lib
from bn_jax.averages import BatchNormState
from bn_jax.checks import (
    AFFINE,
    AVERAGES,
    check_layer_fits,
    check_one_integer,
    check_static,
)
from bn_jax.contract import Transform
from bn_jax.moments import Moments
from bn_jax.transforms import Average


def norm(
    spec: str | Transform,
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
    **attributes: Any,
) -> Callable[..., nnx.Module] | None:
    """Return the constructor of a normalisation layer.

    It is called as `constructor(num_features, rngs=...)`, with further attributes or
    options if need be, and the layer as `layer(x)`.

    Args:
      spec: a name of `bn_jax.transforms.NORMS` with its options, or a transform.
        "batch_norm" makes `BatchNorm`, "flax" Flax's own layer, "none" is None, and all
        others make `Norm`. Options that are not given have the defaults of `NORMS`: the
        momentum of the first two is 0.9, not Flax's 0.99.
      options: values of options that go before those in `spec`.
      **attributes: further attributes of the layer, such as `axis_name`, or options,
        such as `momentum`. None is the same as none given.

    Raises:
      ConfigError: if there is no such name, option or attribute, a value is out of
        range, the norm takes no such axis names or ghost batches, or options are given
        for a transform; of what the constructor is given, when it is called.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = norm("group:num_groups=2")(4, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0, 3.0, 0.0, 0.0]])).round(3).tolist()
      [[-1.0, 1.0, 0.0, 0.0]]
    """
    name, made, values, others = modules.layer_of(spec, options, attributes)
    if made is None:
        return None
    kind: Any = {"batch_norm": BatchNorm, "flax": nnx.BatchNorm}.get(name or "", Norm)
    if kind is Norm:
        others["transform"] = made
    bound = {**values, **others} if kind is not Norm else others
    modules.check_attributes(spec, bound, kind)

    def constructor(num_features: int, **given: Any) -> nnx.Module:
        if modules.check_attributes(spec, given, kind):  # another transform
            again = norm(spec, options=options, **{**attributes, **given})
            assert again is not None
            return again(num_features)
        make = _flaxs if name == "flax" else kind
        layer: nnx.Module = make(num_features, **{**bound, **given})
        return layer

    return constructor


def _flaxs(num_features: int, *, batch_axis: int = 0, **attributes: Any) -> nnx.Module:
    """Return Flax's layer, which needs not know which axis has the examples."""
    del batch_axis
    return nnx.BatchNorm(num_features, **attributes)


class Norm(nnx.Module):
    """A layer of any transform.

    The parameters are of `nnx.Param` and the state of `nnx.BatchStat`, under the names
    of the fields of the transform's NamedTuples. Other attributes are the arguments,
    and may be set later: `use_running_average` by `train`, `eval`, `set_attributes` and
    `nnx.view`, too.

    Args:
      num_features: C, the size of the feature axis; or the sizes, where there are
        several and the transform takes them.
      transform: what is applied, such as `bn_jax.transforms.whitening(method="zca")`.
      use_running_average: True in prediction, False in training. What is given in the
        call goes before it.
      axis: the feature axis, or several where the transform takes them.
      dtype: of the result (default: that of input, parameters and state, promoted).
        Input and parameters are cast to it first.
      param_dtype: of the parameters.
      axis_name: name (or tuple of names) of the mapped axes that share statistics.
      axis_index_groups: partition of that axis into groups that share statistics.
      ghost_batch_size: number of examples, a divisor of the batch, that share
        statistics; see `BatchNorm`.
      batch_axis: axis of the examples.
      zero_masked: see `bn_jax.linen.BatchNorm`.
      scale_init: initializer of the scale, such as `nnx.initializers.zeros` for the
        last norm of a residual branch; None for the transform's own, ones.
      bias_init: initializer of the bias; None for the transform's own, zeros.
      rngs: source of the keys for the initializers; without any, it need not be given.

    Raises:
      ValueError: if there are several sizes, and the transform takes one feature axis;
        if an initializer is given for a parameter that the transform does not have, or
        without rngs.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax import transforms
      >>> layer = Norm(1, transforms.center(momentum=0.5))
      >>> layer(jnp.array([[1.0], [5.0]])).ravel().tolist()
      [-2.0, 2.0]
      >>> layer.mean[...].tolist()
      [1.5]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        transform: Transform,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        ghost_batch_size: int | None = None,
        batch_axis: int = 0,
        zero_masked: bool = False,
        scale_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        _add_state(self, transform, num_features)
        params, _ = transform.init(num_features, param_dtype)
        # Scale before bias, as in Flax: each draws a key.
        drawn_by = modules.check_initializers(
            transform, params, {"scale": scale_init, "bias": bias_init}
        )
        if drawn_by and rngs is None:
            raise ValueError(
                f"{' and '.join(f'{name}_init' for name in drawn_by)} is given, but no "
                "rngs to draw from; give rngs, such as nnx.Rngs(0)"
            )
        for name, initializer in drawn_by.items():
            assert rngs is not None
            value = getattr(params, name)
            drawn = initializer(rngs.params(), value.shape, value.dtype)
            params = params._replace(**{name: drawn})
        for name, value in params._asdict().items():
            setattr(self, name, nnx.data(None) if value is None else nnx.Param(value))

        self.num_features = num_features
        self.transform = transform
        self.use_running_average = use_running_average
        self.axis = axis
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.ghost_batch_size = ghost_batch_size
        self.batch_axis = batch_axis
        self.zero_masked = zero_masked

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
          use_running_average: goes before the attribute.
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
          ValueError: if `use_running_average` is given nowhere, both mask and weights
            are given, x has other features than the layer, the transform does not take
            what is given, or as its function says.
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
            promote_dtype=dtypes.promote_dtype,
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the attributes of this layer for `nnx.view`, which calls it on a copy.

        Args:
          use_running_average: True in prediction, False in training; None leaves it as
            it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class BatchNorm(nnx.Module):
    """Batch normalisation, drop-in for `flax.nnx.BatchNorm`.

    Parameters, defaults, variables (`scale` and `bias` of `nnx.Param`, `mean` and `var`
    of `nnx.BatchStat`) and results are Flax's, so that a swapped import changes no
    number and checkpoints move either way. Results differ, beyond 1e-5, only where
    Flax's are wrong:

    - Flax's default variance, E[x^2] - E[x]^2, loses its digits where the mean is large
      beside the deviation; ours holds to |mean| / deviation of 1e4 in float32.
    - In evaluation Flax rounds the running averages to `dtype`: with bfloat16 a mean of
      259 becomes 260. Ours never leave float32, and only the result is rounded.
    - Across an axis, Flax averages the instances' means and mean squares whatever their
      masks hold; ours weighs each instance by its count.
    - A batch that is masked out whole gives NaN in Flax; ours is normalised by the
      running averages and leaves them as they are.
    - A NaN that is masked out makes Flax's gradients NaN; ours stay finite.
    - Of complex inputs Flax keeps the real part of the mean; ours is complex.
    - Running averages that someone cast to half precision freeze in Flax where momentum
      is near 1; ours refuse to train so, and evaluate in float32.

    Attributes are the parameters, and may be set later: `use_running_average` by
    `train`, `eval`, `set_attributes` and `nnx.view`, too.

    Args:
      num_features: C, the size of the feature axis.
      use_running_average: True normalises by the running averages (prediction), False
        by the batch (training). What is given in the call goes before it.
      axis: the feature axis; all others are normalised over.
      momentum: weight of the OLD average in the running averages, in [0, 1].
      epsilon: added to the variance, greater than 0.
      dtype: of the result (default: that of input, parameters and running averages,
        promoted, so float32 or wider). Input and parameters are cast to it first.
      param_dtype: of scale and bias.
      use_bias: whether a bias (beta) is added.
      use_scale: whether the result is multiplied by a scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name (or tuple of names) of the mapped axes that share statistics.
        It need not be bound while the module is made.
      axis_index_groups: partition of that axis into groups that share statistics.
      use_fast_variance: accepted for Flax's sake; the variance is computed in the one
        way that is both fast and accurate.
      promote_dtype: function of a tuple and a keyword `dtype` that returns what is in
        the tuple cast to the dtype to compute in. The tuple begins with the input, ends
        with scale and bias, and has the state between, mean and var first. What is
        returned for the state is not used.
      rngs: source of the keys for the initializers.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      ghost_batch_size: number of examples, a divisor of the batch, that share
        statistics; see `bn_jax.batch_norm`. Under `jit` over a mesh these are groups
        of devices: of a batch of 64 on 8 devices, 16 are each two devices' examples.
      batch_axis: axis of the examples; ghost batches are cut along it.
      average: "exponential", with `momentum`; "debiased" or "cumulative", as for
        `bn_jax.linen.BatchNorm`. The last two keep the number of batches as `count`:
        restore it together with mean and var, or the first batch replaces them.
      zero_masked: see `bn_jax.linen.BatchNorm`.
      scale_offset: see there.

    Raises:
      ValueError: if `average` is unknown, or `num_features` is not an integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bn_jax.nnx import BatchNorm
      >>> layer = BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0], [3.0]])).round(3).ravel().tolist()
      [-1.0, 1.0]
      >>> layer.mean[...].round(3).tolist()
      [0.20000000298023224]
      >>> layer.eval()
      >>> layer(layer.mean[...][None]).tolist()
      [[0.0]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: nnx.Initializer = initializers.zeros,
        scale_init: nnx.Initializer = initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        ghost_batch_size: int | None = None,
        batch_axis: int = 0,
        average: Average = "exponential",
        zero_masked: bool = False,
        scale_offset: float = 0.0,
    ) -> None:
        shape = (check_one_integer(num_features),)
        check_static(use_bias=use_bias, use_scale=use_scale)

        def param(
            used: bool, initializer: nnx.Initializer, metadata: Mapping[str, Any]
        ) -> nnx.Param[Array] | None:
            if not used:
                # Data, not a static attribute, as in Flax: the structures are the same.
                return nnx.data(None)
            return nnx.Param(initializer(rngs.params(), shape, param_dtype), **metadata)

        _add_state(self, transforms.batch_norm(average=average), num_features)
        # Scale before bias, as in Flax: each draws a key.
        scale_init = modules.offset_init(scale_init, scale_offset)
        self.scale = param(use_scale, scale_init, scale_metadata)
        self.bias = param(use_bias, bias_init, bias_metadata)

        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.ghost_batch_size = ghost_batch_size
        self.batch_axis = batch_axis
        self.average = average
        self.zero_masked = zero_masked
        self.scale_offset = scale_offset

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
            example. Integers are promoted to float32.
          use_running_average: goes before the attribute.
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
          ValueError: if `use_running_average` is given nowhere, both mask and weights
            are given, x has other features than the layer, or as `bn_jax.batch_norm`
            says.
        """
        transform = transforms.batch_norm(
            momentum=self.momentum,
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            average=self.average,
        )
        return _apply(
            self,
            transform,
            x,
            use_running_average,
            mask=mask,
            weights=weights,
            update_average=update_average,
            statistics=statistics,
            promote_dtype=self.promote_dtype,
            scale_offset=self.scale_offset,
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the attributes of this layer for `nnx.view`, which calls it on a copy.

        Args:
          use_running_average: True normalises by the running averages, False by the
            batch; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _add_state(module: Any, transform: Transform, num_features: Any) -> None:
    modules.check_transform(transform)
    _, state = transform.init(num_features)
    for name, value in state._asdict().items():
        setattr(module, name, nnx.BatchStat(value))


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
    promote_dtype: Callable[..., Any],
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
      promote_dtype: see `BatchNorm`.
      scale_offset: see there.
    """

    def of_module(like: Any) -> Any:
        variables = {name: getattr(module, name) for name in like._fields}
        return type(like)(
            **{k: None if v is None else v[...] for k, v in variables.items()}
        )

    params, state = map(of_module, transform.init(module.num_features))
    train = False
    if state:
        if use_running_average is None:
            use_running_average = module.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is given nowhere; pass it to the layer or to the "
                "call, or set it with train(), eval() or nnx.view"
            )
        check_static(use_running_average=use_running_average)
        train = not use_running_average
    check_static(update_average=update_average, zero_masked=module.zero_masked)
    moves = train if update_average is None else update_average

    x, *promoted = promote_dtype((x, *state, *params), dtype=module.dtype)
    params = type(params)(*promoted[len(state) :])
    params = modules.with_offset(params, scale_offset)
    if not moves:
        state = jax.tree.map(_widened, state)
    dtype = dtypes.canonicalize_dtype(x, *params, dtype=module.dtype)
    batch, axis, weights = modules.as_batch(x, module.axis, mask, weights)
    per_feature = {**state._asdict(), **params._asdict()}
    per_feature = {k: v for k, v in per_feature.items() if k in (*AFFINE, *AVERAGES)}
    check_layer_fits(type(module).__name__, batch, axis, **per_feature)
    batch = _widened(batch)  # so that the result is rounded once, to dtype
    is_dummy = _is_tabulated(module)
    moves = moves and not (train and is_dummy)
    options = modules.options_of(
        module,
        transform,
        batch,
        feature_axis=axis,
        is_example=x.ndim == 1,
        weights=weights,
        statistics=statistics,
        train=train,
        update_state=moves,
        is_dummy=is_dummy,
    )
    kept = modules.kept(module, batch, axis, weights)
    y, state = transform.apply(
        modules.zero_unless(kept, batch), params, state, **options
    )
    if moves:
        # No gradient, as in Flax: the variables outlive the differentiated call.
        # The mean of complex inputs is complex, which [...] = would cast to real.
        for name, value in state._asdict().items():
            getattr(module, name).set_value(lax.stop_gradient(value))
    return modules.zero_unless(kept, y).astype(dtype).reshape(x.shape)


def _is_tabulated(module: Any) -> bool:
    """Return whether `nnx.tabulate` calls the module, a copy that it marks."""
    return hasattr(module, "_nnx_tabulate_id")


def _widened(x: Array) -> Array:
    return x.astype(moments_lib.statistics_dtype(x.dtype))
