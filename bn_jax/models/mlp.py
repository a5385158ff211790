"""Multilayer perceptrons, with a norm before or after every activation or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
from flax import linen as nn
from flax.linen import initializers
from jax import Array

from bn_jax import fields, names
from bn_jax.models import layers


def mlp(
    *,
    norm: layers.NormConstructor | None = None,
    num_classes: int = 10,
    dtype: Any = None,
    layout: layers.Layout | None = None,
    widths: Annotated[tuple[int, ...], fields.AT_LEAST_1] = (100, 100, 100),
    activation: layers.Activation = "sigmoid",
    norm_layers: Annotated[str | None, layers.DIGITS, names.TRACEABLE] = None,
    norm_after_activation: bool = False,
    bias_before_norm: bool = False,
    dropout_rate: Annotated[float, fields.BELOW_1] = 0.0,
) -> MLP:
    """Return `MLP` by options that can be written on a command line.

    Args:
      norm: as the attribute.
      num_classes: as the attribute.
      dtype: as the attribute.
      layout: of images; dense layers are the same in any.
      widths: as the attribute.
      activation: name of the function, of `layers.ACTIVATIONS`; "gelu" is its
        approximation by tanh.
      norm_layers: as many digits as hidden layers, such as "011", or an array of
        booleans; None for a norm at each.
      norm_after_activation: as the attribute.
      bias_before_norm: as the attribute.
      dropout_rate: as the attribute.

    Raises:
      ConfigError: if there are more or fewer digits than hidden layers, or the
        activation is unknown.
    """
    del layout
    switches = layers.switches_of(norm_layers)
    layers.norm_switches(norm, switches, len(widths))  # refuses a wrong number
    return MLP(
        widths=widths,
        activation=layers.activation_of(activation),
        norm=norm,
        norm_layers=switches,
        norm_after_activation=norm_after_activation,
        bias_before_norm=bias_before_norm,
        dropout_rate=dropout_rate,
        num_classes=num_classes,
        dtype=dtype,
    )


XAVIER = layers.compiled(initializers.xavier_uniform())


class MLP(nn.Module):
    """Hidden dense layers, each with an activation and perhaps a norm, and a last one.

    Attributes:
      widths: number of outputs of each hidden layer.
      activation: function of an array; `lambda x: x` makes the network linear.
      norm: constructor of the normalisation, as `layers.norm_layer` calls it; None for
        no normalisation.
      norm_layers: which hidden layers have their norm: a boolean for each, or an array
        `[len(widths)]`; None for all. With an array, which may be traced, all norms are
        there, and those that are off are passed by.
      norm_after_activation: whether the norm follows the activation instead of the
        dense layer.
      bias_before_norm: whether a dense layer directly before a norm has a bias; batch
        norm subtracts it again. All others have one, but where an array switches the
        norm off.
      dropout_rate: share of each hidden layer's outputs that training sets to 0; what
        is left is scaled up. It draws from the random stream "dropout".
      kernel_init: initializer of the kernels; the default, Xavier's uniform, suits the
        sigmoid, and `flax.linen.initializers.he_normal()` ReLU.
      num_classes: number of outputs.
      dtype: to compute in, such as `jnp.bfloat16`; None for that of the examples and
        parameters, promoted. Parameters are float32, and so are the logits.

    References:
      Ioffe and Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training
      by Reducing Internal Covariate Shift", arXiv:1502.03167, section 4.1 (a network of
      the default widths, with sigmoids).
      Glorot and Bengio, 2010, "Understanding the difficulty of training deep
      feedforward neural networks" (initial values).
    """

    widths: Sequence[int] = (100, 100, 100)
    activation: Callable[[Array], Array] = jax.nn.sigmoid
    norm: layers.NormConstructor | None = None
    norm_layers: Sequence[bool] | Array | None = None
    norm_after_activation: bool = False
    bias_before_norm: bool = False
    dropout_rate: float = 0.0
    kernel_init: initializers.Initializer = XAVIER
    num_classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return the logits of a batch.

        Args:
          x: examples `[N, ...]`, each flattened.
          train: whether norms use the batch's statistics and move their averages, and
            dropout drops.

        Returns:
          Logits `[N, num_classes]`.

        Raises:
          ConfigError: if `norm_layers` has more or fewer entries than `widths`.
          TypeError: if `norm` is not a constructor.
        """
        switches = layers.norm_switches(self.norm, self.norm_layers, len(self.widths))
        dense = functools.partial(
            nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype
        )
        x = x.reshape(x.shape[0], -1)
        for i, (width, switch) in enumerate(
            zip(self.widths, switches, strict=True), start=1
        ):
            norm = layers.norm_layer(
                self.norm,
                train=train,
                axis=-1,
                batch_axis=0,
                name=f"norm{i}",
                switch=switch,
            )
            use_bias = (
                switch is False or self.norm_after_activation or self.bias_before_norm
            )
            x = dense(width, use_bias=use_bias, name=f"dense{i}")(x)
            if self.norm_after_activation:
                x = self.activation(x)
                x = norm(x).astype(x.dtype)
            else:
                x = self.activation(norm(x).astype(x.dtype))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        last = dense(self.num_classes, name=f"dense{len(self.widths) + 1}")
        return layers.to_logits(last(x))
