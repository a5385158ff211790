"""LeNet with batch normalisation, as the d2l chapter has it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from jax import Array

from bn_jax.models import layers


class LeNet(nn.Module):
    """LeNet of two 5 x 5 convolutions and three dense layers with sigmoids.

    Each of the first four is followed by `norm`, when there is one, before its
    activation. Kernels start from Xavier's uniform distribution, biases from 0.

    Attributes:
      norm: constructor of the normalisation, called as
        `norm(use_running_average=..., axis=..., name=...)`: `bn_jax.linen.BatchNorm`,
        `flax.linen.BatchNorm` or a `functools.partial` of one; None for no
        normalisation.
      norm_layers: which of the four have their norm. An array instead of booleans may
        be traced; then all norms are there, and those that are off are passed by.
      bias_before_norm: whether the layers before a norm have a bias, as the chapter's
        do; batch norm subtracts it again. Without norm they always have one.
      activation: after each of the four layers, and its norm; the chapter's is the
        sigmoid.
      dropout_rate: share of values that training sets to 0; what is left is scaled up.
        It draws from the random stream "dropout".
      dropout_at: after which activations: "dense", both dense layers', of which the
        first is followed by a norm; or "last", the second's alone, which no norm
        follows.
      first_padding: pixels of 0 around the images: 0 in the chapter on batch
        normalisation, 2 in the one that introduces LeNet without it.
      num_classes: number of outputs.
      ghost_batch_size: number of examples that share statistics, for a `norm` that
        takes `ghost_batch_size` and `batch_axis`, as ours does; None for the batch.
      layout: order of the axes of the convolutions' activations; None chooses the
        faster one for the backend. Parameters and results do not depend on it.

    References:
      LeCun et al., 1998, "Gradient-based learning applied to document recognition".
      Glorot and Bengio, 2010, "Understanding the difficulty of training deep
      feedforward neural networks".
      Srivastava et al., 2014, "Dropout: a simple way to prevent neural networks from
      overfitting".
    """

    norm: Callable[..., nn.Module] | None = None
    norm_layers: Sequence[bool] | Array = (True, True, True, True)
    bias_before_norm: bool = True
    activation: Callable[[Array], Array] = jax.nn.sigmoid
    dropout_rate: float = 0.0
    dropout_at: Literal["dense", "last"] = "dense"
    first_padding: int = 0
    num_classes: int = 10
    ghost_batch_size: int | None = None
    layout: layers.Layout | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return the logits of a batch of images.

        Args:
          x: images `[N, 28, 28, 1]`, pixels in [0, 1].
          train: whether norms use the batch's statistics and move their averages, and
            dropout drops.

        Returns:
          Logits `[N, num_classes]`.
        """
        layout = self.layout or layers.default_layout()
        xavier = initializers.xavier_uniform()

        def has_norm(i: int) -> Any:
            return self.norm is not None and self.norm_layers[i - 1]

        def use_bias(i: int) -> bool:
            return self.bias_before_norm or has_norm(i) is False

        def norm_activation(x: Array, i: int, axis: int, batch_axis: int) -> Array:
            if self.norm is not None and has_norm(i) is not False:
                options: dict[str, Any] = {"axis": axis, "name": f"norm{i}"}
                if _takes_batch_axis(self.norm):
                    options["batch_axis"] = batch_axis
                if self.ghost_batch_size is not None:
                    options["ghost_batch_size"] = self.ghost_batch_size
                y = self.norm(use_running_average=not train, **options)(x)
                x = y if has_norm(i) is True else jnp.where(has_norm(i), y, x)
            return self.activation(x)

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
                name=f"conv{i}",
            )
            x = norm_activation(conv(x), i, layout.index("C"), layout.index("N"))
            x = layers.avg_pool_2x2(x, layout)
        x = layers.to_nhwc(x, layout)
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate((120, 84), start=1):
            dense = nn.Dense(
                features, use_bias=use_bias(i + 2), kernel_init=xavier, name=f"dense{i}"
            )
            x = norm_activation(dense(x), i + 2, -1, 0)
            if i == 2 or self.dropout_at == "dense":
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=xavier, name="dense3")(x)


def _takes_batch_axis(norm: Callable[..., nn.Module]) -> bool:
    """Return whether a norm's constructor, or a partial of it, has that attribute."""
    module = norm.func if isinstance(norm, functools.partial) else norm
    return "batch_axis" in getattr(module, "__dataclass_fields__", {})
