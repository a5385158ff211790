"""ResNets of PyTorch's torchvision, to ours and back, and what is refused."""

import functools
import importlib.util
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax import models
from bn_jax.convert import networks
from bn_jax.linen import BatchNorm
from marks import slow_but

BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3]}


@functools.cache
def resnet(depth=18, width=2, norm=BatchNorm, num_classes=3):
    """Our model, in the layout that compiles quickly."""
    return models.MODELS.make(
        f"imagenet_resnet:depth={depth},width={width}",
        norm=norm,
        num_classes=num_classes,
        layout="NHWC",
    )


@functools.partial(jax.jit, static_argnums=0)
def predict(model, variables, x):
    return model.apply(variables, x, train=False)


def state_dict(depth=18, width=2, num_classes=3):
    """Entries with torchvision's names, shapes and order, in NumPy arrays."""
    rng = np.random.default_rng(0)
    entries = {}

    def conv_and_norm(conv, norm, c_out, c_in, size):
        entries[f"{conv}.weight"] = rng.normal(size=(c_out, c_in, size, size))
        for name in ("weight", "bias", "running_mean", "running_var"):
            entries[f"{norm}.{name}"] = rng.uniform(0.5, 1.5, c_out)
        entries[f"{norm}.num_batches_tracked"] = np.array(5)

    conv_and_norm("conv1", "bn1", width, 3, 7)
    c_in = width
    for stage, num_blocks in enumerate(BLOCKS[depth]):
        c = width * 2**stage
        convs = [(c, 1), (c, 3), (4 * c, 1)] if depth >= 50 else [(c, 3), (c, 3)]
        for block in range(num_blocks):
            name, block_in = f"layer{stage + 1}.{block}", c_in
            for i, (c_out, size) in enumerate(convs, start=1):
                conv_and_norm(f"{name}.conv{i}", f"{name}.bn{i}", c_out, c_in, size)
                c_in = c_out
            if block == 0 and (stage > 0 or depth >= 50):
                shortcut = f"{name}.downsample"
                conv_and_norm(f"{shortcut}.0", f"{shortcut}.1", c_in, block_in, 1)
    entries["fc.weight"] = rng.normal(size=(num_classes, c_in))
    entries["fc.bias"] = rng.normal(size=num_classes)
    return {
        k: v.astype(np.float32) if v.dtype == np.float64 else v
        for k, v in entries.items()
    }


def refusal(model, entries, **options):
    """The message of the refusal."""
    with pytest.raises(ValueError) as refused:
        networks.network_from_torch(model, entries, **options)
    return str(refused.value)


def named(message):
    """What a message names, by kind."""
    found = {}
    for line in message.splitlines()[1:]:
        mend, _, names = line.rpartition("): ")
        found[mend.split()[0]] = names.split("; ")
    return found


