"""The convolution that is fast on CPU: one matrix product over blocks of outputs.

Activations are `[C, H, W, N]`, batch last, so that every row of a patch is a contiguous
run of the batch. Its derivatives of every order, in forward and reverse mode, are those
of the formula.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from bn_jax.shards import automatic_axes, explicit_axes

Pair = tuple[int, int]


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
    0.

    Under a mesh (`jax.set_mesh`) each device convolves its part of the batch, as far as
    the axes of the mesh divide it.

    Args:
      x: activations `[C_in, H, W, N]`.
      kernel: of shape `[K, K', C_in, C_out]`.
      strides: pixels from one output to the next, down and across.
      padding: rows of 0 above and below, columns of 0 left and right.

    Returns:
      Activations `[C_out, (H + padding - K) // stride + 1, likewise for W, N]`.
    """
    conv = functools.partial(_convolve, strides=strides, padding=padding)
    axes = _axes_of_batch(x)
    if not axes:
        return conv(x, kernel)
    # Blocks and batch are one axis of the product, along which the compiler cannot
    # partition: left to it, all devices would get all of the batch.
    by_batch = PartitionSpec(None, None, None, axes)
    return jax.shard_map(
        conv,
        in_specs=(by_batch, PartitionSpec()),
        out_specs=by_batch,
        axis_names=set(axes),
    )(x, kernel)


