import json

import pytest

from bn_jax.training import members
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import make_model
from experiments import options

DESIGN = options.Design(epochs=3, seeds=3, dataset="sample")
ARMS = options.arms(DESIGN, [])
FAST, TWO_PASSES = options.FAST, options.TWO_PASSES


def row(arm, config):
    """Return a made-up run; each option moves its scores by a known amount."""
    seed, momentum, epsilon = config.seed, config.momentum, config.epsilon
    loss = 0.5 + 0.1 * seed
    loss += {"neither": 0.125, "no_bias": 0.0625}.get(arm, 0.0)
    loss += 0.25 if epsilon == 1e-3 else 0.0
    slow = {0.999: 0.25, 0.99: -0.03125}.get(momentum, 0.0)
    return {
        "arm": arm,
        "config": config.to_dict(),
        "loss": [2.0, 1.0, loss],
        "test_accuracy": [0.1, 0.2, 0.75 - slow],
        "test_accuracy_exact": 0.8125,
        "first_step_losses": [
            2.0 + (2**-14 if arm == "fast_variance" and seed == 1 and i == 19 else 0)
            for i in range(20)
        ],
    }


def made_up():
    # Last seed first: pairs are made by seed, not by place.
    return [row(arm, c) for arm, configs in ARMS.items() for c in reversed(configs)]


def verdict(rows, words):
    (found,) = (v for v in options.verdicts(rows) if words in v.claim)
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_sweep_of_models_that_can_be_made(arm):
    members.check(ARMS[arm])
    make_model(ARMS[arm][0], num_classes=10)
    assert len(set(ARMS[arm])) == len(ARMS[arm])
    assert "/" not in arm and ":" not in arm


def test_arms_but_the_first_differ_from_the_chapters_run_in_their_norm_alone():
    chapter = TrainConfig(dataset="sample", epochs=3)
    assert chapter in ARMS["numbers"]
    for arm, norm in options.NORMS.items():
        first = ARMS[arm][0].to_dict()
        assert first == {**chapter.to_dict(), "norm": norm}


def test_momenta_and_epsilons_of_the_claim_are_all_trained_once():
    pairs = [(c.momentum, c.epsilon) for c in ARMS["numbers"] if c.seed == 0]
    assert sorted(pairs) == sorted(
        [(m, 1e-5) for m in (0, 0.5, 0.9, 0.99, 0.999)]
        + [(0.9, 1e-12), (0.9, 1e-3), (0.99, 1e-3)]
    )


def test_runs_are_found_by_option_and_seed():
    runs = options.by_option(made_up())
    assert len(runs) == len(options.numbers(DESIGN)) + len(options.NORMS)
    assert all(list(by_seed) == [0, 1, 2] for by_seed in runs.values())
    keras = runs["momentum 0.99, epsilon 0.001 (Keras)"][2]["config"]
    assert (keras["momentum"], keras["epsilon"]) == (0.99, 1e-3)


def test_run_that_diverged_counts_as_guessing():
    config = ARMS["numbers"][0]
    lost = row("numbers", config) | {
        "loss": [2.0, None, None],
        "test_accuracy": [0.1, None, None],
        "test_accuracy_exact": None,
    }
    assert options.scores(lost) == pytest.approx(
        {"loss": 2.302585, "average": 0.1, "exact": 0.1}
    )


def test_spread_over_momenta_is_the_largest_in_any_epoch_from_one_seed():
    rows = made_up()
    assert options.spread_over_momenta(rows) == 0  # seeds differ, momenta do not
    (moved,) = (
        r for r in rows if r["config"]["momentum"] == 0.999 and r["config"]["seed"] == 1
    )
    moved["loss"] = [2.0, 1.5, 0.6]
    assert options.spread_over_momenta(rows) == 0.5


def test_first_steps_are_compared_by_seed():
    rows = made_up()
    assert options.difference_in_first_steps(rows, FAST, TWO_PASSES) == 2**-14
    ours = options.title(options.CHAPTER)
    assert options.difference_in_first_steps(rows, ours, TWO_PASSES) == 0
    json.dumps(options.summary(rows))


# Differences of the made-up scores, the same for each seed, and so without spread.
@pytest.mark.parametrize(
    "words, value, outcome",
    [
        ("no part in training", 0.0, "supported"),
        (".999 is too slow", 0.75 - 0.25 - 0.8125, "supported"),
        ("slower average predicts better", 0.03125, "supported"),
        ("Keras's epsilon", 0.25, "refuted"),
        ("fast variance", 2**-14, "supported"),  # 6.1e-5, below 1e-4
        ("without scale and bias", 0.125, "supported"),
    ],
)
def test_verdict_is_on_the_difference_that_it_names(words, value, outcome):
    found = verdict(made_up(), words)
    assert found.interval.value == pytest.approx(value)
    assert found.interval.n == 3
    assert found.verdict == outcome


def test_figures_are_drawn_of_made_up_rows(tmp_path):
    options.draw(made_up(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"options.png", "momentum.png"}
