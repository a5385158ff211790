"""Figures of runs that lack something; warnings of matplotlib are errors here."""

import pytest
from PIL import Image

from bn_jax import plots
from bn_jax.plots.judged import LOOKS

ROW = {"epoch": 1, "loss": 2.0, "train_accuracy": 0.5, "test_accuracy": 0.25}


@pytest.mark.parametrize("exact", [0.5, None])
def test_curves_are_drawn_with_or_without_exact_statistics(exact, tmp_path):
    found = {"test_accuracy_exact": exact, "data_source": "images"}
    title = "lenet, norm batch_norm, rate 1, " * 5
    plots.curves([ROW], found, tmp_path / "curves.png", title=title)
    stars = Image.open(tmp_path / "curves.png").convert("RGB").getcolors(10**6)
    orange = sum(count for count, pixel in stars if pixel == (0xD5, 0x5E, 0x00))
    assert (orange > 20) == (exact is not None)


def test_layers_with_gamma_or_beta_alone_are_drawn(tmp_path):
    layers = {"scale": {"gamma": [1.0, 2.0]}, "centre": {"beta": [0.5]}, "neither": {}}
    plots.gamma_beta(layers, tmp_path / "gamma_beta.png")
    assert (tmp_path / "gamma_beta.png").exists()


@pytest.mark.parametrize("labels", [[""], ["norm=a", "norm=b"]])
def test_members_of_a_sweep_are_drawn_even_if_there_is_one(labels, tmp_path):
    row = {"loss": [2.0, None], "test_accuracy": [0.5, None]}
    longer = {"loss": [2.0, 1.0, 0.5], "test_accuracy": [0.5, 0.6, 0.7]}
    groups = {label: [row, longer][: i + 1] for i, label in enumerate(labels)}
    plots.members_by_epoch(groups, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").exists()


INF = float("inf")
CLAIMS = {
    "supported": plots.Judged("it is below 1", 0.5, 0.25, 0.75, -INF, 1.0, "supported"),
    "refuted": plots.Judged("it is above 0 " * 20, -0.5, -INF, -0.2, 0, INF, "refuted"),
    "undecided": plots.Judged("it is between", 1.0, 1.0, 1.0, 1.0, 2.0, "undecided"),
}


@pytest.mark.parametrize("outcome", CLAIMS)
def test_claim_is_drawn_in_the_colour_of_its_outcome(outcome, tmp_path):
    plots.claims([CLAIMS[outcome]], "note", tmp_path / "claims.png")
    image = Image.open(tmp_path / "claims.png").convert("RGB")
    colours = {pixel: count for count, pixel in image.getcolors(10**6)}
    expected = tuple(bytes.fromhex(LOOKS[outcome][0][1:]))
    assert colours[expected] > 100
    for other in CLAIMS.keys() - {outcome, "undecided"}:
        assert tuple(bytes.fromhex(LOOKS[other][0][1:])) not in colours


def test_claims_are_drawn_one_above_the_other(tmp_path):
    plots.claims([*CLAIMS.values()], "note", tmp_path / "claims.png")
    plots.claims([CLAIMS["supported"]], "note", tmp_path / "claim.png")
    heights = []
    for name in ("claims.png", "claim.png"):
        with Image.open(tmp_path / name) as image:
            heights.append(image.height)
    assert heights[0] > 2 * heights[1]
