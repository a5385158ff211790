"""The ResNets for ImageNet, of 18 to 152 layers, as torchvision has them.

Left out are their relatives (ResNeXt, wide and deep-stem ResNets, anti-aliased ones)
and version 1, which halves the image in a bottleneck's first convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array, lax

from bn_jax import fields
from bn_jax.models import layers

# Blocks of each stage, by number of layers: He et al. 2015, table 1. From 50 layers on
# they are bottlenecks.
STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
DEPTHS = fields.Range(
    f"one of {', '.join(map(str, STAGES))}", lambda depth: depth in STAGES
)
# torchvision's initial values: kaiming_normal_(mode="fan_out") of convolutions, and
# nn.Linear's, uniform in +-1 / sqrt(fan_in), whose variance is a third of 1 / fan_in.
KAIMING = layers.compiled(initializers.variance_scaling(2, "fan_out", "normal"))
LINEAR = layers.compiled(initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


def imagenet_resnet(
    *,
    norm: layers.NormConstructor | None = None,
    num_classes: int = 10,
    dtype: Any = None,
    layout: layers.Layout | None = None,
    depth: Annotated[int, DEPTHS] = 50,
    width: Annotated[int, fields.AT_LEAST_1] = 64,
    zero_init_residual: bool = False,
) -> ImageNetResNet:
    """Return `ImageNetResNet` by options that can be written on a command line.

    Arguments are its attributes, but `num_classes` is 10 by default, not 1000.

    Raises:
      ConfigError: if there is no such depth, or `zero_init_residual` has no scale to
        start from 0.
    """
    _check(depth, norm, zero_init_residual)
    return ImageNetResNet(
        depth=depth,
        norm=norm,
        width=width,
        zero_init_residual=zero_init_residual,
        num_classes=num_classes,
        dtype=dtype,
        layout=layout,
    )


def _check(
    depth: int, norm: layers.NormConstructor | None, zero_init_residual: bool
) -> None:
    """Refuse attributes that make no ResNet.

    Raises:
      ConfigError: naming the attribute, its value, and what was expected.
    """
    if not DEPTHS.holds(depth):
        raise fields.ConfigError(f"depth={depth}; expected {DEPTHS.words}")
    if zero_init_residual and (norm is None or callable(norm)):
        _of_last(norm)  # what is not a constructor is refused where it is called


def _of_last(norm: layers.NormConstructor | None) -> layers.NormConstructor:
    """Return the constructor of the last norm of each block, whose scale starts at 0.

    Raises:
      ConfigError: if it has none.
    """
    return layers.with_scale_init(
        norm,
        initializers.zeros,
        "zero_init_residual=true starts the scale of each block's last norm from 0",
    )


def convolution(
    features: int, size: int, *, stride: int = 1, **attributes: Any
) -> layers.Conv:
    """Return a convolution that pads both sides by `size // 2`, as PyTorch's do.

    Args:
      features: number of output channels.
      size: of the kernel, in pixels down and across; odd.
      stride: in pixels.
      **attributes: further ones of `layers.Conv`.
    """
    pad = (size // 2, size // 2)
    return layers.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(pad, pad),
        kernel_init=KAIMING,
        **attributes,
    )


def max_pool_3x3(x: Array, layout: layers.Layout) -> Array:
    """Take the largest value in windows of 3 x 3, stride 2, around every other pixel.

    Args:
      x: activations in `layout`.
      layout: order of the axes of `x` and of the result.

    Returns:
      Activations of half the height and width, rounded up.
    """
    window, strides, padding = [1] * 4, [1] * 4, [(0, 0)] * 4
    for axis in (layout.index("H"), layout.index("W")):
        window[axis], strides[axis], padding[axis] = 3, 2, (1, 1)
    pooled: Array = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    return pooled


class Projection(nn.Module):
    """The shortcut of a block that changes the shape: a convolution and its norm.

    This is option B of He et al.

    Attributes:
      features: number of output channels.
      stride: in pixels.
      conv: constructor of convolutions, called as `convolution` is.
      norm_layer: makes a norm, as `layers.norm_layer` does, by its `name`.
    """

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm_layer: Callable[..., Callable[[Array], Array]]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        x = self.conv(self.features, 1, stride=self.stride, name="conv")(x)
        return self.norm_layer(name="norm")(x).astype(x.dtype)


class Block(nn.Module):
    """Convolutions, each with its norm, added to their input.

    A basic block has two of 3 x 3. A bottleneck has one of 3 x 3 between two of 1 x 1,
    and four times as many channels at its ends.

    Attributes:
      features: number of channels of the 3 x 3 convolutions.
      stride: of the first 3 x 3 convolution, in pixels.
      bottleneck: whether it is one.
      projects: whether the shortcut is a `Projection`; without, input and output must
        have the same shape.
      conv: see `Projection`.
      norm_layer: see `Projection`.
      last_norm_layer: the same, for the last norm before the sum.
    """

    features: int
    stride: int
    bottleneck: bool
    projects: bool
    conv: Callable[..., nn.Module]
    norm_layer: Callable[..., Callable[[Array], Array]]
    last_norm_layer: Callable[..., Callable[[Array], Array]]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        # Size of the kernel, channels of the output, and stride of each convolution.
        convs = [(3, self.features, self.stride), (3, self.features, 1)]
        if self.bottleneck:
            convs = [(1, self.features, 1), convs[0], (1, 4 * self.features, 1)]
        y = x
        for i, (size, features, stride) in enumerate(convs, start=1):
            y = self.conv(features, size, stride=stride, name=f"conv{i}")(y)
            is_last = i == len(convs)
            norm_layer = self.last_norm_layer if is_last else self.norm_layer
            y = norm_layer(name=f"norm{i}")(y).astype(y.dtype)
            if not is_last:
                y = jax.nn.relu(y)
        if self.projects:
            x = Projection(
                features, self.stride, self.conv, self.norm_layer, name="shortcut"
            )(x)
        return jax.nn.relu(x + y)


class Stage(nn.Module):
    """Blocks of one width, of which the first may change the shape.

    Attributes:
      num_blocks: number of blocks.
      stride: of the first block, in pixels.
      projects: whether the first block's shortcut is a `Projection`.
      block: constructor of the blocks, called as `block(stride=..., projects=...,
        name=...)`.
    """

    num_blocks: int
    stride: int
    projects: bool
    block: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return activations in the layout of `x`."""
        for i in range(self.num_blocks):
            x = self.block(
                stride=self.stride if i == 0 else 1,
                projects=self.projects and i == 0,
                name=f"block{i + 1}",
            )(x)
        return x