@pytest.fixture(scope="module")
def torchvision():
    """The library; beside a torch for CPUs alone its own operators cannot be had."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs the extra `torchvision`")
    # This tells torch of the operators and fails where they are not; ResNets use none.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    return importlib.import_module("torchvision")


def peer(torchvision, depth):
    """A network of torchvision, none of whose entries is left at its start."""
    import torch

    torch.manual_seed(0)
    network = getattr(torchvision.models, f"resnet{depth}")(num_classes=3).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                module.num_batches_tracked.fill_(3)
    return network


def drawn(model):
    """Variables of a model, drawn without compiling anything."""
    rng = np.random.default_rng(1)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))

    def draw(path, leaf):
        if leaf.ndim > 1:
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape).astype(leaf.dtype)
        low = 0.5 if path[-1].key in ("scale", "var") else -0.5
        return rng.uniform(low, low + 1, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("depth", "dtype", "tolerance"),
    slow_but(
        [(18, "float32", 1e-5)],
        [
            (depth, dtype, tolerance)
            for depth in (18, 50)
            for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-10))
        ],
    ),
)
def test_logits_are_torchvisions(depth, dtype, tolerance, direction, torchvision):
    import torch

    network = peer(torchvision, depth).to(getattr(torch, dtype))
    x = np.random.default_rng(2).normal(size=(2, 64, 64, 3)).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        model = resnet(depth, width=64)
        if direction == "from":
            variables, _ = networks.network_from_torch(model, network.state_dict())
        else:
            variables = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn(model))
            entries = networks.network_to_torch(
                model, variables, like=network.state_dict()
            )
            network.load_state_dict({k: torch.as_tensor(v) for k, v in entries.items()})
        ours = np.asarray(predict(model, variables, x))
    with torch.no_grad():
        theirs = network(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    assert ours.dtype == theirs.dtype == dtype
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("depth", slow_but([18], [18, 34, 50]))
def test_the_entries_of_these_tests_are_torchvisions(depth, torchvision):
    theirs = peer(torchvision, depth).state_dict()
    shapes = {key: tuple(value.shape) for key, value in theirs.items()}
    assert {k: v.shape for k, v in state_dict(depth, width=64).items()} == shapes


@pytest.mark.parametrize("depth", slow_but([18], [18, 50]))
def test_there_and_back_is_the_same_to_the_bit_and_tells_what_went_where(depth):
    entries = state_dict(depth)
    variables, rows = networks.network_from_torch(resnet(depth), entries)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    shapes = {key: leaf.shape for key, leaf in flat.items()}
    assert {row.ours: row.shape for row in rows} == shapes
    counters = {key for key in entries if key.endswith("num_batches_tracked")}
    assert sorted(row.theirs for row in rows) == sorted(entries.keys() - counters)
    ours = {row.theirs: row.ours for row in rows}
    assert ours["layer2.0.conv1.weight"] == "params/stage2/block1/conv1/kernel"
    assert ours["layer2.0.downsample.1.running_var"] == (
        "batch_stats/stage2/block1/shortcut/norm/var"
    )
    like = {key: np.zeros_like(value) for key, value in entries.items()}
    like |= {key: np.int64(7) for key in counters}
    back = networks.network_to_torch(resnet(depth), variables, like=like)
    assert list(back) == list(entries)
    chex.assert_trees_all_equal(back, entries | {key: np.int64(7) for key in counters})


def test_kernels_are_transposed():
    entries = state_dict()
    variables, _ = networks.network_from_torch(resnet(), entries)
    kernel = variables["params"]["stem"]["kernel"]
    assert kernel[6, 2, 1, 0] == entries["conv1.weight"][0, 1, 6, 2]
    assert variables["params"]["head"]["kernel"][4, 2] == entries["fc.weight"][2, 4]


def test_norms_that_count_batches_take_and_give_their_number():
    counting = resnet(norm=functools.partial(BatchNorm, average="cumulative"))
    entries = state_dict()
    variables, rows = networks.network_from_torch(counting, entries)
    assert variables["batch_stats"]["stem_norm"]["count"] == 5
    assert len(rows) == len(entries)
    like = {**entries, "bn1.num_batches_tracked": np.int64(0)}
    back = networks.network_to_torch(counting, variables, like=like)
    assert back["bn1.num_batches_tracked"] == 5
    del entries["bn1.num_batches_tracked"]  # as PyTorch before 0.4.1 wrote it
    assert "bn1.num_batches_tracked" not in networks.network_to_torch(
        counting, variables, like=entries
    )
    assert named(refusal(counting, entries)) == {"missing": ["bn1.num_batches_tracked"]}


def test_names_prefixes_and_order_do_not_matter_but_places_do():
    entries = state_dict(34)  # with blocks up to layer3.5
    expected, _ = networks.network_from_torch(resnet(34), entries)
    renames = {"conv1": "c1", "bn": "norm", "layer": "stage", "fc": "head"}
    renames |= {"downsample": "shortcut"}

    def renamed(key):
        for old, new in renames.items():
            key = key.replace(old, new)
        return f"module.{key}"

    others = {renamed(key): value for key, value in sorted(entries.items())}
    variables, rows = networks.network_from_torch(resnet(34), others)
    chex.assert_trees_all_equal(variables, expected)
    assert rows[0].theirs == "module.c1.weight"
    tenth = {key.replace("layer3.5", "layer3.10"): v for key, v in entries.items()}
    variables, _ = networks.network_from_torch(resnet(34), dict(sorted(tenth.items())))
    chex.assert_trees_all_equal(variables, expected)


def test_variables_share_no_memory_with_the_state_dict():
    entries = state_dict()
    variables, _ = networks.network_from_torch(resnet(), entries)
    kept = jax.tree.map(np.array, variables)
    back = networks.network_to_torch(resnet(), variables, like=entries)
    for value in [*entries.values(), *back.values()]:
        value[...] = 9
    chex.assert_trees_all_equal(variables, kept)


def test_everything_wrong_is_named_at_once():
    entries = state_dict()
    entries["conv1.weight"] = np.zeros((2, 1, 7, 7))
    entries["bn1.running_var"] = np.array([1.0, -2.0])
    entries["bn1.gain"] = np.zeros(2)
    entries["layer1.0.alpha"] = np.zeros(2)
    entries["layer1.0.conv1.bias"] = np.zeros(2)
    entries["layer1.1.conv2.weight_mask"] = np.zeros(2)
    entries["layer3.2.conv1.weight"] = np.zeros((8, 8, 3, 3))
    entries["layer3.0.se.conv.weight"] = np.zeros((8, 8, 1, 1))
    entries["fc.weight"] = np.full((3, 16), "text")
    del entries["layer2.0.bn1.running_mean"]
    del entries["layer4.1.conv2.weight"]
    assert named(refusal(resnet(), entries)) == {
        "missing": ["stage4/block2/conv2", "layer2.0.bn1.running_mean"],
        "extra": [
            "layer1.0.alpha",
            "layer3.0.se",
            "layer3.2",
            "layer1.1.conv2.weight_mask",
            "bn1.gain",
            "layer1.0.conv1.bias",
        ],
        "misshapen": ["conv1.weight has shape [2, 1, 7, 7], expected [2, 3, 7, 7]"],
        "unreadable": ["fc.weight is a ndarray"],
        "impossible": ["bn1.running_var has the value -2.0"],
    }


def test_numbers_that_no_layer_can_have_are_named_wherever_they_are():
    entries = state_dict()
    entries["conv1.weight"] = np.full_like(entries["conv1.weight"], np.nan)
    entries["fc.bias"] = np.full_like(entries["fc.bias"], np.inf)
    found = named(refusal(resnet(), entries))["impossible"]
    assert [text.split(" has ")[0] for text in found] == ["conv1.weight", "fc.bias"]


def test_integers_become_floating_point_numbers():
    entries = state_dict()
    entries["fc.bias"] = np.arange(len(entries["fc.bias"]))
    variables, _ = networks.network_from_torch(resnet(), entries)
    bias = variables["params"]["head"]["bias"]
    assert bias.dtype == np.float32 and bias[1] == 1


def test_a_network_of_another_depth_is_refused_block_by_block():
    message = refusal(resnet(18), state_dict(34))
    assert message.startswith("the state dict does not fit ImageNetResNet; expected")
    extra = [f"layer{s}.{b}" for s, n in enumerate(BLOCKS[34], 1) for b in range(2, n)]
    assert named(message) == {"extra": [f"{name} with its 4 layers" for name in extra]}


def test_a_deep_stem_does_not_shift_the_stages():
    entries = state_dict()
    stem = entries.pop("conv1.weight")
    entries |= {"conv1.0.weight": stem, "conv1.2.weight": stem}
    assert named(refusal(resnet(), entries)) == {
        "missing": ["stem"],
        "extra": ["conv1 with its 2 layers"],
    }


def test_norms_that_are_not_batch_norm_are_refused():
    message = refusal(resnet(norm=nn.LayerNorm), state_dict())
    assert "stem_norm" in named(message)["missing"]
    assert "bn1" in named(message)["extra"]


def test_our_resnet_for_small_images_is_refused_by_its_convolutions():
    model = models.MODELS.make("resnet:depth=8", norm=BatchNorm)
    found = named(refusal(model, state_dict()))
    assert (
        "conv1.weight has shape [2, 3, 7, 7], expected [16, 3, 3, 3]"
        in (found["misshapen"])
    )
    assert "stage1_block1/conv1" in found["missing"]
    assert "layer1.0 with its 4 layers" in found["extra"]


class Net(nn.Module):
    """A convolution, a norm and a head."""

    padding: object = 1
    strides: int = 1
    epsilon: float = 1e-5
    flatten: bool = False

    @nn.compact
    def __call__(self, x, train):
        conv = nn.Conv(
            2, (3, 3), self.strides, padding=self.padding, use_bias=False, name="conv"
        )
        x = nn.BatchNorm(not train, epsilon=self.epsilon, name="norm")(conv(x))
        x = x.reshape(len(x), -1) if self.flatten else x.mean((1, 2))
        return nn.Dense(3, name="head")(x)


def entries_of_net(features=2):
    entries = state_dict()
    kept = {key: value for key, value in entries.items() if key.startswith("bn1.")}
    return {
        "conv1.weight": np.ones((2, 3, 3, 3)),
        **kept,
        "fc.weight": np.ones((3, features)),
        "fc.bias": np.ones(3),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "SAME", "strides": 2}, r"SAME with stride \(2, 2\): \(\(0, 1\), "),
        ({"padding": "VALID"}, r"padding \(\(0, 0\), \(0, 0\)\)"),
        ({"padding": "CIRCULAR"}, "padding CIRCULAR"),
        ({"padding": ((1, 0), (1, 1))}, r"padding \(\(1, 0\), \(1, 1\)\)"),
    ],
)
def test_convolutions_that_pad_otherwise_are_refused(options, message):
    expected = rf"unlike .*conv has .*{message}.*, expected \(\(1, 1\), \(1, 1\)\)"
    with pytest.raises(ValueError, match=expected):
        networks.network_from_torch(Net(**options), entries_of_net())


def test_convolution_that_nn_jit_has_cached_is_looked_at_all_the_same():
    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            conv = nn.jit(nn.Conv)(2, (3, 3), padding="VALID", use_bias=False, name="c")
            x = nn.BatchNorm(not train, name="norm")(conv(x))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    model, image = Jitted(), jnp.zeros((1, 224, 224, 3))
    for _ in range(2):
        jax.eval_shape(
            functools.partial(model.init, train=False), jax.random.key(0), image
        )
    with pytest.raises(ValueError, match=r"unlike .*c has padding \(\(0, 0\), "):
        networks.network_from_torch(model, entries_of_net())


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": (1, 1)},
        {"padding": [(1, 1), (1, 1)], "strides": 2},
    ],
)
def test_convolutions_that_pad_like_pytorchs_are_taken(options):
    variables, _ = networks.network_from_torch(Net(**options), entries_of_net())
    assert variables["params"]["conv"]["kernel"].shape == (3, 3, 3, 2)


def test_norms_of_another_epsilon_are_refused():
    model = Net(epsilon=1e-3)
    message = refusal(model, entries_of_net())
    assert named(message) == {"unlike": ["norm has epsilon 0.001, expected 1e-05"]}
    networks.network_from_torch(model, entries_of_net(), epsilon=1e-3)


def test_images_flattened_in_another_order_are_refused():
    shape = (4, 4, 3)
    message = refusal(Net(flatten=True), entries_of_net(2 * 4 * 4), image_shape=shape)
    assert "head takes 32 values, expected the 2 features of conv" in message


def test_what_is_no_model_or_state_dict_is_refused():
    with pytest.raises(TypeError, match=r"got a list for a state dict.*state_dict\(\)"):
        networks.network_from_torch(resnet(), [1.0])
    with pytest.raises(TypeError, match="got a dict for a model; expected a Linen"):
        networks.network_from_torch({}, state_dict())


def test_variables_that_do_not_fit_are_named():
    variables, _ = networks.network_from_torch(resnet(), state_dict())
    variables["params"]["stem"] = {"weight": np.zeros(3)}
    variables["params"]["head"]["bias"] = np.zeros(5)
    variables["batch_stats"]["stem_norm"]["var"] = np.array([np.nan, 1])
    with pytest.raises(ValueError, match="variables do not fit ImageNet") as refused:
        networks.network_to_torch(resnet(), variables, like=state_dict())
    found = named(str(refused.value))
    (impossible,) = found.pop("impossible")
    assert impossible.startswith("batch_stats/stem_norm/var has 1 of 2")
    assert found == {
        "missing": ["params/stem/kernel"],
        "extra": ["params/stem/weight"],
        "misshapen": ["params/head/bias has shape [5], expected [3]"],
    }
    with pytest.raises(ValueError, match="like does not fit.*\n.*missing.*: stage1/bl"):
        like = {k: v for k, v in state_dict().items() if "layer1.1" not in k}
        networks.network_to_torch(resnet(), variables, like=like)


def test_wrapper_around_most_entries_is_named_with_how_to_strip_it():
    entries = {f"model.module.{key}": value for key, value in state_dict().items()}
    networks.network_from_torch(resnet(), entries)  # all of them have it
    entries["loss.weight"] = np.ones(3, np.float32)
    head = refusal(resnet(), entries).splitlines()[0]
    assert f"names of {len(entries) - 1} of {len(entries)} entries begin with" in head
    assert "'model.module.'" in head
    stripped = eval(
        head[head.index("{") : head.index("}") + 1], {"state_dict": entries}
    )
    assert stripped.keys() == state_dict().keys()


def test_checkpoint_that_holds_a_state_dict_is_told_where_it_is():
    checkpoint = {"state_dict": state_dict(), "epoch": np.int64(3)}
    head = refusal(resnet(), checkpoint).splitlines()[0]
    assert "inside of ['state_dict'], so give entries['state_dict']" in head
    assert "begin with" not in refusal(resnet(34), state_dict())
