"""Whole networks: the ResNets of PyTorch's torchvision and timm, to Flax and back.

Layers are matched by their places: both networks are trees of modules, and on each
level convolutions go with convolutions, norms with norms, dense layers with dense
layers and modules with modules, one by one in their order. That of the model is the
order of its calls. That of the state dict is the order of its names, numbers in them
taken as numbers, however a file has sorted its entries.

A state dict tells no strides, paddings or poolings. The padding of the model's
convolutions and the epsilon of its norms are compared with PyTorch's. To see whether
the rest is the same, compare the logits of an image: timm has relatives of the ResNet,
such as the anti-aliased ones, with the same entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from bn_jax import tracing
from bn_jax.averages import BatchNormState
from bn_jax.convert.entries import (
    PLACES,
    Problems,
    layer_to_roles,
    note_impossible,
    read_entries,
    roles_to_layer,
    stripping,
)
from bn_jax.convert.layer import DEFAULTS, Entries
from bn_jax.convert.leaves import (
    as_array,
    entry_key,
    flatten,
)
from bn_jax.convert.module_trees import (
    Path,
    Shapes,
    apart,
    kind_of,
    numbers_as_numbers,
    pairs_of,
    root,
)
from bn_jax.functional import BatchNormParams
from bn_jax.variables import check_variables

# Where each kind of layer keeps what, as `entries.PLACES` has it.
_LINEAR = {
    "torch": {"kernel": "{}.weight", "bias": "{}.bias"},
    "flax": {"kernel": "params/{}/kernel", "bias": "params/{}/bias"},
}
_ROLES = {"count": "num_batches"}  # by entry in Flax; others are called as their role
# What wrappers of a PyTorch network call it: DataParallel, torch.compile, Lightning.
_WRAPPERS = ("module", "_orig_mod", "model", "net", "network")
# Axes of PyTorch's kernels [O, I, H, W] and [O, I] in the order of Flax's [H, W, I, O]
# and [I, O], and back.
_AXES = {
    ("flax", "convolution"): (2, 3, 1, 0),
    ("flax", "dense"): (1, 0),
    ("torch", "convolution"): (3, 2, 0, 1),
    ("torch", "dense"): (1, 0),
}


class Row(NamedTuple):
    """An entry of the state dict and where it went."""

    theirs: str  # such as "layer1.0.conv1.weight"
    ours: str  # such as "params/stage1/block1/conv1/kernel"
    shape: tuple[int, ...]  # of ours


class Converted(NamedTuple):
    """The variables of a network that was converted, and what went where."""

    variables: dict[str, Any]  # "params" and "batch_stats"
    rows: list[Row]  # in the order of the model's calls


def network_from_torch(
    model: nn.Module,
    state_dict: Entries,
    *,
    image_shape: tuple[int, int, int] = (224, 224, 3),
    epsilon: float = DEFAULTS["torch"].epsilon,
) -> Converted:
    """Return the variables of a Flax ResNet for the state dict of a PyTorch one.

    Entries `num_batches_tracked` become the `count` of norms that keep one and are left
    out otherwise. Moving variances are taken as they are; the docstring of
    `bn_jax.convert` says how to train on.

    Args:
      model: a Linen module that nests its layers as the state dict does, such as
        `bn_jax.models.MODELS.make("imagenet_resnet:depth=50", norm=BatchNorm,
        num_classes=1000)`, called as `model(images, train=False)`. Its convolutions pad
        each side by half their kernel.
      state_dict: of a ResNet of torchvision or timm, or of another network with the
        same tree of modules. Each name may have the same prefix, such as "module.".
      image_shape: `[H, W, C]`, to trace the model with; nothing is computed.
      epsilon: of the norms in PyTorch.

    Returns:
      The variables, in the dtypes of the state dict (float32 for float64 unless JAX
      computes in 64 bits), averages in float32 at least; and a row for each of them.

    Raises:
      TypeError: if `model` is no Linen module, or `state_dict` no mapping.
      ValueError: if layers or entries are missing, extra, misshapen or no arrays of
        numbers, a norm's are impossible, as NaN or a negative variance is, or a layer
        computes something else than PyTorch's; all are named.

    Examples:
      >>> from flax import linen as nn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, *, train):
      ...         x = nn.Conv(2, (3, 3), padding=1, use_bias=False, name="conv")(x)
      ...         x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
      ...         return nn.Dense(4, name="head")(x.mean((1, 2)))
      >>> state_dict = {
      ...     "conv1.weight": np.ones([2, 3, 3, 3]), "bn1.weight": np.ones(2),
      ...     "bn1.bias": np.zeros(2), "bn1.running_mean": np.zeros(2),
      ...     "bn1.running_var": np.ones(2), "fc.weight": np.ones([4, 2]),
      ...     "fc.bias": np.zeros(4)}
      >>> variables, rows = network_from_torch(Net(), state_dict)
      >>> rows[0]
      Row(theirs='conv1.weight', ours='params/conv/kernel', shape=(3, 3, 3, 2))
      >>> Net().apply(variables, np.zeros((1, 8, 8, 3)), train=False).tolist()
      [[0.0, 0.0, 0.0, 0.0]]
    """
    flat = _flat_state_dict(state_dict)
    problems = _Problems()
    matches = _matches(_traced(model, image_shape), flat, epsilon, problems)
    read = _read("torch", flat, matches, problems)
    problems.refuse_network(f"the state dict does not fit {type(model).__name__}")

    variables: dict[Path, Any] = {("params",): {}, ("batch_stats",): {}}
    rows: list[Row] = []
    for match, roles in zip(matches, read, strict=True):
        theirs = _keys("torch", match.theirs, match.layer.kind)
        ours = _keys("flax", match.ours, match.layer.kind)
        for role, value in _written("flax", roles, match.layer).items():
            variables[tuple(ours[role].split("/"))] = jnp.array(value)
            rows.append(Row(theirs[role], ours[role], value.shape))
    return Converted(traverse_util.unflatten_dict(variables), rows)


def network_to_torch(
    model: nn.Module,
    variables: Entries,
    *,
    like: Entries,
    image_shape: tuple[int, int, int] = (224, 224, 3),
    epsilon: float = DEFAULTS["torch"].epsilon,
) -> dict[str, np.ndarray]:
    """Return the state dict of a PyTorch ResNet for the variables of a Flax one.

    Load it by `network.load_state_dict({k: torch.as_tensor(v) for k, v in
    ...items()})`.

    Args:
      model: see `network_from_torch`.
      variables: of the model, with `params` and `batch_stats`.
      like: a state dict of the PyTorch network, for names and shapes; that of its
        initial state will do. Its `num_batches_tracked` are kept where the model's
        norms count no batches.
      image_shape: see `network_from_torch`.
      epsilon: see `network_from_torch`.

    Returns:
      NumPy arrays by the names of `like` and in its order, in the dtypes of the
      variables.

    Raises:
      TypeError: if `model` is no Linen module, `like` no mapping, or `variables` a
        TrainState.
      ValueError: if `like` or the variables do not fit the model, as
        `network_from_torch` says; all that does not fit is named.

    Examples:
      >>> from flax import linen as nn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, *, train):
      ...         return nn.Dense(2, name="head")(x.mean((1, 2)))
      >>> variables = {"params": {"head": {"kernel": np.ones([3, 2]),
      ...                                  "bias": np.arange(2.0)}}}
      >>> like = {"fc.weight": np.zeros([2, 3]), "fc.bias": np.zeros(2)}
      >>> state_dict = network_to_torch(Net(), variables, like=like)
      >>> state_dict["fc.weight"].shape, state_dict["fc.bias"].tolist()
      ((2, 3), [0.0, 1.0])
    """
    check_variables(variables)
    flat, given = _flat_state_dict(like), dict(flatten(variables))
    problems = _Problems()
    matches = _matches(_traced(model, image_shape), flat, epsilon, problems)
    for match in matches:  # whatever its values are
        _read_layer("torch", flat, match.theirs, match.layer, problems)
    problems.refuse_network(f"like does not fit {type(model).__name__}")
    read = _read("flax", given, matches, problems)
    ours = {k for m in matches for k in _keys("flax", m.ours, m.layer.kind).values()}
    problems.extra += sorted(given.keys() - ours - set(problems.extra))
    problems.refuse_network(f"the variables do not fit {type(model).__name__}")

    entries = {key: np.array(as_array(value)) for key, value in flat.items()}
    for match, roles in zip(matches, read, strict=True):
        theirs = _keys("torch", match.theirs, match.layer.kind)
        written = _written("torch", roles, match.layer)
        entries |= {theirs[role]: value for role, value in written.items()}
    return {key: entries[key] for key in flat}  # files of old have no counters


class _Layer(NamedTuple):
    """A layer of the model."""

    kind: str  # convolution, dense, norm, or other
    shapes: Shapes  # by role
    module: nn.Module | None  # None where no call of it was seen


class _Match(NamedTuple):
    """A layer of the model, and its names."""

    theirs: str
    ours: str
    layer: _Layer


_MENDS = {
    "missing": "the model has them",
    "extra": "the model has no place for them",
    "misshapen": "make the model of the same depth, width and num_classes, and give "
    "the image_shape of images of other channels",
    "unreadable": "give arrays of numbers; of a tensor, tensor.detach().float().cpu()",
    "impossible": "expected finite numbers, and variances of 0 or more",
    "unlike": "PyTorch's computes something else; make the layer as expected, or give "
    "the epsilon of PyTorch's norms",
}


class _Problems(Problems):
    """What does not fit, of a whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.unlike: list[str] = []  # layers that compute something else

    def refuse_network(self, what: str) -> None:
        """Refuse a network's entries, as `refuse` does, if they have problems."""
        expected = "layers of the same kinds and shapes, in the same order in the same "
        self.refuse(what, f"{expected}modules", _MENDS)


