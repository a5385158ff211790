"""Which parameters learn, at which rate, and which of them decay.

Kinds of parameters are told apart by the tree, not by the names of layers. A norm is a
module without submodules that has a `scale` or a `bias` with at least one axis, and no
other parameter with more than one, averages aside. That holds for Flax's norms and
ours, but not for layers with a kernel, nor for the blocks of Fixup and SkipInit with
their scalars. A module with a bias alone counts as a norm, since centring has no other
parameter. A norm's gamma is its `scale`, its beta is its `bias`.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bn_jax.fields import ConfigError, Range
from bn_jax.names import TRACEABLE, Table
from bn_jax.training.streams import Stream, key_of
from bn_jax.variables import MOVING_PRODUCTS


def of_norms(params: Any) -> Any:
    """Return which parameters are a norm's: a tree of booleans like `params`."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(params)
    modules: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
    parents: set[Any] = set()
    for path, leaf in with_paths:
        modules[path[:-1]][_path_text(path[-1:])] = leaf
        parents.update(path[:n] for n in range(len(path) - 1))
    is_norm = {
        module: module not in parents and _are_of_norm(leaves)
        for module, leaves in modules.items()
    }
    return jax.tree.unflatten(structure, [is_norm[path[:-1]] for path, _ in with_paths])


def _are_of_norm(leaves: dict[str, Any]) -> bool:
    """Return whether a norm has these parameters, of a module without submodules."""
    affine = [leaf for name, leaf in leaves.items() if name in ("scale", "bias")]
    others = [
        leaf
        for name, leaf in leaves.items()
        if name not in ("scale", "bias", MOVING_PRODUCTS)
    ]
    return any(leaf.ndim > 0 for leaf in affine) and all(
        leaf.ndim <= 1 for leaf in others
    )


def kernels(params: Any) -> Any:
    """Return which parameters are kernels: a tree of booleans like `params`.

    Kernels, embeddings included, are the arrays with two axes or more that no norm has
    and that are not called `bias`.
    """
    return jax.tree.map(
        lambda path, of_norm, leaf: (
            leaf.ndim >= 2 and not of_norm and path.rpartition("/")[-1] != "bias"
        ),
        _tree_of_paths(params),
        of_norms(params),
        params,
    )


