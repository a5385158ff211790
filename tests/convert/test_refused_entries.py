"""What does not fit is named all at once, with what was expected and the mend."""

import jax
import numpy as np
import pytest

from bn_jax import batch_norm, convert, init
from convert_trainer import LAYER

NAMES = {"bn1": "first", "bn2": "second"}


def state_dict():
    """Return a torch state dict of two layers of 4 features, and a convolution."""
    flat = {"conv.weight": np.zeros([4, 1, 3, 3]), "conv.bias": np.zeros(4)}
    for name in NAMES:
        for entry, value in convert.to_torch(LAYER).items():
            flat[f"{name}.{entry}"] = value
    return flat


def refusal(call, *args, **options):
    """Return the message of the refusal."""
    with pytest.raises(ValueError) as refused:
        call(*args, **options)
    return str(refused.value)


def kinds(message):
    """Return the names under missing, extra and misshapen."""
    found = {}
    for line in message.splitlines()[1:]:
        mend, _, named = line.rpartition("): ")
        found[mend.split()[0]] = named.split("; ")
    return found


def test_layers_of_a_state_dict_come_under_our_names():
    layers = convert.layers_from("torch", state_dict(), NAMES)
    assert list(layers) == ["first", "second"]
    assert layers["second"].num_batches == 3


def test_everything_wrong_is_named_at_once():
    flat = state_dict()
    del flat["bn1.running_var"]
    del flat["bn2.weight"]
    flat["bn1.bias"] = np.zeros(3)
    flat["bn2.num_batches_tracked"] = np.zeros(4)
    flat["bn2.weight_orig"] = np.zeros(4)
    flat["bn3.running_mean"] = flat["bn3.running_var"] = np.zeros(4)
    message = refusal(convert.layers_from, "torch", flat, NAMES)
    assert kinds(message) == {
        "missing": ["bn1.running_var", "bn2.weight"],
        "extra": ["bn2.weight_orig", "bn3.running_mean", "bn3.running_var"],
        "misshapen": [
            "bn1.bias has shape [3], expected [4]",
            "bn2.num_batches_tracked has shape [4], expected []",
        ],
    }
    assert "expected for torch: <layer>.weight" in message


def test_all_entries_of_a_mistyped_layer_are_missing():
    names = {"bn1": "first", "bnn2": "second", "bn2": None}
    message = refusal(convert.layers_from, "torch", state_dict(), names)
    assert kinds(message)["missing"] == [
        "bnn2.bias",
        "bnn2.running_mean",
        "bnn2.running_var",
        "bnn2.weight",
    ]


def test_a_layer_mapped_to_none_is_left_out():
    layers = convert.layers_from("torch", state_dict(), {"bn1": "first", "bn2": None})
    assert list(layers) == ["first"]


def test_a_layer_whose_name_begins_another_is_kept_apart():
    flat = {key.replace("bn2", "bn1.1"): value for key, value in state_dict().items()}
    del flat["bn1.1.running_mean"]
    message = refusal(
        convert.layers_from, "torch", flat, {"bn1": "first", "bn1.1": "second"}
    )
    assert kinds(message) == {"missing": ["bn1.1.running_mean"]}


def test_layers_are_compared_with_what_they_should_be_like():
    like = {"first": init(5), "second": init(4, bias=False), "third": init(1)}
    message = refusal(convert.layers_from, "torch", state_dict(), NAMES, like=like)
    found = kinds(message)
    assert found["missing"] == ["third (in like)"]
    assert found["extra"] == ["bn2.bias"]
    assert found["misshapen"] == [
        f"bn1.{entry} has shape [4], expected [5]"
        for entry in ["bias", "running_mean", "running_var", "weight"]
    ]


def test_a_single_layer_names_all_that_is_wrong():
    entries = convert.to_torch(LAYER)
    del entries["weight"], entries["bias"]
    message = refusal(convert.from_torch, {**entries, "gamma": 1})
    assert kinds(message) == {"missing": ["bias", "weight"], "extra": ["gamma"]}
    assert "scale=False" in message


def test_what_is_no_array_of_numbers_is_named():
    entries = {**convert.to_keras(LAYER), "gamma": "ones", "beta": [[1.0], [1.0, 2.0]]}
    assert kinds(refusal(convert.from_keras, entries)) == {
        "unreadable": ["beta is a list", "gamma is a str"]
    }


