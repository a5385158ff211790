"""Figures of runs that lack something; warnings of matplotlib are errors here."""

import pytest
from PIL import Image

from bn_jax import plots

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