def leaf_paths(params: Any) -> list[str]:
    """Return the paths of all parameters, such as `stage1_block1/conv1/kernel`."""
    return [
        _path_text(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def _tree_of_paths(tree: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), leaf_paths(tree))


def _path_text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def all_parameters(
    *,
    seed: int | Array,
    gamma: Annotated[bool, TRACEABLE] = True,
    beta: Annotated[bool, TRACEABLE] = True,
) -> optax.GradientTransformation | None:
    """Train all parameters, or all but the norms' gamma or beta.

    Returns:
      A transformation that sets their updates to zero; None where all learn.
    """
    del seed
    if gamma is True and beta is True:
        return None
    return _freeze(gamma, beta, lambda path: True)


def norms(
    *,
    seed: int | Array,
    also: str | None = None,
    gamma: Annotated[bool, TRACEABLE] = True,
    beta: Annotated[bool, TRACEABLE] = True,
) -> optax.GradientTransformation:
    """Train the norms, and the layer whose path is `also`, such as `dense3`.

    Returns:
      What freezes the others. Its `init` raises ConfigError if no norm has parameters
      and there is no `also`, or the model has no such layer.

    References:
      Frankle, Schwab and Morcos, 2021, "Training BatchNorm and only BatchNorm",
      arXiv:2003.00152.
    """
    del seed

    def is_also(path: str) -> bool:
        return also is not None and f"{path}/".startswith(f"{also}/")

    def check(params: Any) -> None:
        paths = leaf_paths(params)
        if also is None and not any(jax.tree.leaves(of_norms(params))):
            raise ConfigError(
                "trained='norms' with a model whose norms have no parameters: nothing "
                "would learn; expected a norm, or a layer in also"
            )
        if also is not None and not any(map(is_also, paths)):
            layers = dict.fromkeys(path.partition("/")[0] for path in paths)
            raise ConfigError(
                f"trained='norms:also={also}'; expected a layer of the model: "
                f"{_listed(layers)}"
            )

    return _freeze(gamma, beta, is_also, check)


def at_random(
    *, seed: int | Array, per_channel: bool = False
) -> optax.GradientTransformation:
    """Train as many parameters as norms have, but others, chosen by the seed.

    Args:
      seed: that chooses.
      per_channel: whether as many are chosen of each output of a kernel as norms of so
        many channels have of one channel, as Frankle et al. do. Otherwise they are
        chosen of all, and the largest kernel has most of them.

    Returns:
      What freezes the others. Its `init` raises ConfigError if no norm has parameters,
      or `per_channel` finds no kernels to share them out to evenly.

    References:
      Frankle, Schwab and Morcos, 2021, "Training BatchNorm and only BatchNorm",
      arXiv:2003.00152.
    """
    choose = _of_each_channel if per_channel else _of_all
    key = key_of(seed, Stream.TRAINED)

    def init(params: Any) -> _LearnsState:
        leaves, structure = jax.tree.flatten(params)
        is_norm = jax.tree.leaves(of_norms(params))
        if not any(is_norm):
            raise ConfigError(
                "trained='random' with a model whose norms have no parameters: nothing "
                "would learn; expected a norm"
            )
        norms_have = [leaf for leaf, n in zip(leaves, is_norm, strict=True) if n]
        others = [leaf for leaf, n in zip(leaves, is_norm, strict=True) if not n]
        chosen = iter(choose(key, norms_have, others))
        learns = [
            jnp.zeros(leaf.shape, bool) if of_norm else next(chosen)
            for leaf, of_norm in zip(leaves, is_norm, strict=True)
        ]
        return _LearnsState(jax.tree.unflatten(structure, learns))

    def update(
        updates: Any, state: _LearnsState, params: Any = None
    ) -> tuple[Any, _LearnsState]:
        del params
        frozen = jax.tree.map(lambda u, w: jnp.where(w, u, 0), updates, state.learns)
        return frozen, state

    return optax.GradientTransformation(init, update)


def _of_all(
    key: Array, norms_have: Sequence[Array], others: Sequence[Array]
) -> list[Array]:
    """Return which parameters are chosen of all others, as arrays of booleans."""
    count = sum(leaf.size for leaf in norms_have)
    sizes = [leaf.size for leaf in others]
    chosen = jax.random.permutation(key, sum(sizes)) < count
    ends = itertools.accumulate(sizes)
    return [
        chosen[end - leaf.size : end].reshape(leaf.shape)
        for leaf, end in zip(others, ends, strict=True)
    ]


def _of_each_channel(
    key: Array, norms_have: Sequence[Array], others: Sequence[Array]
) -> list[Array]:
    """Choose as many parameters of each channel of the kernels as the norms have.

    A kernel's channels are those of its output, its last axis.

    Raises:
      ConfigError: if norms have a number of channels that no kernel has, or the kernels
        have fewer parameters per channel than have to be chosen.
    """
    wanted = collections.Counter[int]()  # by number of channels, of one channel
    for leaf in norms_have:
        wanted[leaf.shape[-1]] += 1
    kernels_with = collections.Counter(o.shape[-1] for o in others if o.ndim >= 2)

    def of_one(number: int, leaf: Array) -> Array:
        channels = leaf.shape[-1] if leaf.ndim >= 2 else 0
        if not wanted[channels]:
            return jnp.zeros(leaf.shape, bool)
        each, rest = divmod(wanted[channels], kernels_with[channels])
        inputs = leaf.size // channels
        if rest or each > inputs:
            raise ConfigError(_NOT_PER_CHANNEL.format(channels, wanted[channels]))
        draws = jax.random.uniform(jax.random.fold_in(key, number), (inputs, channels))
        ranks = jnp.argsort(jnp.argsort(draws, axis=0), axis=0)
        return (ranks < each).reshape(leaf.shape)

    for channels, parameters in wanted.items():
        if not kernels_with[channels]:
            raise ConfigError(_NOT_PER_CHANNEL.format(channels, parameters))
    return [of_one(number, leaf) for number, leaf in enumerate(others)]


_NOT_PER_CHANNEL = (
    "trained='random:per_channel=true' with norms that have, of each of {0} channels, "
    "{1} parameters, which cannot be shared out evenly to kernels with as many "
    "outputs; expected a kernel for each norm, or per_channel=false"
)


TRAINED: Table[optax.GradientTransformation | None] = Table(
    "trained", {"all": all_parameters, "norms": norms, "random": at_random}
)


def with_averages(optimizer: optax.GradientTransformation) -> Any:
    """Optimize all parameters but those that are averages, which their gradient moves.

    Where a model has none, this is the optimizer itself.
    """

    def chosen(params: Any) -> optax.GradientTransformation:
        names = (path.rpartition("/")[2] for path in leaf_paths(params))
        mask = jax.tree.unflatten(
            jax.tree.structure(params), [name == MOVING_PRODUCTS for name in names]
        )
        if not any(jax.tree.leaves(mask)):
            return optimizer
        return optax.multi_transform({True: optax.sgd(1.0), False: optimizer}, mask)

    def init(params: Any) -> Any:
        return chosen(params).init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return chosen(updates).update(updates, state, params)

    return optax.GradientTransformation(init, update)


class _LearnsState(NamedTuple):
    """Which parameters learn."""

    learns: Any  # booleans, a tree like the parameters


def _freeze(
    gamma: bool | Array,
    beta: bool | Array,
    learns: Callable[[str], bool],
    check: Callable[[Any], None] = lambda params: None,
) -> optax.GradientTransformation:
    """Zero the updates of frozen parameters.

    Args:
      gamma: whether the norms' gamma learns.
      beta: whether the norms' beta learns.
      learns: whether another parameter learns, by its path.
      check: called by `init` with the parameters.
    """
    learns_of_norm = {"scale": gamma, "bias": beta}

    def init(params: Any) -> optax.EmptyState:
        check(params)
        return optax.EmptyState()

    def of_one(path: str, of_norm: bool, value: Array) -> Array:
        if of_norm:
            name = path.rpartition("/")[-1]
            return jnp.where(learns_of_norm.get(name, True), value, 0)
        return value if learns(path) else jnp.zeros_like(value)

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None
    ) -> tuple[Any, optax.EmptyState]:
        del params
        paths = _tree_of_paths(updates)
        return jax.tree.map(of_one, paths, of_norms(updates), updates), state

    return optax.GradientTransformation(init, update)


