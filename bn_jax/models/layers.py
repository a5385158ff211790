"""Convolution and average pooling in a chosen layout of the activations.

Layouts are named by their axes: `NHWC` is native on GPU and TPU; `CHWN`, batch last, is
two to four times faster for small networks on CPU, where each row of a patch is then a
contiguous run of the batch. Kernels are `[H, W, C_in, C_out]` in both, so a checkpoint
does not know the layout that it was trained in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import initializers
from jax import Array, lax

from bn_jax.models.blocks import Pair, conv2d_by_blocks

Layout = Literal["NHWC", "CHWN"]
Padding = Literal["VALID", "SAME"] | tuple[Pair, Pair]


def default_layout() -> Layout:
    """Return the faster layout on JAX's default backend."""
    return "CHWN" if jax.default_backend() == "cpu" else "NHWC"


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
    # Row by row, since a loop's result is written once. Else XLA would permute anew in
    # each slice that a convolution takes of it.
    rows = lax.map(lambda row: row.transpose(2, 1, 0), x.swapaxes(0, 1))
    return rows.swapaxes(0, 1)


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

    In the layout CHWN on CPU this is `conv2d_by_blocks`, since XLA's own convolution is
    slow there inside loops; elsewhere it is XLA's.

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
    return lax.platform_dependent(x, kernel, cpu=by_blocks, default=xla)


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
    """

    features: int
    kernel_size: tuple[int, int]
    layout: Layout = "NHWC"
    use_bias: bool = True
    strides: int | Pair = 1
    padding: Padding = "VALID"
    kernel_init: initializers.Initializer = initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve activations whose axes are in the order of `layout`."""
        c = feature_axis(self.layout)
        shape = (*self.kernel_size, x.shape[c], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv2d(x, kernel, self.layout, strides=self.strides, padding=self.padding)
        if self.use_bias:
            bias = self.param("bias", initializers.zeros, (self.features,))
            y = y + jnp.expand_dims(bias, [a for a in range(4) if a != c])
        return y