def _convolve(
    x: Array, kernel: Array, *, strides: Pair, padding: tuple[Pair, Pair]
) -> Array:
    """Convolve one device's part of the batch; see `conv2d_by_blocks`."""
    kh, kw, c_in, c_out = kernel.shape
    _, h, w, n = x.shape
    (stride_h, stride_w), ((above, below), (left, right)) = strides, padding
    out_h = (h + above + below - kh) // stride_h + 1
    out_w = (w + left + right - kw) // stride_w + 1
    b = _block_size(kernel.shape, strides)
    blocks = _Blocks(
        fold=(b * stride_h, b * stride_w),
        patch=(kh + (b - 1) * stride_h, kw + (b - 1) * stride_w),
        number=(-(-out_h // b), -(-out_w // b)),
    )
    rows, columns = blocks.pixels
    x = lax.pad(
        x,
        jnp.zeros((), x.dtype),
        (
            (0, 0, 0),
            (above, rows - h - above, 0),  # negative, it cuts pixels off
            (left, columns - w - left, 0),  # that no output sees
            (0, 0, 0),
        ),
    )
    patches = _patches(x, blocks)

    # The kernel at each of the b x b offsets inside a patch, cut into the same blocks.
    kernels = jnp.stack(
        [
            jnp.pad(
                kernel,
                (
                    (p * stride_h, blocks.patch[0] - kh - p * stride_h),
                    (q * stride_w, blocks.patch[1] - kw - q * stride_w),
                    (0, 0),
                    (0, 0),
                ),
            )
            for p in range(b)
            for q in range(b)
        ]
    )
    kernels = kernels.transpose(4, 0, 3, 1, 2).reshape(-1, c_in, *blocks.patch)
    kernels = jnp.concatenate(
        [lax.collapse(kernels[..., i, j], 1) for i, j in blocks.taps], axis=1
    )
    # On a GPU a product along the batch is a sum of parts, which XLA would else form
    # anew for each of the b x b offsets from which the gradient comes.
    kernels = lax.optimization_barrier(kernels)

    y = kernels @ lax.collapse(patches, 1)
    y = _unfold(y.reshape(c_out, b, b, *blocks.number, n))
    return y[:, :out_h, :out_w]


class _Blocks(NamedTuple):
    """How an image is cut: pairs are down and across."""

    fold: Pair  # pixels from one block to the next
    patch: Pair  # pixels that a block of outputs sees
    number: Pair  # of blocks

    @property
    def pixels(self) -> Pair:
        """Size of the image in pixels, whole folds, so that each patch lies in it."""
        rows, columns = (
            f * (number - 1 - (-p // f))
            for f, p, number in zip(self.fold, self.patch, self.number, strict=True)
        )
        return rows, columns

    @property
    def num_taps(self) -> Pair:
        """Folds that a patch reaches into."""
        down, across = (-(-p // f) for f, p in zip(self.fold, self.patch, strict=True))
        return down, across

    @property
    def taps(self) -> list[tuple[slice, slice]]:
        """The pixels of a patch, fold by fold; the last may reach beyond the patch."""
        down, across = (
            [slice(i, min(i + f, p)) for i in range(0, p, f)]
            for f, p in zip(self.fold, self.patch, strict=True)
        )
        return list(itertools.product(down, across))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _patches(x: Array, blocks: _Blocks) -> Array:
    """Return the patch of each block, shape `[K, *blocks.number, N]`.

    Of three taps or more that are whole folds, first all columns are lined up, then all
    rows: fewer slices, in longer runs. Of two the copy in between costs more.
    """
    (down, across), (taps_h, taps_w) = blocks.number, blocks.num_taps
    whole = all(p % f == 0 for p, f in zip(blocks.patch, blocks.fold, strict=True))
    if not whole or min(taps_h, taps_w) < 3:
        return _patches_by_taps(x, blocks)
    x = _folded(x, blocks)
    lined = [x[..., j : j + across, :] for j in range(taps_w)]
    x = jnp.concatenate([lax.collapse(part, 0, 3) for part in lined])
    return jnp.concatenate([x[:, i : i + down] for i in range(taps_h)])


@_patches.defjvp
def _patches_jvp(
    blocks: _Blocks, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Take the tangent's patches tap by tap, whose transpose is the faster one."""
    (x,), (dx,) = primals, tangents
    return _patches(x, blocks), _patches_by_taps(dx, blocks)


def _patches_by_taps(x: Array, blocks: _Blocks) -> Array:
    """Take the patches tap by tap: the result of `_patches`.

    All slices run along whole folds, whatever the stride, and leave the batch
    contiguous, which autodiff's transpose keeps; that of a strided slice is slow.
    """
    x = _folded(x, blocks)
    (fold_h, fold_w), (down, across) = blocks.fold, blocks.number
    parts = []
    for rows, columns in blocks.taps:
        i, j = rows.start // fold_h, columns.start // fold_w
        size = (rows.stop - rows.start, columns.stop - columns.start)
        part = x[:, : size[0], : size[1], i : i + down, j : j + across]
        parts.append(lax.collapse(part, 0, 3))
    return jnp.concatenate(parts)


def _folded(x: Array, blocks: _Blocks) -> Array:
    """Return x as `[C, fold_h, fold_w, H / fold_h, W / fold_w, N]`: space to depth."""
    (fold_h, fold_w), (channels, h, w, n) = blocks.fold, x.shape
    x = x.reshape(channels, h // fold_h, fold_h, w // fold_w, fold_w, n)
    return x.transpose(0, 2, 4, 1, 3, 5)


@jax.custom_jvp
def _unfold(y: Array) -> Array:
    """Return `[C, b, b, H / b, W / b, N]` as `[C, H, W, N]`: depth to space."""
    c, b, _, h, w, n = y.shape
    return y.transpose(0, 3, 1, 4, 2, 5).reshape(c, h * b, w * b, n)


@_unfold.defjvp
def _unfold_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Put the b x b parts of the tangent in place one by one: the transpose is slices.

    That of the permutation above would be a permutation, too, and as XLA fuses it with
    the reshape to a matrix, it would take ten times as long.
    """
    (y,), (dy,) = primals, tangents
    c, b, _, h, w, n = y.shape
    zero = jnp.zeros((), dy.dtype)
    parts = lax.split(dy.reshape(c, b * b, h, 1, w, 1, n), [1] * (b * b), 1)
    unfolded = jnp.zeros((c, h, b, w, b, n), dy.dtype)
    for part, (p, q) in zip(parts, np.ndindex(b, b), strict=True):
        place = [(0, 0, 0)] * 6
        place[2], place[4] = (p, b - 1 - p, 0), (q, b - 1 - q, 0)
        unfolded += lax.pad(lax.squeeze(part, [1]), zero, place)
    return _unfold(y), unfolded.reshape(c, h * b, w * b, n)


def _block_size(kernel_shape: tuple[int, ...], strides: Pair) -> int:
    """Return the side, in outputs, of the blocks of `conv2d_by_blocks`.

    Measured on CPU: two halve the copies of pixels in patches and multiply by zeros
    instead, which costs more where channels are 64 or more, where a stride holds copies
    down, and where a kernel of one pixel needs none. Four were never faster.
    """
    kh, kw, c_in, _ = kernel_shape
    return 1 if c_in >= 64 or max(strides) > 1 or kh * kw == 1 else 2


def _axes_of_batch(x: Array) -> tuple[str, ...]:
    """Return the mesh axes along which to lay a batch, which is an array's last axis.

    Where axes of the mesh are explicit, the array's type says it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = explicit_axes(x, -1)
    part = x.shape[-1] // math.prod(mesh.shape[name] for name in explicit)
    return (*explicit, *automatic_axes(part))