def parse_rate_factors(text: str) -> tuple[tuple[re.Pattern[str], float], ...]:
    """Return patterns of parameters' paths, and factors of the learning rate.

    Args:
      text: `REGEX=FACTOR;REGEX=FACTOR`, such as `bias=0.1;^head/=2`, or "" for none.
        Each expression is searched in paths such as `stage1_block1/conv1/kernel`, and
        the first that matches gives a parameter its factor; 0 freezes it. Expressions
        cannot hold a semicolon.

    Raises:
      ConfigError: if an expression does not compile, or a factor is not 0 or greater.
    """
    found = []
    for part in text.split(";") if text else []:
        pattern, _, factor = part.rpartition("=")
        try:
            compiled, value = re.compile(pattern), float(factor)
        except (re.error, ValueError) as error:
            raise ConfigError(_bad_factor(text, part, f" ({error})")) from None
        if not pattern or not 0 <= value < math.inf:
            raise ConfigError(_bad_factor(text, part, ""))
        found.append((compiled, value))
    return tuple(found)


def _bad_factor(text: str, part: str, reason: str) -> str:
    return (
        f"rate_factors={text!r}: {part!r}{reason}; expected {RATE_FACTORS.words}, with "
        "each factor 0 or greater"
    )


def _are_rate_factors(text: str) -> bool:
    try:
        parse_rate_factors(text)
    except ConfigError:
        return False
    return True


RATE_FACTORS = Range(
    "REGEX=FACTOR;REGEX=FACTOR with regular expressions for paths of parameters, such "
    "as bias=0.1;^head/=2",
    _are_rate_factors,
)


def scale_by(
    factors: tuple[tuple[re.Pattern[str], float], ...],
) -> optax.GradientTransformation:
    """Multiply the updates of each parameter by the factor of the first match.

    Args:
      factors: as `parse_rate_factors` returns them.

    Returns:
      A transformation whose `init` raises ConfigError if a pattern matches no
      parameter.
    """

    def init(params: Any) -> optax.EmptyState:
        paths = leaf_paths(params)
        for pattern, _ in factors:
            if not any(map(pattern.search, paths)):
                raise ConfigError(
                    f"rate_factors has {pattern.pattern!r}, which matches no "
                    f"parameter; expected one that matches some of {_listed(paths)}"
                )
        return optax.EmptyState()

    def of_one(path: str, value: Array) -> Array:
        for pattern, factor in factors:
            if pattern.search(path):
                return value * factor
        return value

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None
    ) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(of_one, _tree_of_paths(updates), updates), state

    return optax.GradientTransformation(init, update)
