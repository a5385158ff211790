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

Layout = Literal["NHWC", "CHWN"]
Pair = tuple[int, int]
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
    return x.transpose(["NHWC".index(axis) for axis in check_layout(layout)])


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


def conv2d_by_blocks(
    x: Array,
    kernel: Array,
    *,
    strides: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
) -> Array:
    """Convolve a batch-last image as one matrix product over blocks of outputs.

    With b = 1 this is the textbook im2col: every output is a product of the kernel with
    one patch. A block of b x b neighbouring outputs, at stride s, needs a patch only
    (b - 1) s larger, so folding b s x b s pixels into the channels (space to depth),
    convolving blocks by blocks, and unfolding the b x b x C_out channels again gives
    the same numbers from fewer, wider patches: less memory moved for some products with
    0. All slices run along whole blocks, whatever the stride, and leave the batch
    contiguous, which autodiff's transpose keeps; that of a strided slice is slow.

    Args:
      x: activations `[C_in, H, W, N]`.
      kernel: of shape `[K, K', C_in, C_out]`.
      strides: pixels from one output to the next, down and across.
      padding: rows of 0 above and below, columns of 0 left and right.

    Returns:
      Activations `[C_out, (H + padding - K) // stride + 1, likewise for W, N]`.
    """
    kh, kw, c_in, c_out = kernel.shape
    _, h, w, n = x.shape
    (stride_h, stride_w), ((above, below), (left, right)) = strides, padding
    out_h = (h + above + below - kh) // stride_h + 1
    out_w = (w + left + right - kw) // stride_w + 1
    b = _block_size(kernel.shape, strides)
    fold_h, fold_w = b * stride_h, b * stride_w  # pixels of a block of input
    patch_h, patch_w = kh + (b - 1) * stride_h, kw + (b - 1) * stride_w
    taps_h, taps_w = -(-patch_h // fold_h), -(-patch_w // fold_w)  # patch in blocks
    blocks_h, blocks_w = -(-out_h // b), -(-out_w // b)  # output in blocks
    taps = [(i, j) for i in range(taps_h) for j in range(taps_w)]

    # [C_in, H, W, N] -> [C_in, fold, fold, H / fold, W / fold, N]
    rows, columns = blocks_h + taps_h - 1, blocks_w + taps_w - 1
    x = lax.pad(
        x,
        jnp.zeros((), x.dtype),
        (
            (0, 0, 0),
            (above, rows * fold_h - h - above, 0),  # negative, it cuts pixels off
            (left, columns * fold_w - w - left, 0),  # that no output sees
            (0, 0, 0),
        ),
    )
    x = x.reshape(c_in, rows, fold_h, columns, fold_w, n).transpose(0, 2, 4, 1, 3, 5)
    # The last block of a patch may reach beyond the patch.
    patches = jnp.concatenate(
        [
            lax.collapse(
                x[
                    :,
                    : patch_h - i * fold_h,
                    : patch_w - j * fold_w,
                    i : i + blocks_h,
                    j : j + blocks_w,
                ],
                0,
                3,
            )
            for i, j in taps
        ]
    )

    # The kernel at each of the b x b offsets inside a patch, cut into the same blocks.
    kernels = jnp.stack(
        [
            jnp.pad(
                kernel,
                (
                    (p * stride_h, patch_h - kh - p * stride_h),
                    (q * stride_w, patch_w - kw - q * stride_w),
                    (0, 0),
                    (0, 0),
                ),
            )
            for p in range(b)
            for q in range(b)
        ]
    )
    kernels = kernels.transpose(4, 0, 3, 1, 2).reshape(-1, c_in, patch_h, patch_w)
    kernels = jnp.concatenate(
        [
            lax.collapse(
                kernels[
                    :, :, i * fold_h : (i + 1) * fold_h, j * fold_w : (j + 1) * fold_w
                ],
                1,
            )
            for i, j in taps
        ],
        axis=1,
    )

    if _batch_may_be_sharded():
        # The batch has to stay an axis of its own, or all devices would get all of it.
        y = jnp.tensordot(kernels, patches, axes=1)
    else:
        y = kernels @ lax.collapse(patches, 1)  # a tenth faster
    y = y.reshape(c_out, b, b, blocks_h, blocks_w, n).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(c_out, blocks_h * b, blocks_w * b, n)[:, :out_h, :out_w]


def _block_size(kernel_shape: tuple[int, ...], strides: Pair) -> int:
    """Return the side, in outputs, of the blocks of `conv2d_by_blocks`.

    Measured on CPU: two halve the copies of pixels in patches and multiply by zeros
    instead, which costs more where channels are 64 or more, where a stride holds copies
    down, and where a kernel of one pixel needs none. Four were never faster.
    """
    kh, kw, c_in, _ = kernel_shape
    return 1 if c_in >= 64 or max(strides) > 1 or kh * kw == 1 else 2


def _batch_may_be_sharded() -> bool:
    """Return whether the program is traced for a mesh that the compiler partitions."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1 and kind != jax.sharding.AxisType.Manual
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def avg_pool_2x2(x: Array, layout: Layout) -> Array:
    """Average over windows of 2 x 2, stride 2; a last odd row or column is left out.

    Args:
      x: activations in `layout`.
      layout: order of the axes of `x` and of the result.
    """
    h, w = (check_layout(layout).index(axis) for axis in "HW")  # w == h + 1
    x = lax.slice_in_dim(x, 0, x.shape[h] // 2 * 2, axis=h)
    x = lax.slice_in_dim(x, 0, x.shape[w] // 2 * 2, axis=w)
    windows = (x.shape[h] // 2, 2, x.shape[w] // 2, 2)
    return x.reshape(x.shape[:h] + windows + x.shape[w + 1 :]).mean((h + 1, h + 3))


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
