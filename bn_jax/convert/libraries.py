"""Single layers to and from each library: a pair of functions each."""

from __future__ import annotations

from typing import Literal

import numpy as np

from bn_jax.convert.entries import (
    PLACES,
    SCALARS,
    check_momentum,
    layer_to_roles,
    read_layer,
    write_layer,
)
from bn_jax.convert.layer import BatchNormLayer, Entries, Like
from bn_jax.convert.leaves import (
    entry_key,
)


def from_torch(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for the `state_dict()` of a PyTorch BatchNorm1d, 2d or 3d.

    Its averages are taken as they are, and predict as in PyTorch. They hold variances
    over n - 1: the module docstring says how to train on.

    Args:
      entries: weight, bias, running_mean and running_var, of shape `[C]`, and, unless
        from an old version, the scalar num_batches_tracked. Give tensors that NumPy
        cannot read (of bfloat16, on a GPU, with a gradient) as
        `tensor.detach().float().cpu()`.
      like: `(params, state)` as `bn_jax.init` returns, which says the expected shape
        and whether there are scale and bias; by default any one shape, and both.

    Returns:
      Parameters in the entries' dtype, but float32 for integers, and for float64 unless
      JAX computes in 64 bits; averages in float32 or wider. `num_batches` is None where
      the entries count no batches.

    Raises:
      TypeError: if entries are no mapping, or `like` is no such pair.
      ValueError: if entries are missing, extra, misshapen, no arrays of numbers, or
        impossible, as NaN or a negative variance is; all are named.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [0.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> layer.state.var.tolist(), layer.num_batches
      ([4.0], 7)
    """
    return read_layer("torch", entries, like)


def to_torch(layer: BatchNormLayer) -> dict[str, np.ndarray]:
    """Return the state dict of a PyTorch BatchNorm1d, 2d or 3d, in NumPy arrays.

    Load it by `bn.load_state_dict({k: torch.as_tensor(v) for k, v in ...items()})`. The
    moving variance is written as it is; see `unbiased_average`.

    Args:
      layer: to be written. Where `num_batches` is None, num_batches_tracked is 0: only
        PyTorch's momentum None reads it, and would then forget the averages.

    Returns:
      Arrays in the layer's dtypes, and num_batches_tracked in int64; none for a
      parameter that is None. PyTorch reads no bfloat16 of NumPy: convert such
      parameters first, e.g. `v.astype("float32")`.

    Raises:
      TypeError: if `layer` is no BatchNormLayer.
      ValueError: if it has a number that is not finite, a negative variance, or a
        number of batches that is negative or not whole.

    Examples:
      >>> layer = from_flax({
      ...     "params": {"scale": [2.0], "bias": [3.0]},
      ...     "batch_stats": {"mean": [1.0], "var": [4.0]}})
      >>> state_dict = to_torch(layer)
      >>> state_dict["weight"].tolist(), state_dict["running_var"].tolist()
      ([2.0], [4.0])
    """
    return write_layer("torch", layer)


def from_keras(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for a Keras 3 BatchNormalization.

    Args:
      entries: gamma, beta, moving_mean and moving_variance, of shape `[C]`:
        `{w.name: w.numpy() for w in layer.weights}`.
      like: see `from_torch`.

    Raises:
      TypeError: as `from_torch` says.
      ValueError: as `from_torch` says.

    Examples:
      >>> layer = from_keras({
      ...     "gamma": [2.0], "beta": [3.0],
      ...     "moving_mean": [1.0], "moving_variance": [4.0]})
      >>> layer.params.scale.tolist(), layer.state.var.tolist()
      ([2.0], [4.0])
    """
    return read_layer("keras", entries, like)


def to_keras(layer: BatchNormLayer) -> dict[str, np.ndarray]:
    """Return gamma, beta, moving_mean and moving_variance of a Keras 3 layer.

    In this order they are what `set_weights(list(...values()))` takes. Mind Keras's
    epsilon, by default 1e-3.

    Args:
      layer: to be written.

    Raises:
      TypeError: as `to_torch` says.
      ValueError: as `to_torch` says.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [3.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> {name: value.item() for name, value in to_keras(layer).items()}
      {'gamma': 2.0, 'beta': 3.0, 'moving_mean': 1.0, 'moving_variance': 4.0}
    """
    return write_layer("keras", layer)


def from_flax(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for the variables of a Linen BatchNorm, Flax's or bn_jax's.

    Args:
      entries: `{"params": {scale, bias}, "batch_stats": {mean, var}}`, of shape `[C]`,
        with the scalar `count` in the latter where bn_jax.linen.BatchNorm keeps one.
      like: see `from_torch`.

    Raises:
      TypeError: as `from_torch` says.
      ValueError: as `from_torch` says.

    Examples:
      >>> layer = from_flax({
      ...     "params": {"scale": [2.0], "bias": [3.0]},
      ...     "batch_stats": {"mean": [1.0], "var": [4.0]}})
      >>> layer.params.scale.tolist(), layer.state.var.tolist()
      ([2.0], [4.0])
    """
    return read_layer("flax", entries, like)


def to_flax(
    layer: BatchNormLayer, *, count: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Return the variables of a Linen BatchNorm, Flax's or bn_jax's.

    Args:
      layer: to be written.
      count: whether `batch_stats` holds the number of batches, in float32, as for
        bn_jax.linen.BatchNorm with an average "debiased" or "cumulative".

    Raises:
      TypeError: as `to_torch` says.
      ValueError: if a count is wanted and `num_batches` is None, or as `to_torch` says.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [3.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> variables = to_flax(layer)
      >>> {name: value.item() for name, value in variables["params"].items()}
      {'scale': 2.0, 'bias': 3.0}
      >>> {name: value.item() for name, value in variables["batch_stats"].items()}
      {'mean': 1.0, 'var': 4.0}
    """
    return write_layer("flax", layer, optional=count)


def from_nnx(entries: Entries, *, like: Like | None = None) -> BatchNormLayer:
    """Return the layer for the state of a `flax.nnx.BatchNorm`.

    Args:
      entries: scale, bias, mean and var, of shape `[C]`: `nnx.state(layer)`.
      like: see `from_torch`.

    Raises:
      TypeError: as `from_torch` says.
      ValueError: as `from_torch` says.

    Examples:
      >>> layer = from_nnx({"scale": [2.0], "bias": [3.0], "mean": [1.0], "var": [4.0]})
      >>> layer.params.scale.tolist(), layer.state.var.tolist()
      ([2.0], [4.0])
    """
    return read_layer("nnx", entries, like)


def to_nnx(layer: BatchNormLayer) -> dict[str, np.ndarray]:
    """Return the state of a `flax.nnx.BatchNorm`: scale, bias, mean and var.

    Args:
      layer: to be written.

    Raises:
      TypeError: as `to_torch` says.
      ValueError: as `to_torch` says.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [3.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> {name: value.item() for name, value in to_nnx(layer).items()}
      {'scale': 2.0, 'bias': 3.0, 'mean': 1.0, 'var': 4.0}
    """
    return write_layer("nnx", layer)


def from_haiku(
    params: Entries,
    state: Entries,
    name: str = "batch_norm",
    *,
    like: Like | None = None,
) -> BatchNormLayer:
    """Return the layer for an `hk.BatchNorm`; axes of length 1 are dropped.

    Args:
      params: of `hk.transform_with_state`: scale and offset under `name`, of a shape
        such as `[1, 1, 1, C]`.
      state: of the same: counter, hidden and average under `name/~/mean_ema` and
        `name/~/var_ema`. The average is what Haiku predicts by, and what is taken.
      name: of the module; other modules are left alone.
      like: see `from_torch`.

    Raises:
      ValueError: if params or state is not a mapping, the two counters differ, or as
        `from_torch` says.

    Examples:
      >>> kept = {"counter": 7, "hidden": [[0.5]]}
      >>> layer = from_haiku(
      ...     {"batch_norm": {"scale": [[2.0]], "offset": [[3.0]]}},
      ...     {"batch_norm/~/mean_ema": {**kept, "average": [[1.0]]},
      ...      "batch_norm/~/var_ema": {**kept, "average": [[4.0]]}})
      >>> layer.params.bias.tolist(), layer.state.var.tolist(), layer.num_batches
      ([3.0], [4.0], 7)
    """
    entries = {"params": params, "state": state}
    return read_layer("haiku", entries, like, name)


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
      layer: to be written. Averages of a constant momentum know no number of batches;
        give them a large one, as in `layer._replace(num_batches=10**6)`, and Haiku goes
        on with that momentum.
      name: of the module.
      momentum: weight of the OLD average: the module's decay_rate.
      num_dims: number of axes of the module's inputs; Haiku keeps them all.
      feature_axis: of the module's inputs: 1 for its channels_first.

    Returns:
      Arrays of `num_dims` axes in the layer's dtypes, and scalar counters in int32.

    Raises:
      TypeError: as `to_torch` says.
      ValueError: if `num_batches` is None or 2**31 or more, momentum outside [0, 1),
        num_dims no positive integer, the axis out of range, or the layer has several
        feature axes; or as `to_torch` says.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [3.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> params, state = to_haiku(layer, momentum=0.9, num_dims=2)
      >>> params["batch_norm"]["offset"].tolist()
      [[3.0]]
      >>> state["batch_norm/~/var_ema"]["average"].tolist()
      [[4.0]]
    """
    check_momentum("haiku", momentum, reading=False)
    if not isinstance(num_dims, int) or num_dims < 1:
        raise ValueError(
            f"num_dims={num_dims!r}; expected the number of axes of the inputs"
        )
    shape = [1] * num_dims
    if feature_axis not in range(-num_dims, num_dims):
        raise ValueError(
            f"feature_axis={feature_axis!r} is no axis of inputs of "
            f"num_dims={num_dims}; give an integer in [{-num_dims}, {num_dims - 1}]"
        )
    shape[feature_axis] = -1
    roles = layer_to_roles("haiku", layer, momentum)
    if roles["mean"].ndim != 1:
        raise ValueError(
            f"the layer has features of shape {list(roles['mean'].shape)}; expected "
            "one feature axis, [C], as Haiku's layers have"
        )
    trees: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "state": {}}
    for role, value in roles.items():
        collection, rest = entry_key(PLACES["haiku"][role], name).split("/", 1)
        module, entry = rest.rsplit("/", 1)
        value = value if role in SCALARS else value.reshape(shape)
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
        `state.get(layer.batch_state_index)`. first_time and counter are scalars, all
        others of shape `[C]`. An entry None counts as absent.
      mode: of the layer.
      momentum: weight of the OLD average, of the layer; for mode "batch" alone, which
        keeps the average times 1 - momentum**counter.
      like: see `from_torch`.

    Returns:
      As `from_torch`. In mode "ema" `num_batches` is 0 where first_time is true, and
      else None.

    Raises:
      TypeError: as `from_torch` says.
      ValueError: if the mode is unknown, momentum is outside [0, 1), missing in mode
        "batch" or given in mode "ema"; or as `from_torch` says.

    Examples:
      >>> layer = from_equinox({
      ...     "weight": [2.0], "bias": [3.0], "first_time": False,
      ...     "running_mean": [1.0], "running_var": [4.0]}, mode="ema")
      >>> layer.params.scale.tolist(), layer.state.var.tolist()
      ([2.0], [4.0])
    """
    return read_layer(_equinox(mode), entries, like, momentum=momentum)


def to_equinox(
    layer: BatchNormLayer,
    *,
    mode: Literal["ema", "batch"],
    momentum: float | None = None,
) -> dict[str, np.ndarray]:
    """Return the entries of an `equinox.nn.BatchNorm`, as `from_equinox` takes them.

    Give `state.set` the counter as `jax.numpy.array(int(entries["counter"]))`: Equinox
    keeps it weakly typed, which a NumPy array cannot be.

    Args:
      layer: to be written. Mode "batch" needs `num_batches`. Give averages of a
        constant momentum a large one, as `to_haiku` says. With 0, Equinox counts its
        batches anew, from these averages on; in mode "ema" first_time is then true.
      mode: of the layer.
      momentum: weight of the OLD average, of the layer; for mode "batch" alone.

    Raises:
      TypeError: as `to_torch` says.
      ValueError: if the mode is unknown, momentum is outside [0, 1), missing in mode
        "batch" or given in mode "ema"; `num_batches` is None in mode "batch"; or as
        `to_torch` says.

    Examples:
      >>> layer = from_torch({
      ...     "weight": [2.0], "bias": [3.0], "running_mean": [1.0],
      ...     "running_var": [4.0], "num_batches_tracked": 7})
      >>> entries = to_equinox(layer, mode="ema")
      >>> entries["running_var"].tolist(), entries["first_time"].item()
      ([4.0], False)
    """
    return write_layer(_equinox(mode), layer, momentum=momentum)


def _equinox(mode: str) -> str:
    if not isinstance(mode, str) or mode not in ("ema", "batch"):
        raise ValueError(f"mode={mode!r}; expected Equinox's 'ema' or 'batch'")
    return f"equinox_{mode}"
