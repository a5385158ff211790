import json
import math
from pathlib import Path

import pytest

from experiments import headline

RESULTS = Path(headline.__file__).parent / "results" / "headline"


def row(arm, seed, loss, first_steps):
    scores = dict.fromkeys(headline.SCORES, 0.0)
    return {
        "arm": arm,
        "seed": seed,
        **scores,
        "train_loss": loss,
        "first_step_losses": first_steps,
    }


ROWS = [
    row("batch_norm", 0, 0.25, [2.0] * 20),
    row("batch_norm", 1, 0.75, [2.0] * 20),
    row("flax", 0, 9.0, [2.0] * 19 + [2.5]),
    row("flax", 1, 9.0, [1.75] + [2.0] * 19),
]


def test_summary_is_mean_and_spread_of_one_arm():
    loss = headline.summarize(ROWS, "batch_norm")["train_loss"]
    # The sample variance of .25 and .75 is .125.
    assert loss.pop("sd") == pytest.approx(math.sqrt(0.125))
    assert loss == {"mean": 0.5, "min": 0.25, "max": 0.75, "n": 2}


def test_agreement_is_the_largest_difference_over_seeds():
    assert headline.agreement(ROWS) == {
        "loss_difference_at_step_1": 0.25,
        "loss_difference_at_step_20": 0.5,
    }


def committed():
    lines = (RESULTS / "runs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return rows, json.loads((RESULTS / "results.json").read_text())


def test_committed_summary_is_that_of_the_committed_runs():
    rows, summary = committed()
    for arm in headline.ARMS:
        assert summary["arms"][arm] == headline.summarize(rows, arm)
    assert summary["ours_against_flax"] == headline.agreement(rows)


def test_committed_runs_are_of_the_full_data_from_the_same_seeds():
    rows, summary = committed()
    assert "60,000 + 10,000 images" in summary["data_source"]
    seeds = {arm: [r["seed"] for r in rows if r["arm"] == arm] for arm in headline.ARMS}
    assert all(of_arm == [0, 1, 2] for of_arm in seeds.values())


def test_index_quotes_the_committed_numbers():
    index = (RESULTS.parents[1] / "README.md").read_text()
    _, summary = committed()
    for arm in headline.ARMS:
        scores = summary["arms"][arm]
        for name in ("train_loss", "train_accuracy", "test_accuracy"):
            mean, sd = scores[name]["mean"], scores[name]["sd"]
            assert f"{mean:.3f} ± {sd:.3f}" in index, (arm, name)
