"""ResNets for small images, with a norm, without one, or with what replaces it.

Left out are the bottleneck blocks, projection shortcuts and large stem of the ResNets
for ImageNet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array, lax

from bn_jax import fields
from bn_jax.models import layers

Residual = Literal["plain", "fixup", "skipinit"]
DEPTHS = fields.Range(
    "6n + 2, with n at least 1: 8, 14, 20, ...", lambda v: v >= 8 and v % 6 == 2
)
HE = layers.compiled(initializers.he_normal())

# Its windows are centred on the pixels that `shortcut` keeps; "SAME" would centre them
# one pixel off where the stride is 2 and the size even.
conv3x3 = functools.partial(
    layers.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), kernel_init=HE
)


@functools.cache
def _scaled_he(num_blocks: int) -> initializers.Initializer:
    """Return Fixup's initializer of the first kernel of a block."""
    # He's variance is 2 / fan_in; L^(-1 / (2m - 2)) = L^(-1/2) at m = 2 layers.
    return layers.compiled(
        initializers.variance_scaling(2 / num_blocks, "fan_in", "truncated_normal")
    )


def resnet(
    *,
    norm: layers.NormConstructor | None = None,
    num_classes: int = 10,
    dtype: Any = None,
    layout: layers.Layout | None = None,
    depth: Annotated[int, DEPTHS] = 20,
    width: Annotated[int, fields.AT_LEAST_1] = 16,
    residual: Residual = "plain",
) -> ResNet:
    """Return `ResNet` by options that can be written on a command line.

    Arguments are its attributes.

    Raises:
      ConfigError: if the depth is not 6n + 2, or `residual` is unknown or not for
        networks with a norm.
    """
    _check(depth, residual, norm)
    return ResNet(
        depth=depth,
        norm=norm,
        residual=residual,
        width=width,
        num_classes=num_classes,
        dtype=dtype,
        layout=layout,
    )