class Tensor:
    """A tensor that NumPy cannot read, as PyTorch has them."""

    def __init__(self, dtype="torch.float32", device="cpu", requires_grad=False):
        self.dtype, self.device, self.requires_grad = dtype, device, requires_grad

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert it to numpy")


def test_tensors_that_numpy_cannot_read_are_named_with_the_mend():
    flat = state_dict()
    flat["bn1.weight"] = Tensor(requires_grad=True)
    flat["bn1.bias"] = Tensor("torch.bfloat16")
    flat["bn2.running_mean"] = Tensor(device="cuda:0")
    message = refusal(convert.layers_from, "torch", flat, NAMES)
    assert "of a PyTorch tensor, tensor.detach().float().cpu()" in message
    assert kinds(message) == {
        "unreadable": [
            "bn1.bias is a Tensor of torch.bfloat16 on cpu",
            "bn1.weight is a Tensor of torch.float32 on cpu that requires grad",
            "bn2.running_mean is a Tensor of torch.float32 on cuda:0",
        ]
    }


def test_numbers_that_a_layer_cannot_have_are_named():
    flat = state_dict()
    flat["bn1.running_mean"] = np.array([0, np.nan, np.inf, 1])
    flat["bn1.running_var"] = np.array([1, -0.5, 1, 1])
    flat["bn1.weight"] = np.array([1, 1, 1, 1e300])  # JAX has it in float32
    flat["bn2.running_var"] = np.ones(4, complex)
    flat["bn2.num_batches_tracked"] = np.int64(-1)
    message = refusal(convert.layers_from, "torch", flat, NAMES)
    assert "expected finite numbers, variances of 0 or more" in message
    assert kinds(message) == {
        "impossible": [
            "bn1.running_mean has 2 of 4 values that are not finite in float32",
            "bn1.running_var has the value -0.5",
            "bn1.weight has 1 of 4 values that are not finite in float32",
            "bn2.num_batches_tracked is -1",
            "bn2.running_var has dtype complex64",
        ]
    }


@pytest.mark.parametrize("count", [2.5, -1, np.nan])
@pytest.mark.parametrize("library", ["torch", "flax", "haiku", "equinox_batch"])
def test_counts_that_cannot_be_are_named(library, count):
    momentum = {} if library in ("torch", "flax") else {"momentum": 0.9}
    read = {
        "torch": lambda: convert.from_torch(
            {**convert.to_torch(LAYER), "num_batches_tracked": count}
        ),
        "flax": lambda: convert.from_flax(
            with_counts(convert.to_flax(LAYER, count=True))
        ),
        "haiku": lambda: convert.from_haiku(
            *with_counts(convert.to_haiku(LAYER, num_dims=2, **momentum))
        ),
        "equinox_batch": lambda: convert.from_equinox(
            with_counts(convert.to_equinox(LAYER, mode="batch", **momentum)),
            mode="batch",
            **momentum,
        ),
    }[library]

    def with_counts(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: count if "count" in str(path[-1]) else leaf, tree
        )

    assert "num_batches_tracked" in refusal(read) or "count" in refusal(read)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"var": np.float32([1, -1, 1, 1])}, "the layer: var has the value -1.0"),
        (
            {"mean": np.float32([0, np.nan, 0, 0])},
            "mean has 1 of 4 values that are",
        ),
        ({"num_batches": -2}, "num_batches is -2; expected finite numbers, variances"),
    ],
)
def test_a_layer_that_cannot_be_is_not_written(changed, words):
    num_batches = changed.pop("num_batches", 3)
    layer = LAYER._replace(
        state=LAYER.state._replace(**changed), num_batches=num_batches
    )
    for write in (convert.to_torch, convert.to_keras, convert.to_nnx):
        assert words in refusal(write, layer)
    flat, named = state_dict(), {"first": layer, "second": LAYER}
    words = words.replace("the layer", "layer first")
    assert words in refusal(convert.layers_into, "torch", flat, named, NAMES)


def test_counters_of_haiku_that_differ_are_named():
    params, state = convert.to_haiku(LAYER, momentum=0.9, num_dims=2)
    state["batch_norm/~/var_ema"]["counter"] = np.int32(4)
    (named,) = kinds(refusal(convert.from_haiku, params, state))["misshapen"]
    assert "mean_ema/counter is 3" in named
    assert "var_ema/counter is 4" in named


