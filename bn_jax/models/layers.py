"""What the models are made of: convolution, pooling, norms, activations by name.

Convolution and average pooling are in a chosen layout of the activations.

Layouts are named by their axes: `NHWC` is native on GPU and TPU; `CHWN`, batch last, is
two to four times faster for small networks on CPU, where each row of a patch is then a
contiguous run of the batch, and for LeNet on a GPU. Kernels are `[H, W, C_in, C_out]`
in both, so a checkpoint does not know the layout that it was trained in.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import initializers
from jax import Array, lax

from bn_jax.checks import check_static
from bn_jax.fields import ConfigError, Range, counted
from bn_jax.models.blocks import Pair, conv2d_by_blocks

Layout = Literal["NHWC", "CHWN"]
Padding = Literal["VALID", "SAME"] | tuple[Pair, Pair]
# The constructor of a normalisation; `norm_layer` says how it is called.
NormConstructor = Callable[..., nn.Module]

Activation = Literal["sigmoid", "relu", "tanh", "gelu", "silu", "linear"]
ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def activation_of(name: str) -> Callable[[Array], Array]:
    """Return the activation of a name.

    Raises:
      ConfigError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activation={name!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


# Of the option `norm_layers`.
DIGITS = Range(
    "one digit for each layer that may have a norm, 1 with and 0 without, as in 0011",
    lambda v: bool(v) and set(v) <= {"0", "1"},
)


def switches_of(digits: Any) -> Any:
    """Return the digits of the option `norm_layers` as booleans, one a layer.

    Anything but a text is returned as it is: None, booleans or a traced array.
    """
    if isinstance(digits, str):
        return tuple(digit == "1" for digit in digits)
    return digits


def norm_switches(
    norm: NormConstructor | None,
    norm_layers: Sequence[bool] | Array | None,
    num_layers: int,
) -> list[bool | Array]:
    """Return for each layer whether a norm follows it.

    Args:
      norm: constructor of the norms; None for none.
      norm_layers: one boolean for each layer, or an array of them, perhaps traced; None
        for a norm after each layer.
      num_layers: number of layers that may have a norm.

    Raises:
      ConfigError: if there are more or fewer booleans than layers.
    """
    if norm_layers is not None and len(norm_layers) != num_layers:
        raise ConfigError(
            f"norm_layers has {counted(len(norm_layers), 'digit')}; expected "
            f"{num_layers}, one for each layer that may have a norm"
        )
    if norm is None:
        return [False] * num_layers
    if norm_layers is None:
        return [True] * num_layers
    return [norm_layers[i] for i in range(num_layers)]


def with_scale_init(
    norm: NormConstructor | None, initializer: initializers.Initializer, option: str
) -> NormConstructor:
    """Return a constructor of norms whose scale (gamma) starts from an initializer.

    Args:
      norm: their constructor.
      initializer: of the scale.
      option: that asks for it, with what it says of the scale, for the error.

    Raises:
      ConfigError: if the constructor takes no `scale_init`, or there is none.
    """
    known = {} if norm is None else inspect.signature(norm).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if norm is None or not (takes_any or "scale_init" in known):
        raise ConfigError(
            f"{option}, and this norm's constructor takes no scale_init; give "
            f"norm=batch_norm, norm=group or another that does, or leave out "
            f"{option.partition('=')[0]}"
        )
    return functools.partial(norm, scale_init=initializer)


def norm_layer(
    norm: NormConstructor | None,
    *,
    train: bool,
    axis: int,
    batch_axis: int,
    name: str,
    switch: bool | Array = True,
) -> Callable[[Array], Array]:
    """Make a norm in the calling module.

    It is made as `norm(use_running_average=..., axis=..., batch_axis=...,
    name=...)`. Arguments that the constructor lacks are left out: Flax's
    `nn.BatchNorm` has no `batch_axis`. One that has no `axis`, such as Flax's
    `nn.LayerNorm`, gets examples on the first axis and features on the last.

    Args:
      norm: the constructor; None for the identity.
      train: whether the norm uses the batch's statistics and moves its averages.
      axis: of the features.
      batch_axis: of the examples.
      name: of the norm's module.
      switch: whether the norm is there. One that is traced decides at run time; the
        norm is then there, and passed by where the switch is off.

    Returns:
      The layer, or a function that calls it. Its result has x's shape; of x in half
      precision it is float32, to which norms promote for their parameters.

    Raises:
      TypeError: if `norm` is not a constructor, or `train` no boolean.
    """
    check_static(train=train)
    if norm is None or switch is False:
        return _identity
    if not callable(norm):
        raise TypeError(
            f"norm={norm!r}; expected a constructor, such as bn_jax.linen.BatchNorm or "
            "bn_jax.linen.norm('group:num_groups=2'), or None for no norm"
        )
    known = inspect.signature(norm).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    options: dict[str, Any] = {
        "use_running_average": not train,
        "axis": axis,
        "batch_axis": batch_axis,
    }
    options = {k: v for k, v in options.items() if takes_any or k in known}
    layer: Any = norm(**options, name=name)
    if "axis" not in options:
        layer = _features_last(layer, axis=axis, batch_axis=batch_axis)
    return layer if switch is True else _switched(layer, switch)


def _identity(x: Array) -> Array:
    return x


def _features_last(
    layer: Callable[[Array], Array], *, axis: int, batch_axis: int
) -> Callable[[Array], Array]:
    """Call a layer with the examples on the first axis and the features on the last."""
    here, there = (batch_axis, axis), (0, -1)

    def called(x: Array) -> Array:
        return jnp.moveaxis(layer(jnp.moveaxis(x, here, there)), there, here)

    return called


def _switched(
    layer: Callable[[Array], Array], switch: Array
) -> Callable[[Array], Array]:
    """Call a layer, and return its input where the switch is off."""
    return lambda x: jnp.where(switch, layer(x), x)


def to_logits(x: Array) -> Array:
    """Return x in float32, or wider where it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def default_layout(*, few_channels: bool = False) -> Layout:
    """Return the faster layout on JAX's default backend.

    Args:
      few_channels: whether convolutions have 16 channels at most, as those of LeNet.
    """
    backends = ("cpu", "gpu") if few_channels else ("cpu",)
    return "CHWN" if jax.default_backend() in backends else "NHWC"


def feature_axis(layout: Layout) -> int:
    """Return the axis of the channels in `layout`."""
    return check_layout(layout).index("C")


def check_layout(layout: str) -> str:
    """Return `layout`, or raise ValueError if there is no such layout."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r}; expected one of {get_args(Layout)}")
    return layout


