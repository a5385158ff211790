"""Convolution and average pooling in a chosen layout of the activations.

Layouts are named by their axes: `NHWC` is native on GPU and TPU; `CHWN`, batch last, is
two to four times faster for small networks on CPU, where each row of a patch is then a
contiguous run of the batch. Kernels are `[H, W, C_in, C_out]` in both, so a checkpoint
does not know the layout that it was trained in.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array, lax

Layout = Literal["NHWC", "CHWN"]


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


def conv2d(x: Array, kernel: Array, layout: Layout) -> Array:
    """Convolve without padding (VALID), with stride 1.

    In the layout CHWN on CPU this is `conv2d_by_blocks`, since XLA's own convolution is
    slow there inside loops; elsewhere it is XLA's.

    Args:
      x: activations in `layout`.
      kernel: of shape `[H, W, C_in, C_out]`.
      layout: order of the axes of `x` and of the result.
    """
    check_layout(layout)
    xla = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=(layout, "HWIO", layout),
    )
    if layout == "NHWC":
        return xla(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=conv2d_by_blocks, default=xla)


def conv2d_by_blocks(x: Array, kernel: Array) -> Array:
    """Convolve a batch-last image as one matrix product over blocks of outputs.

    With b = 1 this is the textbook im2col: every output is a product of the kernel with
    one patch. A block of b x b neighbouring outputs needs a patch only b - 1 larger, so
    folding b x b pixels into the channels (space to depth), convolving blocks by
    blocks, and unfolding the b x b x C_out channels again gives the same numbers from
    fewer, wider patches: less memory moved for some products with 0. All slices run
    along whole blocks and leave the batch contiguous, which autodiff's transpose keeps.

    Args:
      x: activations `[C_in, H, W, N]`.
      kernel: of shape `[K, K', C_in, C_out]`.

    Returns:
      Activations `[C_out, H - K + 1, W - K' + 1, N]`.
    """
    kh, kw, c_in, c_out = kernel.shape
    _, h, w, n = x.shape
    out_h, out_w = h - kh + 1, w - kw + 1
    # Measured on CPU: few input channels make patches cheap and the product narrow.
    b = 4 if c_in == 1 else 2
    taps_h, taps_w = -(-(kh + b - 1) // b), -(-(kw + b - 1) // b)  # kernel in blocks
    blocks_h, blocks_w = -(-out_h // b), -(-out_w // b)  # output in blocks

    # [C_in, H, W, N] -> [C_in, b, b, H / b, W / b, N]
    pad_h = (blocks_h + taps_h - 1) * b - h
    pad_w = (blocks_w + taps_w - 1) * b - w
    x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
    x = x.reshape(c_in, (h + pad_h) // b, b, (w + pad_w) // b, b, n)
    x = x.transpose(0, 2, 4, 1, 3, 5)
    patches = jnp.stack(
        [
            x[:, :, :, i : i + blocks_h, j : j + blocks_w]
            for i in range(taps_h)
            for j in range(taps_w)
        ]
    )

    # The kernel at each of the b x b offsets inside a block, taps and pixels apart.
    kernels = jnp.stack(
        [
            jnp.pad(
                kernel,
                (
                    (p, taps_h * b - kh - p),
                    (q, taps_w * b - kw - q),
                    (0, 0),
                    (0, 0),
                ),
            )
            for p in range(b)
            for q in range(b)
        ]
    )
    kernels = kernels.reshape(b * b, taps_h, b, taps_w, b, c_in, c_out)
    kernels = kernels.transpose(6, 0, 1, 3, 5, 2, 4)  # C_out, b*b, taps, C_in, b, b

    kernels = kernels.reshape(c_out * b * b, -1)
    if _batch_may_be_sharded():
        # The batch has to stay an axis of its own, or all devices would get all of it.
        y = jnp.tensordot(kernels, patches.reshape(-1, blocks_h, blocks_w, n), axes=1)
    else:
        y = kernels @ patches.reshape(-1, blocks_h * blocks_w * n)  # a tenth faster
    y = y.reshape(c_out, b, b, blocks_h, blocks_w, n).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(c_out, blocks_h * b, blocks_w * b, n)[:, :out_h, :out_w]


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
    """Convolution without padding, stride 1, in a chosen layout.

    Attributes:
      features: number of output channels.
      kernel_size: height and width.
      layout: order of the axes of input and output.
      use_bias: whether a bias is added.
      kernel_init: initializer of the `[H, W, C_in, C_out]` kernel.
    """

    features: int
    kernel_size: tuple[int, int]
    layout: Layout = "NHWC"
    use_bias: bool = True
    kernel_init: initializers.Initializer = initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Convolve activations whose axes are in the order of `layout`."""
        c = feature_axis(self.layout)
        shape = (*self.kernel_size, x.shape[c], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        y = conv2d(x, kernel, self.layout)
        if self.use_bias:
            bias = self.param("bias", initializers.zeros, (self.features,))
            y = y + jnp.expand_dims(bias, [a for a in range(4) if a != c])
        return y
