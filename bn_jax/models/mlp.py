"""Multilayer perceptrons, with a norm before or after every activation or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from flax.linen import initializers
from jax import Array


class MLP(nn.Module):
    """Hidden dense layers, each with an activation and perhaps a norm, and a last one.

    Attributes:
      widths: number of outputs of each hidden layer.
      activation: function of an array; `lambda x: x` makes the network linear.
      norm: constructor of the normalisation, called as
        `norm(use_running_average=..., axis=-1, name=...)`; None for no normalisation.
      norm_after_activation: whether the norm follows the activation instead of the
        dense layer.
      bias_before_norm: whether a dense layer directly before a norm has a bias; batch
        norm subtracts it again. All others have one.
      kernel_init: initializer of the kernels; the default suits the sigmoid, and
        `flax.linen.initializers.he_normal()` ReLU.
      num_classes: number of outputs.
    """

    widths: Sequence[int] = (100, 100, 100)
    activation: Callable[[Array], Array] = jax.nn.sigmoid
    norm: Callable[..., nn.Module] | None = None
    norm_after_activation: bool = False
    bias_before_norm: bool = False
    kernel_init: initializers.Initializer = initializers.xavier_uniform()
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Return the logits of a batch.

        Args:
          x: examples `[N, ...]`, each flattened.
          train: whether norms use the batch's statistics and move their averages.

        Returns:
          Logits `[N, num_classes]`.
        """

        def normalised(x: Array, i: int) -> Array:
            if self.norm is None:
                return x
            return self.norm(use_running_average=not train, axis=-1, name=f"norm{i}")(x)

        use_bias = (
            self.norm is None or self.norm_after_activation or self.bias_before_norm
        )
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, start=1):
            x = nn.Dense(
                width,
                use_bias=use_bias,
                kernel_init=self.kernel_init,
                name=f"dense{i}",
            )(x)
            if self.norm_after_activation:
                x = normalised(self.activation(x), i)
            else:
                x = self.activation(normalised(x, i))
        return nn.Dense(
            self.num_classes,
            kernel_init=self.kernel_init,
            name=f"dense{len(self.widths) + 1}",
        )(x)
