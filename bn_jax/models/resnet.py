"""ResNets for small images, with a norm, without one, or with what replaces it.

Left out are the bottleneck blocks, projection shortcuts and large stem of the ResNets
for ImageNet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array, lax

from bn_jax.models import layers

Residual = Literal["plain", "fixup", "skipinit"]
HE = initializers.he_normal()

# Its windows are centred on the pixels that `shortcut` keeps; "SAME" would centre them
# one pixel off where the stride is 2 and the size even.
conv3x3 = functools.partial(
    layers.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), kernel_init=HE
)


def shortcut(x: Array, features: int, stride: int, layout: layers.Layout) -> Array:
    """Return every `stride`-th pixel of `x`, with channels of 0 up to `features`.

    This is option A of He et al., which has no parameters.
    """
    for axis in (layout.index("H"), layout.index("W")):
        x = lax.slice_in_dim(x, 0, x.shape[axis], stride, axis=axis)
    c = layout.index("C")
    widths = [(0, 0)] * 4
    widths[c] = (0, features - x.shape[c])
    return jnp.pad(x, widths)


class ResidualBlock(nn.Module):
    """Two convolutions, each with its norm if there is one, added to their input.

    Attributes:
      features: number of output channels.
      stride: of the first convolution and the shortcut.
      layout: order of the axes of input and output.
      norm: constructor, called as `norm(name=...)`; None for biases and no norm.
      skip_init: whether the branch is multiplied by a scalar that starts from 0.
    """

    features: int
    stride: int
    layout: layers.Layout
    norm: Callable[..., nn.Module] | None = None
    skip_init: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        y = x
        for i, stride in ((1, self.stride), (2, 1)):
            y = conv3x3(
                self.features,
                layout=self.layout,
                strides=stride,
                use_bias=self.norm is None,
                name=f"conv{i}",
            )(y)
            if self.norm is not None:
                y = self.norm(name=f"norm{i}")(y)
            if i == 1:
                y = jax.nn.relu(y)
        if self.skip_init:
            y = y * self.param("scale", initializers.zeros, ())
        return jax.nn.relu(y + shortcut(x, self.features, self.stride, self.layout))


class FixupBlock(nn.Module):
    """The block of Fixup: no norm, and scalars around its two convolutions.

    The first kernel starts from He's distribution over the square root of the number
    of blocks, the second from 0, the scale from 1 and the four biases from 0. The
    authors train scalars at a tenth of the learning rate, which is left to the
    optimizer.

    Attributes:
      features: number of output channels.
      stride: of the first convolution and the shortcut.
      layout: order of the axes of input and output.
      num_blocks: number of blocks in the network.
    """

    features: int
    stride: int
    layout: layers.Layout
    num_blocks: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        # He's variance is 2 / fan_in; L^(-1 / (2m - 2)) = L^(-1/2) at m = 2 layers.
        scaled_he = initializers.variance_scaling(
            2 / self.num_blocks, "fan_in", "truncated_normal"
        )
        x = x + scalar_bias(self, "bias1")
        y = conv3x3(
            self.features,
            layout=self.layout,
            strides=self.stride,
            use_bias=False,
            kernel_init=scaled_he,
            name="conv1",
        )(x)
        y = jax.nn.relu(y + scalar_bias(self, "bias2"))
        y = conv3x3(
            self.features,
            layout=self.layout,
            use_bias=False,
            kernel_init=initializers.zeros,
            name="conv2",
        )(y + scalar_bias(self, "bias3"))
        y = y * self.param("scale", initializers.ones, ())
        y = y + scalar_bias(self, "bias4")
        return jax.nn.relu(y + shortcut(x, self.features, self.stride, self.layout))


def scalar_bias(module: nn.Module, name: str) -> Array:
    """Return a parameter of `module` that is one number and starts from 0."""
    return module.param(name, initializers.zeros, ())


class ResNet(nn.Module):
    """The ResNet of 6n + 2 layers for small images: three stages of n blocks.

    Kernels start from He's normal distribution.

    Attributes:
      depth: number of layers with kernels: 8, 14, 20, ..., 56, ..., 110.
      norm: constructor of the normalisation, called as
        `norm(use_running_average=..., axis=..., name=...)`; None for none. Convolutions
        have a bias where they have no norm, except with Fixup.
      residual: "plain"; or, without a norm, "fixup" or "skipinit", whose branches start
        from 0.
      width: number of channels of the first stage; each further stage has twice as
        many, on a quarter of the pixels.
      num_classes: number of outputs.
      layout: order of the axes of the activations; None chooses the faster one for the
        backend. Parameters and results do not depend on it.

    References:
      He et al., 2015, "Deep residual learning for image recognition", section 4.2.
      Zhang et al., 2019, "Fixup initialization: residual learning without
      normalization".
      De and Smith, 2020, "Batch normalization biases residual blocks towards the
      identity function in deep networks" (SkipInit).
    """

    depth: int = 20
    norm: Callable[..., nn.Module] | None = None
    residual: Residual = "plain"
    width: int = 16
    num_classes: int = 10
    layout: layers.Layout | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return the logits of a batch of images.

        Args:
          x: images `[N, H, W, C]`.
          train: whether norms use the batch's statistics and move their averages.

        Returns:
          Logits `[N, num_classes]`.

        Raises:
          ValueError: if the depth is not 6n + 2, or `residual` is unknown or not for
            networks with a norm.
        """
        self._check()
        layout = self.layout or layers.default_layout()
        num_blocks = (self.depth - 2) // 6  # in each of three stages
        fixup = self.residual == "fixup"
        norm = None
        if self.norm is not None:
            norm = functools.partial(
                self.norm, use_running_average=not train, axis=layout.index("C")
            )

        x = conv3x3(
            self.width,
            layout=layout,
            use_bias=norm is None and not fixup,
            name="stem",
        )(layers.from_nhwc(x, layout))
        if norm is not None:
            x = norm(name="stem_norm")(x)
        if fixup:
            x = x + scalar_bias(self, "stem_bias")
        x = jax.nn.relu(x)
        for stage in range(3):
            for i in range(num_blocks):
                features = self.width * 2**stage
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage{stage + 1}_block{i + 1}"
                if fixup:
                    x = FixupBlock(features, stride, layout, 3 * num_blocks, name=name)(
                        x
                    )
                else:
                    x = ResidualBlock(
                        features,
                        stride,
                        layout,
                        norm,
                        skip_init=self.residual == "skipinit",
                        name=name,
                    )(x)
        x = layers.to_nhwc(x, layout).mean((1, 2))
        if fixup:
            x = x + scalar_bias(self, "head_bias")
        kernel_init = initializers.zeros if fixup else HE
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="head")(x)

    def _check(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(
                f"depth={self.depth}; expected 6n + 2, n of at least 1: 8, 14, 20, ..."
            )
        if self.residual not in get_args(Residual):
            raise ValueError(
                f"residual={self.residual!r}; expected one of {get_args(Residual)}"
            )
        if self.residual != "plain" and self.norm is not None:
            raise ValueError(
                f"residual={self.residual!r} replaces the norm, and norm={self.norm!r} "
                "is given; give norm=None, or residual='plain'"
            )