def test_unmapped_layers_of_haiku_are_named():
    params, state = convert.to_haiku(LAYER, "net/~/bn", momentum=0.9, num_dims=2)
    entries = {"params": params, "state": state}
    found = kinds(refusal(convert.layers_from, "haiku", entries, {}))
    assert len(found["extra"]) == 8
    layers = convert.layers_from("haiku", entries, {"net/~/bn": "bn"})
    assert layers["bn"].num_batches == 3


def test_unmapped_layers_of_flax_are_named():
    one = convert.to_flax(LAYER)
    entries = {kind: {"block": {"bn": one[kind]}} for kind in one}
    found = kinds(refusal(convert.layers_from, "flax", entries, {}))
    assert found["extra"] == [
        "batch_stats/block/bn/mean",
        "batch_stats/block/bn/var",
        "params/block/bn/bias",
        "params/block/bn/scale",
    ]


def test_filling_names_what_model_and_layers_do_not_share():
    flat = state_dict()
    flat["bn1.running_mean"] = np.zeros(3)
    flat["bn3.running_mean"] = np.zeros(4)
    bare = LAYER._replace(params=LAYER.params._replace(bias=None))
    message = refusal(
        convert.layers_into,
        "torch",
        flat,
        {"first": bare, "third": LAYER},
        NAMES,
    )
    assert kinds(message) == {
        "missing": ["second (in layers)"],
        "extra": ["bn1.bias", "bn3.running_mean", "third (in layers)"],
        "misshapen": ["bn1.running_mean has shape [3], expected [4]"],
    }


def test_filling_leaves_the_given_state_as_it_was():
    flat = state_dict()
    flat["bn1.running_mean"] = np.full(4, 9.0)
    layers = {"first": LAYER, "second": LAYER}
    new = convert.layers_into("torch", flat, layers, NAMES)
    assert flat["bn1.running_mean"].tolist() == [9] * 4
    np.testing.assert_array_equal(new["bn1.running_mean"], LAYER.state.mean)
    assert new["conv.weight"] is flat["conv.weight"]


def test_two_layers_under_one_name_are_refused():
    names = {"bn1": "bn", "bn2": "bn"}
    message = refusal(convert.layers_from, "torch", state_dict(), names)
    assert "several layers to bn" in message


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: convert.layers_from("jax", {}, {}), "library='jax'"),
        (lambda: convert.from_equinox({}, mode="old"), "mode='old'"),
        (lambda: convert.from_equinox({}, mode="batch"), "momentum is None"),
        (lambda: convert.from_equinox({}, mode="ema", momentum=0.9), "no place"),
        (lambda: convert.layers_into("torch", {}, {}, {}, momentum=0.1), "no place"),
        (
            lambda: convert.to_haiku(LAYER, momentum=1.0, num_dims=2),
            r"momentum=1.0; expected .* in \[0, 1\)",
        ),
        (
            lambda: convert.to_haiku(
                LAYER._replace(num_batches=None), momentum=0.9, num_dims=2
            ),
            "num_batches is None.*_replace",
        ),
        (
            lambda: convert.to_haiku(LAYER, momentum=0.9, num_dims=2, feature_axis=2),
            "feature_axis=2.*num_dims=2",
        ),
        (
            lambda: convert.to_flax(LAYER._replace(num_batches=None), count=True),
            "num_batches is None",
        ),
        (
            lambda: convert.without_equinox_excess(
                LAYER._replace(num_batches=None), momentum=0.9
            ),
            "num_batches is None",
        ),
        (lambda: convert.momentum_from_torch(None), "num_batches_tracked"),
        (lambda: convert.momentum_from_torch(1.5), r"1.5.*new value, in \[0, 1\]"),
        (lambda: convert.momentum_to_torch(-1), r"-1.*old average, in \[0, 1\]"),
        (
            lambda: convert.biased_average(LAYER.state, values_per_feature=1),
            "values_per_feature=1; expected at least 2",
        ),
        (
            lambda: convert.unbiased_average(LAYER.state, values_per_feature=np.nan),
            "values_per_feature=nan; expected at least 2",
        ),
        (lambda: convert.momentum_from_torch(np.float32(2)), r"2.0.*in \[0, 1\]"),
        (lambda: convert.momentum_from_torch(None, -1), "num_batches=-1; expected"),
        (
            lambda: convert.without_equinox_excess(LAYER, momentum=1.0),
            r"momentum=1.0; expected a number in \[0, 1\)",
        ),
        (
            lambda: convert.without_equinox_excess(LAYER, momentum=0.9),
            "least variance would be -2.19 .* momentum=0.9 and 3 batches",
        ),
    ],
)
def test_an_argument_out_of_place_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "encoder."])
def test_prefix_of_all_names_is_named_with_how_to_strip_it(prefix):
    flat = {prefix + name: value for name, value in state_dict().items()}
    from_torch = refusal(convert.layers_from, "torch", flat, NAMES)
    layers = convert.layers_from("torch", state_dict(), NAMES)
    into_torch = refusal(convert.layers_into, "torch", flat, layers, NAMES)
    for message in (from_torch, into_torch):
        head = message.splitlines()[0]
        assert f"names of 12 of 12 entries begin with {prefix!r}" in head
        stripping = head[head.index("{") : head.index("}") + 1]
        stripped = eval(stripping, {"state_dict": flat})
        assert list(convert.layers_from("torch", stripped, NAMES)) == [*NAMES.values()]