def _check(depth: int, residual: str, norm: layers.NormConstructor | None) -> None:
    """Refuse attributes that make no ResNet.

    Raises:
      ConfigError: naming the attribute, its value, and what was expected.
    """
    if not DEPTHS.holds(depth):
        raise fields.ConfigError(f"depth={depth}; expected {DEPTHS.words}")
    if residual not in get_args(Residual):
        raise fields.ConfigError(
            f"residual={residual!r}; expected one of {', '.join(get_args(Residual))}"
        )
    if residual != "plain" and norm is not None:
        raise fields.ConfigError(
            f"residual={residual} takes the place of a norm, and one is given; give "
            "norm=none (in Python None), or residual=plain"
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
      norm_layer: makes a norm, as `layers.norm_layer` does, by its `name`; None for
        biases and no norm.
      skip_init: whether the branch is multiplied by a scalar that starts from 0.
      dtype: to compute in; None for that of input and parameters, promoted.
    """

    features: int
    stride: int
    layout: layers.Layout
    norm_layer: Callable[..., Callable[[Array], Array]] | None = None
    skip_init: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        y = x
        for i, stride in ((1, self.stride), (2, 1)):
            y = conv3x3(
                self.features,
                layout=self.layout,
                strides=stride,
                use_bias=self.norm_layer is None,
                dtype=self.dtype,
                name=f"conv{i}",
            )(y)
            if self.norm_layer is not None:
                y = self.norm_layer(name=f"norm{i}")(y).astype(y.dtype)
            if i == 1:
                y = jax.nn.relu(y)
        if self.skip_init:
            y = y * scalar(self, "scale", y.dtype)
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
      dtype: to compute in; None for that of input and parameters, promoted.
    """

    features: int
    stride: int
    layout: layers.Layout
    num_blocks: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        conv = functools.partial(
            conv3x3,
            self.features,
            layout=self.layout,
            use_bias=False,
            dtype=self.dtype,
        )
        x = x + scalar(self, "bias1", x.dtype)
        y = conv(
            strides=self.stride, kernel_init=_scaled_he(self.num_blocks), name="conv1"
        )(x)
        y = jax.nn.relu(y + scalar(self, "bias2", y.dtype))
        y = y + scalar(self, "bias3", y.dtype)
        y = conv(kernel_init=initializers.zeros, name="conv2")(y)
        y = y * scalar(self, "scale", y.dtype, initializers.ones)
        y = y + scalar(self, "bias4", y.dtype)
        return jax.nn.relu(y + shortcut(x, self.features, self.stride, self.layout))


def scalar(
    module: nn.Module,
    name: str,
    dtype: Any,
    initializer: initializers.Initializer = initializers.zeros,
) -> Array:
    """Return a parameter of `module` that is one number, in a dtype."""
    value: Array = module.param(name, initializer, ())
    return value.astype(dtype)


class ResNet(nn.Module):
    """The ResNet of 6n + 2 layers for small images: three stages of n blocks.

    Kernels start from He's normal distribution, truncated; with Fixup as `FixupBlock`
    says, and the head's from 0.

    Attributes:
      depth: number of layers with kernels: 8, 14, 20, ..., 56, ..., 110.
      norm: constructor of the normalisation, as `layers.norm_layer` calls it; None for
        none. Convolutions have a bias where they have no norm, except with Fixup.
      residual: "plain"; or, without a norm, "fixup" or "skipinit", whose branches start
        from 0.
      width: number of channels of the first stage; each further stage has twice as
        many, on a quarter of the pixels.
      num_classes: number of outputs.
      dtype: to compute in, such as `jnp.bfloat16`; None for that of the images and
        parameters, promoted. Parameters are float32, and so are the logits.
      layout: order of the axes of the activations; None chooses the faster one for the
        backend. Parameters and results do not depend on it.

    References:
      He et al., 2015, "Deep residual learning for image recognition",
      arXiv:1512.03385, section 4.2.
      He et al., 2015, "Delving deep into rectifiers: surpassing human-level performance
      on ImageNet classification", arXiv:1502.01852 (initial values).
      Zhang et al., 2019, "Fixup initialization: residual learning without
      normalization", arXiv:1901.09321.
      De and Smith, 2020, "Batch normalization biases residual blocks towards the
      identity function in deep networks", arXiv:2002.10444 (SkipInit).
    """

    depth: int = 20
    norm: layers.NormConstructor | None = None
    residual: Residual = "plain"
    width: int = 16
    num_classes: int = 10
    dtype: Any = None
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
          ConfigError: if the depth is not 6n + 2, or `residual` is unknown or not for
            networks with a norm.
          TypeError: if `norm` is not a constructor.
          ValueError: if there is no such layout.
        """
        _check(self.depth, self.residual, self.norm)
        layout = self.layout or layers.default_layout()
        layers.check_layout(layout)
        if self.is_initializing():
            layout = "NHWC"  # in which no kernel is rearranged for its convolution
        num_blocks = (self.depth - 2) // 6  # in each of three stages
        fixup = self.residual == "fixup"
        norm_layer = None
        if self.norm is not None:
            norm_layer = functools.partial(
                layers.norm_layer,
                self.norm,
                train=train,
                axis=layout.index("C"),
                batch_axis=layout.index("N"),
            )

        x = conv3x3(
            self.width,
            layout=layout,
            use_bias=norm_layer is None and not fixup,
            dtype=self.dtype,
            name="stem",
        )(layers.from_nhwc(x, layout))
        if norm_layer is not None:
            x = norm_layer(name="stem_norm")(x).astype(x.dtype)
        if fixup:
            x = x + scalar(self, "stem_bias", x.dtype)
        x = jax.nn.relu(x)
        for stage in range(3):
            for i in range(num_blocks):
                features = self.width * 2**stage
                stride = 2 if stage > 0 and i == 0 else 1
                name = f"stage{stage + 1}_block{i + 1}"
                block: nn.Module
                if fixup:
                    block = FixupBlock(
                        features,
                        stride,
                        layout,
                        3 * num_blocks,
                        dtype=self.dtype,
                        name=name,
                    )
                else:
                    block = ResidualBlock(
                        features,
                        stride,
                        layout,
                        norm_layer,
                        skip_init=self.residual == "skipinit",
                        dtype=self.dtype,
                        name=name,
                    )
                x = block(x)
        x = layers.to_nhwc(x, layout).mean((1, 2))
        if fixup:
            x = x + scalar(self, "head_bias", x.dtype)
        head = nn.Dense(
            self.num_classes,
            kernel_init=initializers.zeros if fixup else HE,
            dtype=self.dtype,
            name="head",
        )
        return layers.to_logits(head(x))
