"""The contract that every norm fulfils: a pair of pure functions, as in optax.

    params, state = transform.init(num_features)
    y, state = transform.apply(x, params, state, train=True)

Beside it stands what the files of the norms share. Their names are in
`bn_jax.transforms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bn_jax.fields import POSITIVE, SHARE, ConfigError, counted
from bn_jax.names import TRACEABLE

# Options that many norms have.
Momentum = Annotated[float, SHARE, TRACEABLE]  # weight of the OLD average
Epsilon = Annotated[float, POSITIVE, TRACEABLE]

# The keywords that norms take whose statistics are moments of the batch.
MOMENTS = frozenset(
    {"weights", "axis_name", "axis_index_groups", "statistics", "update_state"}
)


class EmptyState(NamedTuple):
    """The state of a transform that averages nothing over batches."""


class DivisorError(ConfigError):
    """An option of a norm that does not divide the number of features.

    For networks the option is to blame, not the images.

    Attributes:
      option: with its value, as in "num_groups=4".
      num_features: the number of features.
      otherwise: what else than a divisor can be given.
    """

    def __init__(
        self, option: str, num_features: int, *, of: str = "", otherwise: str = ""
    ) -> None:
        """Make the error of one layer.

        Args:
          option: see the attribute.
          num_features: see the attribute.
          of: what has the features, such as "x of shape [5, 6]".
          otherwise: see the attribute.
        """
        super().__init__(
            f"{option} does not divide the {counted(num_features, 'feature')}"
            f"{of and f' of {of}'}; give a divisor of {num_features}{otherwise}"
        )
        self.option, self.num_features = option, num_features
        self.otherwise = otherwise


class Transform(NamedTuple):
    """A norm with its options bound.

    Attributes:
      init: `init(num_features, dtype=jnp.float32) -> (params, state)`, both NamedTuples
        of arrays; parameters may be None. The state is empty where nothing is averaged,
        and in float32 or wider where there is one.
      apply: `apply(x, params, state, *, train, feature_axis=-1, batch_axis=0, ...) ->
        (y, state)`: y of x's shape and dtype. The dots are what `takes` names.
      takes: further keyword arguments of `apply`, all with the meaning that they have
        for `bn_jax.batch_norm`: of weights, axis_name, axis_index_groups,
        ghost_batch_size, statistics, update_state.
      uses_batch: whether what becomes of an example depends on the others of its batch
        in training.
      epsilon: what is added to the variance, for a transform that predicts by
        (x - mean) / sqrt(var + epsilon) with the mean and var of its state; else None.
      name: for messages.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[Array, Any]]
    takes: frozenset[str] = frozenset()
    uses_batch: bool = True
    epsilon: Any = None
    name: str = "norm"


def initializer(
    function: Callable[..., tuple[Any, Any]], **options: Any
) -> Callable[..., tuple[Any, Any]]:
    """Bind options to a function that makes parameters and state.

    Examples:
      >>> from bn_jax import init
      >>> init_without_bias = initializer(init, bias=False)
      >>> params, state = init_without_bias(2)
      >>> params.scale.tolist(), params.bias
      ([1.0, 1.0], None)
    """

    def init(
        num_features: int | Sequence[int], dtype: Any = jnp.float32
    ) -> tuple[Any, Any]:
        return function(num_features, dtype=dtype, **options)

    return init


def without_batch_axis(
    function: Callable[..., tuple[Array, Any]], **options: Any
) -> Callable[..., tuple[Array, Any]]:
    """Bind options to a function that takes no `batch_axis`, and accept one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bn_jax.variants.one_moment import center, init_center
      >>> apply = without_batch_axis(center, momentum=0.75)
      >>> x = jnp.array([[1.0], [5.0]])
      >>> y, state = apply(x, *init_center(1), train=True, batch_axis=0)
      >>> y.ravel().tolist(), state.mean.tolist()
      ([-2.0, 2.0], [0.75])
    """

    def apply(
        x: Array, params: Any, state: Any, *, batch_axis: int = 0, **call: Any
    ) -> tuple[Array, Any]:
        del batch_axis
        return function(x, params, state, **options, **call)

    return apply