def test_prefix_of_some_names_is_named_with_how_to_leave_out_the_others():
    flat = {f"model.{name}": value for name, value in state_dict().items()}
    flat["loss.weight"] = np.ones(3)
    head = refusal(convert.layers_from, "torch", flat, NAMES).splitlines()[0]
    assert "names of 12 of 13 entries begin with 'model.'" in head
    stripped = eval(head[head.index("{") : head.index("}") + 1], {"state_dict": flat})
    assert sorted(stripped) == sorted(state_dict())


def test_checkpoint_that_holds_the_state_dict_is_told_where_it_is():
    checkpoint = {"epoch": 3, "state_dict": state_dict()}
    message = refusal(convert.layers_from, "torch", checkpoint, NAMES)
    assert "inside of ['state_dict'], so give entries['state_dict']" in message
    checkpoint["state_dict"] = {f"net.{k}": v for k, v in state_dict().items()}
    message = refusal(convert.layers_from, "torch", checkpoint, NAMES)
    assert "entries['state_dict'], with 'net.' stripped" in message


def test_layer_of_a_model_is_not_taken_for_the_only_one():
    of_one = {f"bn.{k}": v for k, v in convert.to_torch(LAYER).items()}
    assert "begin with 'bn.'" in refusal(convert.from_torch, of_one)
    assert "several layers, bn1., bn2. (take one" in refusal(
        convert.from_torch, state_dict()
    )


def test_other_faults_are_not_laid_to_a_prefix():
    flat = state_dict()
    del flat["bn1.weight"]
    assert "begin with" not in refusal(convert.layers_from, "torch", flat, NAMES)


def test_names_from_ours_to_theirs_are_said_to_be_turned_round():
    layers = convert.layers_from("torch", state_dict(), NAMES)
    turned = {ours: theirs for theirs, ours in NAMES.items()}
    of_layers = {theirs: layers[ours] for theirs, ours in NAMES.items()}
    for message in (
        refusal(convert.layers_from, "torch", state_dict(), turned),
        refusal(convert.layers_into, "torch", state_dict(), of_layers, turned),
    ):
        theirs, ours = next(iter(NAMES.items()))
        head = message.splitlines()[0]
        assert f"names look turned round, as {theirs!r} is a layer" in head
        assert f"{{{theirs!r}: {ours!r}}}" in head
    assert "turned round" not in refusal(
        convert.layers_from, "torch", state_dict(), {"bn7": "norm"}
    )


def test_layers_of_torch_without_averages_are_told_as_such():
    kept = {"weight": np.full(3, 2.0), "bias": np.ones(3)}
    message = refusal(convert.from_torch, kept)
    assert "the layer may have track_running_stats=False" in message.splitlines()[0]
    flat = {f"bn3.{name}": value for name, value in kept.items()}
    message = refusal(
        convert.layers_from,
        "torch",
        {**state_dict(), **flat},
        {**NAMES, "bn3": "third"},
    )
    assert "fit: bn3 may have track_running_stats=False, and no" in message
    # What the message advises predicts as PyTorch's layer does.
    advised = {**kept, "running_mean": np.zeros(3), "running_var": np.ones(3)}
    layer = convert.from_torch(advised)
    x = np.arange(12.0, dtype=np.float32).reshape(4, 3) ** 1.5
    y, _ = batch_norm(x, layer.params, layer.state, train=True)
    wanted = 2 * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + 1
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