def from_nhwc(x: Array, layout: Layout) -> Array:
    """Return a `[N, H, W, C]` array with its axes in the order of `layout`."""
    if check_layout(layout) == "NHWC":
        return x

    def by_rows(x: Array) -> Array:
        # A loop's result is written once. Else XLA would permute anew in each slice
        # that a convolution takes of it.
        rows = lax.map(lambda row: row.transpose(2, 1, 0), x.swapaxes(0, 1))
        return rows.swapaxes(0, 1)

    def at_once(x: Array) -> Array:
        return x.transpose(3, 1, 2, 0)

    return lax.platform_dependent(x, cpu=by_rows, default=at_once)


def to_nhwc(x: Array, layout: Layout) -> Array:
    """Return an array whose axes are in the order of `layout` as `[N, H, W, C]`."""
    return x.transpose([check_layout(layout).index(axis) for axis in "NHWC"])


def conv2d(
    x: Array,
    kernel: Array,
    layout: Layout,
    *,
    strides: int | Pair = 1,
    padding: Padding = "VALID",
) -> Array:
    """Convolve images, without padding and with stride 1 if not told otherwise.

    In the layout CHWN on a CPU or an NVIDIA GPU this is `conv2d_by_blocks`: XLA's own
    convolution is slow on a CPU inside loops, and on a GPU where channels are few.
    Elsewhere it is XLA's.

    Args:
      x: activations in `layout`.
      kernel: of shape `[H, W, C_in, C_out]`.
      layout: order of the axes of `x` and of the result.
      strides: pixels from one output to the next, down and across.
      padding: rows and columns of 0 around the image: "VALID", none; "SAME", as many as
        make ceil(size / stride) outputs, the odd one below and on the right, as in XLA;
        or `((above, below), (left, right))`.

    Raises:
      ValueError: if there is no such layout or padding, a stride is below 1, the
        channels of `x` and `kernel` differ, or the kernel is larger than the image.
    """
    strides, padding = _check_conv(x, kernel, layout, strides, padding)
    xla = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=(layout, "HWIO", layout),
    )
    if layout == "NHWC":
        return xla(x, kernel)
    by_blocks = functools.partial(conv2d_by_blocks, strides=strides, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=by_blocks, cuda=by_blocks, default=xla)


