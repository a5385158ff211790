"""Parity with PyTorch itself."""

import doctest
import functools
from pathlib import Path

import chex
import numpy as np
import pytest

from bn_jax import convert, cumulative_momentum, models
from bn_jax.linen import BatchNorm
from convert_trainer import LEARNING_RATE, C, Ours, batches, check_parity, start
from marks import slow_but

torch = pytest.importorskip("torch", reason="needs the extra `peers`")

channels_first = functools.partial(np.moveaxis, source=-1, destination=1)
KINDS = {
    "BatchNorm1d": (16, C),
    "BatchNorm1d over length": (8, 3, C),
    "BatchNorm2d": (4, 3, 2, C),
    "BatchNorm3d": (2, 3, 2, 2, C),
}


class Peer:
    def __init__(self, kind, **options):
        self.bn = getattr(torch.nn, kind.split()[0])(C, **options)

    def load(self, layer):
        entries = convert.to_torch(layer)
        self.bn.load_state_dict({k: torch.as_tensor(v) for k, v in entries.items()})

    def layer(self):
        return convert.from_torch(self.bn.state_dict())

    def predict(self, x):
        with torch.no_grad():
            return self.bn.eval()(torch.tensor(x)).numpy()

    def step(self, batch):
        y = self.bn.train()(torch.tensor(batch.x))
        self.bn.zero_grad()
        ((y - torch.tensor(batch.target)) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in self.bn.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        return y.detach().numpy()


@pytest.mark.parametrize("kind", slow_but(["BatchNorm1d", "BatchNorm2d"], KINDS))
def test_predictions_steps_and_state_agree(kind, direction):
    peer = Peer(kind)
    layer = start(peer, direction, KINDS[kind], transpose=channels_first)
    momentum = convert.momentum_from_torch(0.1)
    ours = Ours(layer, lambda t: momentum, average="unbiased", feature_axis=1)
    check_parity(peer, ours, KINDS[kind], transpose=channels_first)


def test_momentum_none_is_the_cumulative_average(direction):
    peer = Peer("BatchNorm2d", momentum=None)
    shape = KINDS["BatchNorm2d"]
    layer = start(peer, direction, shape, transpose=channels_first)
    momentum_at = functools.partial(convert.momentum_from_torch, None)
    ours = Ours(layer, momentum_at, average="unbiased", feature_axis=1)
    check_parity(peer, ours, shape, transpose=channels_first)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_commutes_with_the_biased_average(momentum, direction):
    """5 steps there equal: to the biased average, 5 plain steps here, and back."""
    shape = KINDS["BatchNorm2d"]
    n = 4 * 3 * 2
    peer = Peer("BatchNorm2d", momentum=momentum)
    layer = start(peer, direction, shape, transpose=channels_first)
    state = convert.biased_average(layer.state, values_per_feature=n)

    def momentum_at(t):
        return cumulative_momentum(t) if momentum is None else 1 - momentum

    ours = Ours(layer._replace(state=state), momentum_at, feature_axis=1)
    for batch in batches(shape, 5):
        batch = batch._make(map(channels_first, batch))
        peer.step(batch)
        ours.step(batch)
    back = convert.unbiased_average(ours.layer.state, values_per_feature=n)
    theirs = peer.layer()
    chex.assert_trees_all_close(theirs.state, back, rtol=1e-5, atol=1e-5)
    assert np.abs(theirs.state.var - ours.layer.state.var).min() > 1e-3


def test_a_converted_layer_shares_no_memory_with_torch():
    peer = Peer("BatchNorm1d")
    layer = peer.layer()
    for batch in batches((16, C), 2):
        peer.step(batch)
    assert layer.params.scale.tolist() == [1] * C
    assert layer.state.mean.tolist() == [0] * C


def test_a_whole_model_goes_there_and_back():
    def model():
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
        )

    trained, fresh = model(), model()
    trained(torch.randn(4, 1, 5, 5))
    names = {"1": "first", "2": "second"}
    layers = convert.layers_from("torch", trained.state_dict(), names)
    entries = convert.layers_into("torch", fresh.state_dict(), layers, names)
    kept = fresh.state_dict()["0.weight"].clone()
    fresh.load_state_dict({k: torch.as_tensor(v) for k, v in entries.items()})
    for there, back in zip(trained[1:], fresh[1:], strict=True):
        for name, value in there.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name
    assert torch.equal(fresh[0].weight, kept)


def test_the_defaults_are_torchs():
    bn = torch.nn.BatchNorm1d(C)
    momentum, epsilon = convert.DEFAULTS["torch"]
    assert (convert.momentum_to_torch(momentum), epsilon) == pytest.approx(
        (bn.momentum, bn.eps)
    )


def test_bfloat16_is_named_as_not_readable():
    entries = {**Peer("BatchNorm1d").bn.bfloat16().state_dict()}
    with pytest.raises(ValueError, match="running_var is a Tensor of torch.bfloat16"):
        convert.from_torch(entries)
    mended = {name: value.detach().float().cpu() for name, value in entries.items()}
    assert convert.from_torch(mended).state.var.tolist() == [1] * C


def test_parameters_that_are_trained_are_named_with_the_mend():
    bn = Peer("BatchNorm1d").bn
    entries = {**dict(bn.named_parameters()), **dict(bn.named_buffers())}
    with pytest.raises(ValueError, match="weight is a Parameter.*requires grad"):
        convert.from_torch(entries)
    mended = {name: value.detach().float().cpu() for name, value in entries.items()}
    assert convert.from_torch(mended).params.scale.tolist() == [1] * C


def chapters_lenet():
    """The chapter's LeNet, after some training steps on noise."""
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5),
        *(nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Conv2d(6, 16, 5),
        *(nn.BatchNorm2d(16), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.BatchNorm1d(120), nn.Sigmoid()),
        *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid(), nn.Linear(84, 10)),
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(torch.rand(16, 1, 28, 28)).square().sum()
        loss.backward()
        optimizer.step()
    return net.eval()


def test_recipe_brings_the_chapters_lenet_over():
    net = chapters_lenet()
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    with torch.no_grad():
        expected = net(torch.tensor(channels_first(images))).numpy()
    recipes = Path(__file__).parents[2].joinpath("RECIPES.md").read_text()
    section = recipes.split("## Bring the chapter's LeNet")[1].split("\n## ")[0]
    known = {"BatchNorm": BatchNorm, "clothes": images, "models": models, "np": np}
    known["state_dict"] = {k: v.numpy() for k, v in net.state_dict().items()}
    # Without the lines that make a state dict and images.
    made_here = ("shapes =", "state_dict", "for name", "clothes")
    for example in doctest.DocTestParser().get_examples(section):
        if not example.source.startswith(made_here):
            exec(example.source, known)
    got = known["lenet"].apply(known["of_lenet"], images, train=False)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
