r"""Batch norm layers to and from PyTorch, Keras 3, Haiku, Equinox and Flax.

Everything goes through one form, `BatchNormLayer`: parameters, moving averages, and the
number of batches in them. `from_*` and `to_*` convert a single layer, `layers_from` and
`layers_into` all batch norm layers of a model, by name. None of the libraries is
imported: entries are mappings from names to whatever `numpy.asarray` takes, and come
back as NumPy arrays that share no memory with what was given. Conversion is for outside
of `jit`.

Entries hold no hyperparameters: see `DEFAULTS`, and mind that bn_jax's momentum is the
weight of the OLD average, PyTorch's that of the new value (`momentum_from_torch`).

What each library averages, for a layer to go on training as it did:

- Keras, Flax: as bn_jax with constant momentum.
- Haiku, Equinox in mode "batch": free of the initial value, as bn_jax with
  `debiased_momentum(momentum, num_batches)`. Both compute 1 - momentum**num_batches in
  float32, which costs them digits where it is small: 3 batches with momentum 0.999
  leave them a relative error of up to 2e-5.
- Equinox in mode "ema": as bn_jax, but the first batch is taken whole, and training
  normalises by the updated average: see `from_equinox`.
- PyTorch: as bn_jax with constant momentum, or with `cumulative_momentum(num_batches)`
  for its momentum None; but of variances divided by n - 1, where n is the number of
  values a feature has in the batch (N, or N times H times W). The moving variance is
  taken as it is, so that predictions stay the same, and then there are two ways on:

  - Train on PyTorch's average. Its state and predictions are matched step by step by
    `batch_norm(..., update_state=False)` and
    `update_average(state, unbiased(measure(x)), momentum=...)`.
  - Train on bn_jax's average. `biased_average(state, values_per_feature=n)` is what it
    would hold had every batch had n values: predictions change by a factor of up to
    $\sqrt{n / (n - 1)}$. Training commutes with this, while n stays the same:
    `unbiased_average` gives PyTorch's state again after any number of steps.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bn_jax.functional import BatchNormParams, BatchNormState, cumulative_momentum
from bn_jax.moments import Moments, statistics_dtype

Library = Literal[
    "torch", "keras", "flax", "nnx", "haiku", "equinox_ema", "equinox_batch"
]
Entries = Mapping[Any, Any]
Like = tuple[Any, ...]  # (params, state), as bn_jax.init returns, or a BatchNormLayer


class BatchNormLayer(NamedTuple):
    """A batch norm layer as bn_jax has it."""

    params: BatchNormParams
    state: BatchNormState
    num_batches: int | None = None  # batches in the averages; None where not known


class Hyperparameters(NamedTuple):
    """What a state dict leaves out."""

    momentum: float | None  # weight of the OLD average; None where it must be given
    epsilon: float


# Of the constructors in torch 2.13, keras 3.15, flax 0.12, dm-haiku 0.0.17 and
# equinox 0.13; the parity tests compare them.
DEFAULTS: Mapping[str, Hyperparameters] = types.MappingProxyType(
    {
        "torch": Hyperparameters(momentum=0.9, epsilon=1e-5),
        "keras": Hyperparameters(momentum=0.99, epsilon=1e-3),
        "flax": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "nnx": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "haiku": Hyperparameters(momentum=None, epsilon=1e-5),
        "equinox_ema": Hyperparameters(momentum=0.99, epsilon=1e-5),
        "equinox_batch": Hyperparameters(momentum=0.99, epsilon=1e-5),
    }
)

# Where each library keeps what: {} is the name of the layer, levels are joined by "/".
_PLACES: dict[str, dict[str, str]] = {
    "torch": {
        "scale": "{}.weight",
        "bias": "{}.bias",
        "mean": "{}.running_mean",
        "var": "{}.running_var",
        "num_batches": "{}.num_batches_tracked",
    },
    "keras": {
        "scale": "{}/gamma",
        "bias": "{}/beta",
        "mean": "{}/moving_mean",
        "var": "{}/moving_variance",
    },
    "flax": {
        "scale": "params/{}/scale",
        "bias": "params/{}/bias",
        "mean": "batch_stats/{}/mean",
        "var": "batch_stats/{}/var",
        "num_batches": "batch_stats/{}/count",
    },
    "nnx": {
        "scale": "{}/scale",
        "bias": "{}/bias",
        "mean": "{}/mean",
        "var": "{}/var",
    },
    "haiku": {
        "scale": "params/{}/scale",
        "bias": "params/{}/offset",
        "mean": "state/{}/~/mean_ema/average",
        "mean_hidden": "state/{}/~/mean_ema/hidden",
        "num_batches": "state/{}/~/mean_ema/counter",
        "var": "state/{}/~/var_ema/average",
        "var_hidden": "state/{}/~/var_ema/hidden",
        "var_num_batches": "state/{}/~/var_ema/counter",
    },
    "equinox_ema": {
        "scale": "{}/weight",
        "bias": "{}/bias",
        "mean": "{}/running_mean",
        "var": "{}/running_var",
        "first_time": "{}/first_time",
    },
    "equinox_batch": {
        "scale": "{}/weight",
        "bias": "{}/bias",
        "mean_hidden": "{}/hidden_mean",
        "var_hidden": "{}/hidden_var",
        "num_batches": "{}/counter",
    },
}
# PyTorch wrote no counter before 0.4.1; Flax has none, bn_jax.linen one on demand.
_OPTIONAL = {"torch": {"num_batches"}, "flax": {"num_batches"}}
_SCALARS = {"num_batches", "var_num_batches", "first_time"}
_STATISTICS = {"mean", "var", "mean_hidden", "var_hidden"}


def momentum_from_torch(
    momentum: float | None, num_batches: ArrayLike | None = None
) -> float | Array:
    """Return bn_jax's momentum, the weight of the OLD average, for PyTorch's.

    Args:
      momentum: PyTorch's, the weight of the new value; None averages all batches.
      num_batches: number of batches in the old average; for momentum None alone.

    Raises:
      ValueError: if momentum is outside [0, 1], or None without num_batches.

    Examples:
      >>> momentum_from_torch(0.1)
      0.9
    """
    if momentum is not None:
        return _complement(momentum, "PyTorch's weight of the new value")
    if num_batches is None:
        raise ValueError(
            "momentum=None, PyTorch's average of all batches, needs num_batches: give "
            "the layer's num_batches_tracked"
        )
    return cumulative_momentum(num_batches)


def momentum_to_torch(momentum: float) -> float:
    """Return PyTorch's momentum, the weight of the new value, for bn_jax's.

    Args:
      momentum: bn_jax's, the weight of the OLD average. What `cumulative_momentum`
        gives step by step is PyTorch's momentum None.

    Raises:
      ValueError: if momentum is outside [0, 1].
    """
    return _complement(momentum, "bn_jax's weight of the old average")


def unbiased(moments: Moments) -> Moments:
    """Return moments with the variance that PyTorch averages: over n - 1, not n.

    Args:
      moments: of a batch. Of a single value, which PyTorch refuses, the variance stays.
    """
    n = moments.count
    ratio = jnp.where(n > 1, n / jnp.where(n > 1, n - 1, 1), 1)
    return moments._replace(var=moments.var * ratio)


def biased_average(state: BatchNormState, *, values_per_feature: int) -> BatchNormState:
    """Return PyTorch's averages as bn_jax would have them, of biased variances.

    Exact where every batch had the same number of values, but for the weight of the
    variance's initial 1, which is scaled along.

    Args:
      state: with PyTorch's running_var, of variances over n - 1.
      values_per_feature: n, number of values of a feature in a batch, at least 2: the
        batch size, times height and width for images.

    Raises:
      ValueError: if there are fewer than 2 values.
    """
    n = _check_values(values_per_feature)
    return state._replace(var=state.var * ((n - 1) / n))


def unbiased_average(
    state: BatchNormState, *, values_per_feature: int
) -> BatchNormState:
    """Return bn_jax's averages as PyTorch would have them; undoes `biased_average`.

    Args:
      state: with bn_jax's average of biased variances.
      values_per_feature: as for `biased_average`.

    Raises:
      ValueError: if there are fewer than 2 values.
    """
    n = _check_values(values_per_feature)
    return state._replace(var=state.var * (n / (n - 1)))


def without_equinox_excess(layer: BatchNormLayer, *, momentum: float) -> BatchNormLayer:
    r"""Return a layer of Equinox's mode "batch" with the variance that it meant.

    Equinox 0.13 starts that average at 1, and divides it by $1 - m^t$ as if it had
    started at 0. What it predicts by is too large by $m^t / (1 - m^t)$: by 99 after the
    first batch with m = 0.99, by 0.58 after 100.

    Args:
      layer: as `from_equinox` returns it, trained in Equinox from its initial state.
      momentum: m, weight of the OLD average, of the layer.

    Raises:
      ValueError: if the number of batches is not known.
    """
    if layer.num_batches is None:
        raise ValueError(
            "num_batches is None; expected that of a layer of Equinox's mode 'batch': "
            "set it by layer._replace(num_batches=...)"
        )
    if layer.num_batches == 0:
        return layer
    excess = 1 / _debias(momentum, layer.num_batches) - 1
    return layer._replace(state=layer.state._replace(var=layer.state.var - excess))


def from_torch(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for the `state_dict()` of a PyTorch BatchNorm1d, 2d or 3d.

    Its averages are taken as they are, and predict as in PyTorch. They hold variances
    over n - 1: the module docstring says how to train on.

    Args:
      entries: weight, bias, running_mean, running_var and, unless from an old version,
        num_batches_tracked. bfloat16 and CUDA tensors: `.float().cpu()` them first.
      like: `(params, state)` as `bn_jax.init` returns, which says the expected shape
        and whether there are scale and bias; by default any one shape, and both.

    Raises:
      ValueError: if entries are missing, extra or misshapen; all are named.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [0.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> layer.state.var.tolist(), layer.num_batches
      ([4.0], 7)
    """
    return _from_single("torch", entries, like)