class ImageNetResNet(nn.Module):
    """The ResNet of 18, 34, 50, 101 or 152 layers for large images.

    A convolution of 7 x 7 pixels and a max pooling quarter the height and width of the
    images; of four stages, each after the first halves them again. Images of any size
    will do; below 33 pixels the last stage sees a single one.

    With batch norm of epsilon 1e-5 it predicts what torchvision's model of the same
    parameters does; `bn_jax.convert.networks` brings them over. Kernels start from
    He's normal distribution by fan-out, the head from PyTorch's uniform one.

    Attributes:
      depth: number of layers with kernels, not counting shortcuts. From 50 on, blocks
        are bottlenecks; their stride is that of the 3 x 3 convolution (version 1.5).
      norm: constructor of the normalisation, as `layers.norm_layer` calls it; None for
        none. Convolutions have a bias where they have no norm.
      width: number of channels of the stem and the first stage's 3 x 3 convolutions;
        each further stage has twice as many.
      zero_init_residual: whether the scale of each block's last norm starts from 0, so
        that blocks start as their shortcuts. The norm's constructor must take an
        initializer as `scale_init`.
      num_classes: number of outputs.
      dtype: to compute in, such as `jnp.bfloat16`; None for that of the images and
        parameters, promoted. Parameters are float32, and so are the logits.
      layout: order of the axes of the activations; None chooses the faster one for the
        backend. Parameters and results do not depend on it.

    References:
      He et al., 2015, "Deep residual learning for image recognition",
      arXiv:1512.03385, section 4.1.
      He et al., 2015, "Delving deep into rectifiers: surpassing human-level performance
      on ImageNet classification", arXiv:1502.01852 (initial values).
      Goyal et al., 2017, "Accurate, large minibatch SGD: training ImageNet in 1 hour",
      arXiv:1706.02677 (scales from 0; the stride of bottlenecks).
    """

    depth: int = 50
    norm: layers.NormConstructor | None = None
    width: int = 64
    zero_init_residual: bool = False
    num_classes: int = 1000
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
          ConfigError: if there is no such depth, or `zero_init_residual` has no scale
            to start from 0.
          TypeError: if `norm` is not a constructor.
          ValueError: if there is no such layout.
        """
        _check(self.depth, self.norm, self.zero_init_residual)
        layout = self.layout or layers.default_layout()
        layers.check_layout(layout)
        if self.is_initializing():
            layout = "NHWC"  # in which no kernel is rearranged for its convolution
        conv = functools.partial(
            convolution, layout=layout, use_bias=self.norm is None, dtype=self.dtype
        )
        norm_layer = functools.partial(
            layers.norm_layer,
            self.norm,
            train=train,
            axis=layout.index("C"),
            batch_axis=layout.index("N"),
        )
        last_norm_layer = norm_layer
        if self.norm is not None and self.zero_init_residual:
            last_norm_layer = functools.partial(
                layers.norm_layer, _of_last(self.norm), **norm_layer.keywords
            )

        x = layers.from_nhwc(x, layout)
        x = conv(self.width, 7, stride=2, name="stem")(x)
        x = jax.nn.relu(norm_layer(name="stem_norm")(x).astype(x.dtype))
        x = max_pool_3x3(x, layout)
        bottleneck = self.depth >= 50
        for stage, num_blocks in enumerate(STAGES[self.depth]):
            block = functools.partial(
                Block,
                features=self.width * 2**stage,
                bottleneck=bottleneck,
                conv=conv,
                norm_layer=norm_layer,
                last_norm_layer=last_norm_layer,
            )
            x = Stage(
                num_blocks,
                stride=1 if stage == 0 else 2,
                projects=bottleneck or stage > 0,
                block=block,
                name=f"stage{stage + 1}",
            )(x)
        x = layers.to_nhwc(x, layout).mean((1, 2))
        head = nn.Dense(
            self.num_classes,
            kernel_init=LINEAR,
            bias_init=_uniform(1 / math.sqrt(x.shape[-1])),
            dtype=self.dtype,
            name="head",
        )
        return layers.to_logits(head(x))


def _uniform(bound: float) -> initializers.Initializer:
    """Return the initializer of values uniform between a bound and its negative."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