def _flat_state_dict(entries: Any) -> dict[str, Any]:
    if not isinstance(entries, Mapping):
        raise TypeError(
            f"got a {type(entries).__name__} for a state dict; expected a mapping of "
            "names to arrays: give model.state_dict()"
        )
    return dict(flatten(entries))


def _traced(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[Path, _Layer]:
    """Return the layers of a model by path, in the order in which they are called."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"got a {type(model).__name__} for a model; expected a Linen module, such "
            "as bn_jax.models.imagenet_resnet.ImageNetResNet(norm=BatchNorm)"
        )
    modules: dict[Path, nn.Module] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        modules.setdefault(context.module.path, context.module)
        return next_fun(*args, **kwargs)

    def init(images: Any) -> Any:
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), images, train=False)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.result_type(float))
    traced = tracing.trace_shapes(init, images)
    variables = traverse_util.flatten_dict(traced)
    shapes: dict[Path, Shapes] = {path: {} for path in modules}
    for (_, *names, entry), leaf in variables.items():
        shapes.setdefault(tuple(names), {})[_ROLES.get(entry, entry)] = leaf.shape
    shapes = apart({path: roles for path, roles in shapes.items() if roles})
    return {
        path: _Layer(kind_of(roles), roles, modules.get(path))
        for path, roles in shapes.items()
    }


def _matches(
    network: Mapping[Path, _Layer],
    flat: Mapping[str, Any],
    epsilon: float,
    problems: _Problems,
) -> list[_Match]:
    """Match the layers, in the model's order; note what does not fit."""
    entries: dict[Path, Shapes] = {}
    for key, value in flat.items():
        *names, entry = key.split(".")
        shape = getattr(value, "shape", None)
        shape = np.shape(value) if shape is None else tuple(shape)
        entries.setdefault(tuple(names), {})[entry] = shape
    entries = apart(entries)
    theirs = {
        path: kind_of(entries[path]) for path in sorted(entries, key=numbers_as_numbers)
    }
    ours = {path: layer.kind for path, layer in network.items()}
    pairs = dict(pairs_of(theirs, ours, root(theirs), root(ours), problems))
    for path in pairs.values():
        if theirs[path] != "norm":  # of norms `read_entries` names them
            unknown = [name for name in entries[path] if name not in ("weight", "bias")]
            problems.extra += [".".join((*path, entry)) for entry in unknown]
    matches = [
        _Match(".".join(pairs[path]), "/".join(path), layer)
        for path, layer in network.items()
        if path in pairs
    ]
    problems.unlike += _unlike(network, epsilon)
    if (problems.missing or problems.extra) and (prefix := _wrapper(flat)):
        problems.hint = stripping(prefix, flat)
    return matches


def _wrapper(flat: Mapping[str, Any]) -> str:
    """Return the prefix that a wrapper has given to most names, but not to all."""
    prefix, names = "", list(flat)
    folders = Counter(name.rpartition("/")[0] for name in names)
    folder = max(folders, key=lambda name: folders[name], default="")
    if folder and 2 * folders[folder] > len(names):  # of a checkpoint with more in it
        prefix = f"{folder}/"
        names = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    while True:
        first = Counter(name.partition(".")[0] for name in names)
        known = [w for w in _WRAPPERS if 2 * first[w] > len(names)]
        if not known:
            return prefix if len(names) < len(flat) else ""
        prefix += f"{known[0]}."
        start = f"{known[0]}."
        names = [name.removeprefix(start) for name in names if name.startswith(start)]


def _unlike(network: Mapping[Path, _Layer], epsilon: float) -> Iterator[str]:
    """Describe the layers that compute something else than PyTorch's."""
    features, before = None, ""
    for path, (kind, shapes, module) in network.items():
        name = "/".join(path)
        own = getattr(module, "epsilon", epsilon)
        if kind == "norm" and own != epsilon:
            yield f"{name} has epsilon {own}, expected {epsilon}"
        if kind == "convolution" and (fault := _fault_of_padding(module, shapes)):
            yield f"{name} {fault}"
        if kind == "dense" and features not in (None, shapes["kernel"][0]):
            yield (
                f"{name} takes {shapes['kernel'][0]} values, expected the {features} "
                f"features of {before}: PyTorch flattens an image in another order"
            )
        if "kernel" in shapes:
            features, before = shapes["kernel"][-1], name


def _fault_of_padding(module: nn.Module | None, shapes: Shapes) -> str | None:
    """Describe a padding other than half the kernel on each side, or return None."""
    padding = getattr(module, "padding", None)
    if padding is None:
        return None  # a module of the user's own, which does not tell
    size = shapes["kernel"][:2]
    strides = getattr(module, "strides", None) or 1
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    pads = _pads(padding, size, strides)
    expected = tuple(((k - 1) // 2, (k - 1) // 2) for k in size)
    if pads == expected:
        return None
    given = f"{padding} with stride {strides}: " if padding == "SAME" else ""
    return f"has padding {given}{pads}, expected {expected}"


def _pads(padding: Any, size: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return pixels of 0 before and after each axis, or the name of other padding."""
    if padding == "VALID":
        return ((0, 0), (0, 0))
    if padding == "SAME":  # of images whose sides are multiples of the stride
        sums = [max(k - s, 0) for k, s in zip(size, strides, strict=True)]
        return tuple((pixels // 2, pixels - pixels // 2) for pixels in sums)
    if isinstance(padding, str):
        return padding
    pads = (padding, padding) if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in pads)


def _read(
    library: str, flat: Mapping[str, Any], matches: list[_Match], problems: Problems
) -> list[dict[str, np.ndarray]]:
    """Return the entries of all layers, each layer's by role."""
    read = []
    for theirs, ours, layer in matches:
        name = theirs if library == "torch" else ours
        roles = _read_layer(library, flat, name, layer, problems)
        places = PLACES[library] if layer.kind == "norm" else _LINEAR[library]
        note_impossible(places, roles, name, problems)
        if "num_batches" in layer.shapes and "num_batches" not in roles:
            problems.missing.append(_keys(library, name, "norm")["num_batches"])
        read.append(roles)
    return read


def _read_layer(
    library: str,
    flat: Mapping[str, Any],
    name: str,
    layer: _Layer,
    problems: Problems,
) -> dict[str, np.ndarray]:
    """Return a layer's entries by role, kernels in Flax's axes; note what misfits."""
    keys, shapes = _keys(library, name, layer.kind), layer.shapes
    problems.missing += [f"{name}: {role}" for role in shapes if role not in keys]
    if layer.kind == "norm":
        there: dict[str, Any] = {role: np.empty(shapes[role]) for role in shapes}
        params = BatchNormParams(there.get("scale"), there.get("bias"))
        like = params, BatchNormState(there["mean"], there["var"])
        return read_entries(library, flat, name, like, problems)
    roles: dict[str, np.ndarray] = {}
    for role, key in keys.items():
        if (role in shapes) != (key in flat):
            (problems.missing if role in shapes else problems.extra).append(key)
        elif key in flat:
            value = as_array(flat[key])
            if value is None:
                problems.unreadable.append(f"{key} is a {type(flat[key]).__name__}")
                continue
            if not jnp.issubdtype(value.dtype, jnp.inexact):
                value = value.astype(jnp.float32)
            expected = shapes[role]
            if library == "torch" and role == "kernel":
                axes = _AXES["torch", layer.kind]
                expected = tuple(expected[axis] for axis in axes)
            if value.shape != expected:
                problems.misshapen.append(
                    f"{key} has shape {list(value.shape)}, expected {list(expected)}"
                )
            elif library == "torch" and role == "kernel":
                value = value.transpose(_AXES["flax", layer.kind])
            roles[role] = value
    return roles


def _written(
    library: str, roles: Mapping[str, np.ndarray], layer: _Layer
) -> dict[str, np.ndarray]:
    """Return the entries of a layer that fit, in a library's axes, by role."""
    if layer.kind == "norm":
        counts = "num_batches" in layer.shapes
        norm = roles_to_layer(roles, None)
        return layer_to_roles(library, norm, None, optional=counts)
    if library == "flax":
        return dict(roles)
    kernel = roles["kernel"].transpose(_AXES["torch", layer.kind])
    return {**roles, "kernel": np.array(kernel, order="C")}


def _keys(library: str, name: str, kind: str) -> dict[str, str]:
    """Return the keys of a layer's entries by role."""
    places = PLACES[library] if kind == "norm" else _LINEAR[library]
    return {role: entry_key(place, name) for role, place in places.items()}