def to_torch(layer: BatchNormLayer) -> dict[str, np.ndarray]:
    """Return the state dict of a PyTorch BatchNorm1d, 2d or 3d, in NumPy arrays.

    Load it by `bn.load_state_dict({k: torch.as_tensor(v) for k, v in ...items()})`. The
    moving variance is written as it is; see `unbiased_average`.

    Args:
      layer: to be written. Where `num_batches` is None, num_batches_tracked is 0: only
        PyTorch's momentum None reads it, and would then forget the averages.
    """
    return _to_single("torch", layer)


def from_keras(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for a Keras 3 BatchNormalization.

    Args:
      entries: gamma, beta, moving_mean and moving_variance:
        `{w.name: w.numpy() for w in layer.weights}`.
      like: as for `from_torch`.

    Raises:
      ValueError: if entries are missing, extra or misshapen; all are named.
    """
    return _from_single("keras", entries, like)


def to_keras(layer: BatchNormLayer) -> dict[str, np.ndarray]:
    """Return gamma, beta, moving_mean and moving_variance of a Keras 3 layer.

    In this order they are what `set_weights(list(...values()))` takes. Mind Keras's
    epsilon, by default 1e-3.

    Args:
      layer: to be written.
    """
    return _to_single("keras", layer)


def from_flax(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for the variables of a Linen BatchNorm, Flax's or bn_jax's.

    Args:
      entries: `{"params": {scale, bias}, "batch_stats": {mean, var}}`, with `count` in
        the latter where bn_jax.linen.BatchNorm keeps one.
      like: as for `from_torch`.

    Raises:
      ValueError: if entries are missing, extra or misshapen; all are named.
    """
    return _from_single("flax", entries, like)


def to_flax(
    layer: BatchNormLayer, *, count: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Return the variables of a Linen BatchNorm, Flax's or bn_jax's.

    Args:
      layer: to be written.
      count: whether `batch_stats` holds the number of batches, as for
        bn_jax.linen.BatchNorm with an average "debiased" or "cumulative".

    Raises:
      ValueError: if a count is wanted and `num_batches` is None.
    """
    return _to_single("flax", layer, optional=count)


def from_nnx(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for the state of a `flax.nnx.BatchNorm`.

    Args:
      entries: scale, bias, mean and var: `nnx.state(layer)`.
      like: as for `from_torch`.

    Raises:
      ValueError: if entries are missing, extra or misshapen; all are named.
    """
    return _from_single("nnx", entries, like)


def to_nnx(layer: BatchNormLayer) -> dict[str, np.ndarray]:
    """Return the state of a `flax.nnx.BatchNorm`: scale, bias, mean and var.

    Args:
      layer: to be written.
    """
    return _to_single("nnx", layer)


def from_haiku(
    params: Entries,
    state: Entries,
    name: str = "batch_norm",
    *,
    like: Like | None = None,
) -> BatchNormLayer:
    """Return the layer for an `hk.BatchNorm`; axes of length 1 are dropped.

    Args:
      params: of `hk.transform_with_state`: scale and offset under `name`.
      state: of the same: counter, hidden and average under `name/~/mean_ema` and
        `name/~/var_ema`. The average is what Haiku predicts by, and what is taken.
      name: of the module; other modules are left alone.
      like: as for `from_torch`.

    Raises:
      ValueError: if entries are missing, extra or misshapen; all are named.
    """
    entries = {"params": params, "state": state}
    return _from_single("haiku", entries, like, name)


def to_haiku(
    layer: BatchNormLayer,
    name: str = "batch_norm",
    *,
    momentum: float,
    num_dims: int,
    feature_axis: int = -1,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """Return `(params, state)` of an `hk.BatchNorm`.

    Args:
      layer: to be written. Of averages with constant momentum, which know no number of
        batches, a large one such as `layer._replace(num_batches=10**6)` makes Haiku go
        on with constant momentum.
      name: of the module.
      momentum: weight of the OLD average: the module's decay_rate.
      num_dims: number of axes of the module's inputs; Haiku keeps them all.
      feature_axis: of the module's inputs: 1 for its channels_first.

    Raises:
      ValueError: if `num_batches` is None, or momentum or axis out of range.
    """
    _check_momentum("haiku", momentum, reading=False)
    shape = [1] * num_dims
    if not -num_dims <= feature_axis < num_dims:
        raise ValueError(
            f"feature_axis={feature_axis} is no axis of inputs of num_dims={num_dims}; "
            f"give an integer in [{-num_dims}, {num_dims - 1}]"
        )
    shape[feature_axis] = -1
    roles = _to_roles("haiku", layer, momentum)
    trees: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "state": {}}
    for role, value in roles.items():
        collection, rest = _key(_PLACES["haiku"][role], name).split("/", 1)
        module, entry = rest.rsplit("/", 1)
        value = value if role in _SCALARS else value.reshape(shape)
        trees[collection].setdefault(module, {})[entry] = value
    return trees["params"], trees["state"]


def from_equinox(
    entries: Entries,
    *,
    mode: Literal["ema", "batch"],
    momentum: float | None = None,
    like: Like | None = None,
) -> BatchNormLayer:
    """Return the layer for an `equinox.nn.BatchNorm`; predicts as Equinox does.

    Mode "ema" normalises by the updated average in training too. In bn_jax that is
    `state = update_average(state, measure(x), momentum=...)`, then
    `batch_norm(..., train=True, update_state=False, statistics=state)`, differentiated
    as a whole. The momentum at the first batch is 0.

    Mode "batch" predicts by too large a variance until training has gone on for a few
    times 1 / (1 - momentum) batches (Equinox 0.13): see `without_equinox_excess`.

    Args:
      entries: weight and bias (attributes of the layer), and in mode "ema" first_time,
        running_mean and running_var: `state.get(layer.ema_first_time_index)` and the
        pair `state.get(layer.ema_state_index)`; in mode "batch" counter, hidden_mean
        and hidden_var: `state.get(layer.batch_counter)` and the pair
        `state.get(layer.batch_state_index)`. An entry None counts as absent.
      mode: of the layer.
      momentum: weight of the OLD average, of the layer; for mode "batch", which keeps
        the average times 1 - momentum**counter.
      like: as for `from_torch`.

    Raises:
      ValueError: if entries are missing, extra or misshapen, which are all named; or
        if the mode is unknown, or its momentum missing.
    """
    return _from_single(_equinox(mode), entries, like, momentum=momentum)


def to_equinox(
    layer: BatchNormLayer,
    *,
    mode: Literal["ema", "batch"],
    momentum: float | None = None,
) -> dict[str, np.ndarray]:
    """Return the entries of an `equinox.nn.BatchNorm`, named as for `from_equinox`.

    `state.set` wants the counter as `jax.numpy.array(int(entries["counter"]))`, since
    Equinox's own is of a weak type, which no NumPy array has.

    Args:
      layer: to be written. Mode "batch" needs `num_batches`; of averages with constant
        momentum give a large one, as for `to_haiku`. With 0 it goes on training as from
        the start, but keeps the averages: Equinox's counter hides no initial value.
      mode: of the layer.
      momentum: weight of the OLD average, of the layer; for mode "batch".

    Raises:
      ValueError: if the mode is unknown, or its momentum or `num_batches` missing.
    """
    return _to_single(_equinox(mode), layer, momentum=momentum)


def layers_from(
    library: Library,
    entries: Entries,
    names: Mapping[str, str | None],
    *,
    like: Mapping[str, Like] | None = None,
    momentum: float | None = None,
) -> dict[str, BatchNormLayer]:
    """Return all batch norm layers of a model's state.

    Args:
      library: torch, keras, flax, nnx, haiku, equinox_ema or equinox_batch.
      entries: of the model, with entries other than batch norm's or without:
        torch, its `state_dict()`; keras, `{w.path: w.numpy() for w in model.weights}`;
        flax, its variables, nested or flattened; nnx, `nnx.state(model)`; haiku,
        `{"params": params, "state": state}`; equinox, names of your own to entries as
        `from_equinox` takes them.
      names: from each layer's name there to its name in the result, or to None to leave
        it out. Levels of nested names are joined by "/": "Block_0/BatchNorm_0".
      like: from names in the result to what `from_torch` takes as `like`.
      momentum: as for `from_equinox`; for equinox_batch alone.

    Raises:
      ValueError: if entries of the named layers are missing or misshapen, or there are
        others, of these or of batch norm layers without a name; all are named. If two
        layers get the same name.

    Examples:
      >>> bn = {"weight": [1.0], "bias": [0.0], "running_mean": [2.0],
      ...       "running_var": [3.0]}
      >>> state_dict = {f"features.1.{name}": value for name, value in bn.items()}
      >>> layers = layers_from("torch", state_dict, {"features.1": "BatchNorm_0"})
      >>> layers["BatchNorm_0"].state.mean.tolist()
      [2.0]
    """
    _check_momentum(library, momentum, reading=True)
    chosen = _check_names(names)
    flat = dict(_flatten(entries))
    like = like or {}
    problems = _Problems()
    problems.missing += [f"{ours} (in like)" for ours in like.keys() - chosen.values()]
    read = {
        ours: _read(library, flat, theirs, like.get(ours), problems)
        for theirs, ours in chosen.items()
    }
    problems.extra += _unmapped(library, flat, names)
    problems.refuse(library)
    return {ours: _to_layer(roles, momentum) for ours, roles in read.items()}


def layers_into(
    library: Library,
    entries: Entries,
    layers: Mapping[str, BatchNormLayer],
    names: Mapping[str, str | None],
    *,
    momentum: float | None = None,
) -> dict[Any, Any]:
    """Return a copy of a model's state with all batch norm layers replaced.

    Args:
      library: as for `layers_from`.
      entries: of the model, such as its initial state, as for `layers_from`. They say
        which shapes are expected, and whether there are scale and bias.
      layers: by the names that `names` maps to.
      names: as for `layers_from`: from the layer's name in `entries` to that in
        `layers`, or to None to leave it as it is.
      momentum: weight of the OLD average, of the layers; for haiku and equinox_batch
        alone.

    Returns:
      Nested dicts like `entries`, with NumPy arrays in place of the layers' entries and
      all others as they were.

    Raises:
      ValueError: if entries of the layers are missing, extra or misshapen in one or the
        other; all are named.
    """
    _check_momentum(library, momentum, reading=False)
    chosen = _check_names(names)
    flat = dict(_flatten(entries))
    problems = _Problems()
    problems.missing += [
        f"{ours} (in layers)" for ours in chosen.values() if ours not in layers
    ]
    problems.extra += [
        f"{ours} (in layers)" for ours in layers if ours not in chosen.values()
    ]
    replaced: dict[str, np.ndarray] = {}
    for theirs, ours in chosen.items():
        if ours not in layers:
            continue
        layer = layers[ours]
        keys = {role: _key(place, theirs) for role, place in _PLACES[library].items()}
        optional = keys.get("num_batches") in flat
        roles = _to_roles(library, layer, momentum, optional=optional, name=ours)
        _read(library, flat, theirs, layer, problems)
        for role, value in roles.items():
            if (there := _as_array(flat.get(keys[role]))) is not None:
                fits = there.size == value.size
                replaced[keys[role]] = value.reshape(there.shape) if fits else value
    problems.extra += _unmapped(library, flat, names)
    problems.refuse(library)
    return _replace(entries, replaced)


class _Problems:
    """What does not fit, gathered so that one error names it all."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.extra: list[str] = []
        self.misshapen: list[str] = []

    def refuse(self, library: str) -> None:
        """Raise the error, if there is anything to name."""
        mends = {
            "missing": "check names and prefixes; a layer without scale or bias needs "
            "like=bn_jax.init(..., scale=False, bias=False)",
            "extra": "map their layer in names (to None to leave it out), or drop them",
            "misshapen": "give the entries of a layer of the same size",
        }
        found = {kind: list(getattr(self, kind)) for kind in mends}
        lines = [
            f"{kind} ({mend}): {'; '.join(sorted(found[kind]))}"
            for kind, mend in mends.items()
            if found[kind]
        ]
        if lines:
            given = "\n  ".join(lines)
            expected = ", ".join(_PLACES[library].values()).replace("{}", "<layer>")
            raise ValueError(
                f"the batch norm entries do not fit; expected for {library}: "
                f"{expected}\n  {given}"
            )


def _from_single(
    library: str,
    entries: Entries,
    like: Like | None,
    name: str = "",
    *,
    momentum: float | None = None,
) -> BatchNormLayer:
    """Read the one layer called `name` ("" where the entries are its own)."""
    _check_momentum(library, momentum, reading=True)
    problems = _Problems()
    roles = _read(library, dict(_flatten(entries)), name, like, problems)
    problems.refuse(library)
    return _to_layer(roles, momentum)


def _to_single(
    library: str,
    layer: BatchNormLayer,
    *,
    momentum: float | None = None,
    optional: bool = True,
) -> dict[str, Any]:
    """Write a layer as the nested entries of a model that is nothing else."""
    _check_momentum(library, momentum, reading=False)
    tree: dict[str, Any] = {}
    for role, value in _to_roles(library, layer, momentum, optional=optional).items():
        *levels, entry = _key(_PLACES[library][role], "").split("/")
        node = tree
        for level in levels:
            node = node.setdefault(level, {})
        node[entry] = value
    return tree


def _read(
    library: str,
    flat: Mapping[str, Any],
    name: str,
    like: Like | None,
    problems: _Problems,
) -> dict[str, np.ndarray]:
    """Return a layer's entries by role; note what does not fit in `problems`."""
    params, state = (None, None) if like is None else like[:2]
    unwanted = {
        role
        for role in ("scale", "bias")
        if params is not None and getattr(params, role) is None
    }
    keys = {role: _key(place, name) for role, place in _PLACES[library].items()}
    roles: dict[str, np.ndarray] = {}
    for role, key in keys.items():
        if role in unwanted:
            if key in flat:
                problems.extra.append(key)
        elif key in flat:
            value = _as_array(flat[key])
            if value is None:
                problems.misshapen.append(f"{key} is a {type(flat[key]).__name__}")
            else:
                roles[role] = value
        elif role not in _OPTIONAL.get(library, ()):
            problems.missing.append(key)
    separator = "." if library == "torch" else "/"
    parents = {key.rpartition(separator)[0] for key in keys.values()}
    known = set(keys.values())
    problems.extra += [
        key
        for key in flat
        if key not in known and key.rpartition(separator)[0] in parents
    ]
    if library == "haiku":
        roles = {
            role: value if role in _SCALARS else _without_unit_axes(value)
            for role, value in roles.items()
        }
        counters = [
            int(roles[role])
            for role in ("num_batches", "var_num_batches")
            if role in roles and roles[role].shape == ()
        ]
        if len(set(counters)) > 1:
            problems.misshapen.append(
                f"{keys['num_batches']} is {counters[0]} and "
                f"{keys['var_num_batches']} is {counters[1]}, expected the same"
            )
    per_feature = {r: v.shape for r, v in roles.items() if r not in _SCALARS}
    if state is not None:
        expected = np.shape(state.mean)
        if library == "haiku":
            expected = _without_unit_axes(np.empty(expected)).shape
    else:
        # Statistics first: they are what a layer cannot do without.
        ordered = sorted(per_feature, key=lambda role: role not in _STATISTICS)
        expected = per_feature[ordered[0]] if ordered else ()
    for role, value in roles.items():
        wanted = () if role in _SCALARS else expected
        if value.shape != wanted:
            problems.misshapen.append(
                f"{keys[role]} has shape {list(value.shape)}, expected {list(wanted)}"
            )
    return roles


def _unmapped(
    library: str, flat: Mapping[str, Any], names: Mapping[str, str | None]
) -> Iterator[str]:
    """Yield the entries of the batch norm layers that `names` does not speak of."""
    places = _PLACES[library]
    found: dict[str, None] = {}
    for key in flat:
        for role in _STATISTICS & places.keys():
            if (name := _name(places[role], key)) is not None and name not in names:
                found[name] = None
    for name in found:
        for place in places.values():
            if (key := _key(place, name)) in flat:
                yield key


def _to_layer(
    roles: Mapping[str, np.ndarray], momentum: float | None
) -> BatchNormLayer:
    """Return the layer for entries that fit."""
    num_batches = int(roles["num_batches"]) if "num_batches" in roles else None
    if "first_time" in roles:
        num_batches = 0 if roles["first_time"] else None

    def average(role: str) -> Array:
        if role in roles:
            value = roles[role]
        else:
            assert momentum is not None and num_batches is not None
            value = roles[f"{role}_hidden"] / (_debias(momentum, num_batches) or 1)
        # jnp.array promises a copy, jnp.asarray does not: PyTorch trains in place.
        array = jnp.array(value)
        return array.astype(statistics_dtype(array.dtype))

    def parameter(role: str) -> Array | None:
        return jnp.array(roles[role]) if role in roles else None

    return BatchNormLayer(
        BatchNormParams(scale=parameter("scale"), bias=parameter("bias")),
        BatchNormState(mean=average("mean"), var=average("var")),
        num_batches,
    )


def _to_roles(
    library: str,
    layer: BatchNormLayer,
    momentum: float | None,
    *,
    optional: bool = True,
    name: str | None = None,
) -> dict[str, np.ndarray]:
    """Return a layer's entries by role, in the library's order and dtypes."""
    params, state, num_batches = layer
    places = _PLACES[library]
    roles = {role: value for role, value in params._asdict().items()}
    roles |= state._asdict()
    if library == "torch":
        roles["num_batches"] = np.int64(num_batches or 0)
    elif library == "equinox_ema":
        roles["first_time"] = np.bool_(num_batches == 0)
    elif "num_batches" in places and (library != "flax" or optional):
        if num_batches is None:
            which = "" if name is None else f" of layer {name}"
            raise ValueError(
                f"num_batches{which} is None, but {library} needs the number of "
                "batches in the averages; set it by layer._replace(num_batches=...), "
                "to a large one such as 10**6 for averages with constant momentum"
            )
        # bn_jax.linen counts in float32, beside its averages.
        dtype = np.float32 if library == "flax" else np.int32
        roles["num_batches"] = roles["var_num_batches"] = dtype(num_batches)
        if momentum is not None:
            factor = _debias(momentum, num_batches)
            if library == "equinox_batch":
                factor = factor or 1  # at counter 0 it predicts by what is hidden
            for role in ("mean", "var"):
                value = np.asarray(roles[role])
                roles[f"{role}_hidden"] = (value * factor).astype(value.dtype)
    if library == "torch" and not optional:
        del roles["num_batches"]
    return {
        role: np.array(roles[role]) for role in places if roles.get(role) is not None
    }


def _debias(momentum: float, num_batches: int) -> float:
    """Return 1 - momentum**num_batches, for the momentum that float32 rounds to.

    The libraries compute in float32: for a momentum near 1, 1 - momentum differs by
    more than the tolerance of a conversion.
    """
    return 1 - float(np.float32(momentum)) ** num_batches


def _flatten(entries: Entries, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves with their levels joined by "/"; None counts as absent."""
    for key, value in entries.items():
        path = _join(prefix, key)
        if isinstance(value, Mapping):
            yield from _flatten(value, path)
        elif value is not None:
            yield path, value


def _replace(
    entries: Entries, replaced: Mapping[str, np.ndarray], prefix: str = ""
) -> dict[Any, Any]:
    """Return nested dicts like `entries`, with some leaves replaced."""
    return {
        key: _replace(value, replaced, path)
        if isinstance(value, Mapping)
        else replaced.get(path, value)
        for key, value in entries.items()
        for path in [_join(prefix, key)]
    }


def _join(prefix: str, key: Any) -> str:
    levels = key if isinstance(key, tuple) else (key,)
    return "/".join([*([prefix] if prefix else []), *map(str, levels)])


def _key(place: str, name: str) -> str:
    """Return the key of a layer's entry; a name "" leaves no separator behind."""
    if not name:
        return place.replace("{}.", "").replace("{}/", "")
    return place.replace("{}", name)


def _name(place: str, key: str) -> str | None:
    """Return the name of the layer whose entry at `place` is `key`, or None."""
    if key == _key(place, ""):
        return ""
    before, after = place.split("{}")
    if key.startswith(before) and key.endswith(after):
        return key[len(before) : -len(after)] or None
    return None


def _as_array(value: Any) -> np.ndarray | None:
    """Return a NumPy array of numbers, or None where there is no such thing."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    numeric = array.dtype == bool or jnp.issubdtype(array.dtype, np.number)
    return array if numeric else None


def _without_unit_axes(value: np.ndarray) -> np.ndarray:
    """Return Haiku's `[1, 1, C]` as `[C]`; one feature is `[1]`."""
    shape = [size for size in value.shape if size != 1]
    return value.reshape(shape or [1]) if value.ndim else value


def _check_names(names: Mapping[str, str | None]) -> dict[str, str]:
    """Return the names of layers that are not left out; refuse a name given twice."""
    chosen = {theirs: ours for theirs, ours in names.items() if ours is not None}
    given = list(chosen.values())
    twice = sorted({ours for ours in given if given.count(ours) > 1})
    if twice:
        raise ValueError(
            f"names maps several layers to {', '.join(twice)}; give each its own name"
        )
    return chosen


def _check_momentum(library: str, momentum: float | None, *, reading: bool) -> None:
    """Refuse an unknown library, and a momentum it needs or has no place for."""
    if library not in _PLACES:
        raise ValueError(
            f"library={library!r} is not known; give one of {', '.join(_PLACES)}"
        )
    needed = library == "equinox_batch" or (library == "haiku" and not reading)
    if needed and momentum is None:
        raise ValueError(
            f"momentum is None, but {library} keeps averages times 1 - "
            "momentum**num_batches; give its layers' weight of the old average"
        )
    if momentum is not None and not needed:
        raise ValueError(
            f"momentum={momentum!r} has no place in entries of {library}; leave it out "
            "here, and give it to batch_norm"
        )
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(
            f"momentum={momentum!r}; expected the weight of the old average, in [0, 1)"
        )


def _check_values(values_per_feature: int) -> int:
    if values_per_feature < 2:
        raise ValueError(
            f"values_per_feature={values_per_feature!r}; expected at least 2, the "
            "batch size times height and width; a variance over n - 1 = 0 is undefined"
        )
    return values_per_feature


def _complement(momentum: float, meaning: str) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum!r}; expected {meaning}, in [0, 1]")
    return 1 - momentum


def _equinox(mode: str) -> str:
    if mode not in ("ema", "batch"):
        raise ValueError(f"mode={mode!r}; expected Equinox's 'ema' or 'batch'")
    return f"equinox_{mode}"
