"""LeNet with batch normalisation, as the d2l chapter has it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array

from bn_jax import fields, names
from bn_jax.models import layers


def lenet(
    *,
    norm: layers.NormConstructor | None = None,
    num_classes: int = 10,
    dtype: Any = None,
    layout: layers.Layout | None = None,
    norm_layers: Annotated[
        str,
        fields.Range(
            "four digits, 1 for each of the first four layers with its norm and 0 "
            "without, as in 0011",
            lambda v: len(v) == 4 and layers.DIGITS.holds(v),
        ),
        names.TRACEABLE,
    ] = "1111",
    bias_before_norm: bool = True,
    activation: layers.Activation = "sigmoid",
    dropout_rate: Annotated[float, fields.BELOW_1] = 0.0,
    dropout_at: Literal["dense", "last"] = "dense",
    first_padding: Annotated[int, fields.NOT_NEGATIVE] = 0,
    centred_kernels: bool = False,
    gamma: Literal["ones", "uniform"] = "ones",
) -> LeNet:
    """Return `LeNet` by options that can be written on a command line.

    Args:
      norm: as the attribute.
      num_classes: as the attribute.
      dtype: as the attribute.
      layout: as the attribute.
      norm_layers: four digits, such as "0011", or an array of booleans.
      bias_before_norm: as the attribute.
      activation: name of the function, of `layers.ACTIVATIONS`; "gelu" is its
        approximation by tanh.
      dropout_rate: as the attribute.
      dropout_at: as the attribute.
      first_padding: as the attribute.
      centred_kernels: as the attribute.
      gamma: what the scale of the norms starts from: 1, or draws from [0, 1).

    Raises:
      ConfigError: if `gamma` is "uniform" and `norm` is None or takes no `scale_init`;
        or if it or the activation is unknown.
    """
    if gamma not in ("ones", "uniform"):
        raise fields.ConfigError(f"gamma={gamma!r}; expected ones or uniform")
    if gamma == "uniform":
        norm = layers.with_scale_init(
            norm,
            initializers.uniform(1.0),
            "gamma=uniform draws the scale of the norms from [0, 1)",
        )
    return LeNet(
        norm=norm,
        norm_layers=layers.switches_of(norm_layers),
        bias_before_norm=bias_before_norm,
        activation=layers.activation_of(activation),
        dropout_rate=dropout_rate,
        dropout_at=dropout_at,
        first_padding=first_padding,
        centred_kernels=centred_kernels,
        num_classes=num_classes,
        dtype=dtype,
        layout=layout,
    )


class LeNet(nn.Module):
    """LeNet of two 5 x 5 convolutions and three dense layers with sigmoids.

    Each of the first four is followed by `norm`, when there is one, before its
    activation. Kernels start from Xavier's uniform distribution, biases from 0.

    Attributes:
      norm: constructor of the normalisation, as `layers.norm_layer` calls it:
        `bn_jax.linen.BatchNorm`, `flax.linen.BatchNorm`, a `functools.partial` of one,
        or what `bn_jax.linen.norm` returns; None for no normalisation.
      norm_layers: which of the four have their norm: four booleans, or an array `[4]`.
        With an array, which may be traced, all norms are there, and those that are off
        are passed by.
      bias_before_norm: whether the layers before a norm have a bias, as the chapter's
        do; batch norm subtracts it again. Without norm they always have one, but where
        an array switches the norm off.
      activation: after each of the four layers, and its norm; the chapter's is the
        sigmoid.
      dropout_rate: share of values that training sets to 0; what is left is scaled up.
        It draws from the random stream "dropout".
      dropout_at: after which activations: "dense", both dense layers', of which the
        first is followed by a norm; or "last", the second's alone, which no norm
        follows.
      first_padding: pixels of 0 around the images: 0 in the chapter on batch
        normalisation, 2 in the one that introduces LeNet without it.
      centred_kernels: whether the layers before a norm compute with their kernels less
        the mean over the inputs of each output, as a norm that subtracts no mean wants
        them ("mabn", "scale").
      num_classes: number of outputs.
      dtype: to compute in, such as `jnp.bfloat16`; None for that of the images and
        parameters, promoted. Parameters are float32, and so are the logits.
      layout: order of the axes of the convolutions' activations; None chooses the
        faster one for the backend. Parameters and results do not depend on it.

    References:
      Zhang et al., 2021, "Dive into deep learning", arXiv:2106.11342 (the chapter,
      "Batch Normalization").
      LeCun et al., 1998, "Gradient-based learning applied to document recognition".
      Glorot and Bengio, 2010, "Understanding the difficulty of training deep
      feedforward neural networks".
      Srivastava et al., 2014, "Dropout: a simple way to prevent neural networks from
      overfitting".
    """

    norm: layers.NormConstructor | None = None
    norm_layers: Sequence[bool] | Array = (True, True, True, True)
    bias_before_norm: bool = True
    activation: Callable[[Array], Array] = jax.nn.sigmoid
    dropout_rate: float = 0.0
    dropout_at: Literal["dense", "last"] = "dense"
    first_padding: int = 0
    centred_kernels: bool = False
    num_classes: int = 10
    dtype: Any = None
    layout: layers.Layout | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return the logits of a batch of images.

        Args:
          x: images `[N, H, W, C]`, pixels in [0, 1]; the chapter's are 28 x 28 x 1. H
            and W are at least 16 (with padding), so that the second pooling leaves a
            pixel.
          train: whether norms use the batch's statistics and move their averages, and
            dropout drops.

        Returns:
          Logits `[N, num_classes]`.

        Raises:
          ConfigError: if `norm_layers` has not four entries.
          TypeError: if `norm` is not a constructor.
          ValueError: if there is no such layout, or H or W (with padding) is below 14,
            too small for the second convolution.
        """
        layout = self.layout or layers.default_layout(few_channels=True)
        xavier = initializers.xavier_uniform()
        switches = layers.norm_switches(self.norm, self.norm_layers, 4)

        def use_bias(i: int) -> bool:
            return self.bias_before_norm or switches[i - 1] is False

        def norm_activation(x: Array, i: int, axis: int, batch_axis: int) -> Array:
            norm = layers.norm_layer(
                self.norm,
                train=train,
                axis=axis,
                batch_axis=batch_axis,
                name=f"norm{i}",
                switch=switches[i - 1],
            )
            return self.activation(norm(x).astype(x.dtype))

        p = self.first_padding
        x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
        x = layers.from_nhwc(x, layout)
        for i, features in enumerate((6, 16), start=1):
            conv = layers.Conv(
                features,
                (5, 5),
                layout=layout,
                use_bias=use_bias(i),
                kernel_init=xavier,
                is_centred=self.centred_kernels,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            x = norm_activation(conv(x), i, layout.index("C"), layout.index("N"))
            x = layers.avg_pool_2x2(x, layout)
        x = layers.to_nhwc(x, layout)
        x = x.reshape(x.shape[0], -1)
        dense = functools.partial(nn.Dense, kernel_init=xavier, dtype=self.dtype)
        for i, features in enumerate((120, 84), start=1):
            layer = dense(
                features,
                use_bias=use_bias(i + 2),
                dot_general=layers.centred_dot if self.centred_kernels else None,
                name=f"dense{i}",
            )
            x = layer(x)
            x = norm_activation(x, i + 2, -1, 0)
            if i == 2 or self.dropout_at == "dense":
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return layers.to_logits(dense(self.num_classes, name="dense3")(x))
