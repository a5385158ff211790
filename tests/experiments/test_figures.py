import pytest

from bn_jax import plots
from experiments import estimate, scores
from experiments.figures import accuracy_curves, curves_legend, figure, spreads
from experiments.scores import Runs


@pytest.fixture
def drawn(monkeypatch):
    """What `bn_jax.plots` is asked to draw."""
    calls = []
    for kind in ("estimates", "small_multiples"):
        monkeypatch.setattr(
            plots, kind, lambda panels, **given: calls.append((panels, given))
        )
    return calls


RUNS = Runs.of(
    [
        {
            "arm": arm,
            "config": {"seed": seed, "epochs": 7},
            "loss": [loss],
            "train_accuracy": [0.5],
            "test_accuracy": [0.25],
        }
        for arm, loss in (("a", 1.0), ("b", 2.0))
        for seed in (0, 1)
    ],
    scores.arm_of,
)


def test_figure_has_what_was_trained_and_a_note_from_its_runs(drawn, tmp_path):
    panels = spreads({"loss": scores.loss}, {"A": "a", "C": "c"})
    only_missing = spreads({"none": scores.loss}, {"C": "c"})
    drawing = figure("estimates", panels | only_missing, "{epochs} epochs, n = {n}")
    drawing.draw(RUNS, tmp_path / "a.png")
    ((found, given),) = drawn
    assert found == {"loss": {"A": (1.0, 1.0, 1.0, 2)}}
    assert given == {"note": "7 epochs, n = 2", "path": tmp_path / "a.png"}


def test_figure_of_nothing_is_not_drawn(drawn, tmp_path):
    missing = spreads({"loss": scores.loss}, {"C": "c"})
    figure("estimates", missing, "").draw(RUNS, tmp_path / "a.png")
    figure("estimates", missing, "").draw(Runs(), tmp_path / "a.png")
    figure("estimates", lambda runs: runs["c"], "").draw(RUNS, tmp_path / "a.png")
    assert drawn == []


def test_panels_note_and_options_may_be_functions_of_the_runs(drawn, tmp_path):
    drawing = figure(
        "estimates",
        lambda runs: {"loss": {arm: estimate.mean(scores.loss, arm) for arm in runs}},
        lambda runs: f"{len(runs)} of {{n}}",
        of=lambda arm: arm == "b",
        reference=lambda runs: 3.0,
    )
    drawing.draw(RUNS, tmp_path / "a.png")
    ((found, given),) = drawn
    assert found == {"loss": {"b": (2.0, 2.0, 2.0, 2)}}
    assert (given["note"], given["reference"]) == ("1 of 2", 3.0)


def test_curves_are_those_of_each_run_with_a_legend_for_each_line(drawn, tmp_path):
    panels = {"panel": accuracy_curves({"batch_norm": "a", "none": "c"})}
    legend = curves_legend({"batch_norm": "ours"})
    drawing = figure("small_multiples", panels, "", titles=legend)
    drawing.draw(RUNS, tmp_path / "a.png")
    ((found, given),) = drawn
    assert found == {
        "panel": {"batch_norm": [[0.5]] * 2, "batch_norm test": [[0.25]] * 2}
    }
    assert given["titles"] == {
        "batch_norm": "ours, training",
        "batch_norm test": "ours, test, moving averages",
    }