def _check_conv(
    x: Array,
    kernel: Array,
    layout: Layout,
    strides: int | Pair,
    padding: Padding,
) -> tuple[Pair, tuple[Pair, Pair]]:
    """Return strides and padding as pairs, after a check of all arguments."""
    check_layout(layout)
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"x of shape {x.shape} and kernel of shape {kernel.shape}; expected four "
            f"axes each, {layout} and [H, W, C_in, C_out]"
        )
    h, w, c_in = (x.shape[layout.index(axis)] for axis in "HWC")
    if kernel.shape[2] != c_in:
        raise ValueError(
            f"x of shape {x.shape} has {c_in} channels in layout {layout}, and kernel "
            f"of shape {kernel.shape} takes {kernel.shape[2]}; give x in that layout, "
            "or a kernel of [H, W, C_in, C_out] for its channels"
        )
    pair = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"strides={strides!r}; expected one or two integers from 1")
    pads: Sequence[Pair]
    if isinstance(padding, str) and padding in ("VALID", "SAME"):
        pads = lax.padtype_to_pads((h, w), kernel.shape[:2], pair, padding)
    elif not isinstance(padding, str) and np.shape(padding) == (2, 2):
        pads = padding
    else:
        raise ValueError(
            f"padding={padding!r}; expected VALID, SAME or "
            "((above, below), (left, right))"
        )
    (above, below), (left, right) = pads
    if min(above, below, left, right) < 0:
        raise ValueError(f"padding={padding!r}; expected no number below 0")
    padded = (h + above + below, w + left + right)
    if kernel.shape[0] > padded[0] or kernel.shape[1] > padded[1]:
        raise ValueError(
            f"kernel of {kernel.shape[:2]} pixels on an image of {padded} with padding "
            f"{padding!r}; expected a kernel no larger: pad more, or pool less before"
        )
    return pair, ((above, below), (left, right))


def avg_pool_2x2(x: Array, layout: Layout) -> Array:
    """Average over windows of 2 x 2, stride 2; a last odd row or column is left out.

    Args:
      x: activations in `layout`.
      layout: order of the axes of `x` and of the result.
    """
    h, w = (check_layout(layout).index(axis) for axis in "HW")  # w == h + 1
    x = lax.slice_in_dim(x, 0, x.shape[h] // 2 * 2, axis=h)
    x = lax.slice_in_dim(x, 0, x.shape[w] // 2 * 2, axis=w)
    for axis in (w, h):  # one by one, as batches on an explicit mesh need it
        windows = (x.shape[axis] // 2, 2)
        x = x.reshape(x.shape[:axis] + windows + x.shape[axis + 1 :])
    return x.mean((h + 1, h + 3))


def centred(kernel: Array) -> Array:
    """Return a kernel less the mean over the inputs of each output (the last axis).

    Its outputs are those of inputs less their mean over the patch.

    References:
      Qiao et al., 2019, "Weight standardization", arXiv:1903.10520; Yan et al., 2020,
      arXiv:2001.06838 (the mean alone).
    """
    return kernel - kernel.mean(range(kernel.ndim - 1), keepdims=True)


def centred_dot(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """Multiply by a kernel that is centred first; for `nn.Dense`'s `dot_general`."""
    return lax.dot_general(x, centred(kernel), *args, **options)


def compiled(initializer: initializers.Initializer) -> initializers.Initializer:
    """Return an initializer that is one program for each shape.

    So the many kernels of a deep model share a few programs; see
    `bn_jax.models.make_init`.
    """
    jitted: initializers.Initializer = jax.jit(initializer, static_argnums=(1, 2))
    return jitted


class Conv(nn.Module):
    """Convolution in a chosen layout, by default without padding and with stride 1.

    Attributes:
      features: number of output channels.
      kernel_size: height and width.
      layout: order of the axes of input and output.
      use_bias: whether a bias is added.
      strides: as `conv2d` takes them.
      padding: as `conv2d` takes it.
      kernel_init: initializer of the `[H, W, C_in, C_out]` kernel.
      is_centred: whether it convolves with the kernel less the mean of each output's.
      dtype: to compute in; None for that of input and parameters, promoted. Parameters
        are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    layout: Layout = "NHWC"
    use_bias: bool = True
    strides: int | Pair = 1
    padding: Padding = "VALID"
    kernel_init: initializers.Initializer = initializers.lecun_normal()
    is_centred: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve activations whose axes are in the order of `layout`."""
        c = feature_axis(self.layout)
        shape = (*self.kernel_size, x.shape[c], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        if self.is_centred:
            kernel = centred(kernel)
        bias = None
        if self.use_bias:
            bias = self.param("bias", initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv2d(x, kernel, self.layout, strides=self.strides, padding=self.padding)
        if bias is not None:
            y = y + jnp.expand_dims(bias, [a for a in range(4) if a != c])
        return y
