import jax
import numpy as np
import pytest

from bn_jax.runs import checkpoint, results
from bn_jax.training import members
from bn_jax.training.state import init_variables, make_model
from experiments import frozen

DESIGN = frozen.Design(epochs=4, seeds=3, dataset="sample")
ARMS = frozen.arms(DESIGN, [])
# By what learns: the loss above that of all, and the accuracy.
MADE_UP = {
    "all": (0.0, 0.875),
    "all but beta": (0.25, 0.875),
    "all but gamma": (0.125, 0.875),
    "all but both": (-0.5, 0.875),
    "gamma, beta and the last layer": (1.0, 0.75),
    "gamma and beta alone": (1.5, 0.625),
    "as many others, at random": (1.5, 0.5),
}


def row(arm, config):
    choice = frozen.TITLES[config.trained, config.train_gamma, config.train_beta]
    above, accuracy = MADE_UP[choice]
    if config.activation == "relu":
        above, accuracy = -above, 1 - accuracy
    return {
        "arm": arm,
        "config": config.to_dict(),
        "loss": [2.0, 2.0 + above + 0.1 * config.seed],
        "test_accuracy": [0.1, 0.2],
        "test_accuracy_exact": accuracy,
        "small_gammas": 0.25 if config.activation == "relu" else 0.0,
    }


def made_up():
    # Last seed first: pairs are made by seed, not by place.
    return [row(arm, c) for arm, configs in ARMS.items() for c in reversed(configs)]


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_sweep(arm):
    members.check(ARMS[arm])
    assert len(set(ARMS[arm])) == len(ARMS[arm])


def test_arms_differ_in_activation_with_its_rate_and_in_what_learns():
    assert len(ARMS) == 8
    for arm, configs in ARMS.items():
        activation, _, trained = arm.partition("-")
        rate = {"sigmoid": 1.0, "relu": 0.1}[activation]
        switches = {(c.train_gamma, c.train_beta) for c in configs}
        assert {(c.activation, c.learning_rate, c.trained) for c in configs} == {
            (activation, rate, trained)
        }
        assert len(switches) == (4 if trained == "all" else 1)
        assert len(configs) == len(switches) * DESIGN.seeds
        others = [
            c.to_dict()
            | dict.fromkeys(
                ("activation", "learning_rate", "trained", "train_gamma", "train_beta")
            )
            for c in configs
            if c.seed == 0
        ]
        assert all(other == others[0] for other in others)


def test_runs_are_found_by_what_learns_in_order_of_seeds():
    runs = frozen.by_choice(made_up(), "relu")
    assert list(runs) == list(MADE_UP)
    for of_choice in runs.values():
        assert [row["config"]["seed"] for row in of_choice] == [0, 1, 2]
        assert {row["config"]["activation"] for row in of_choice} == {"relu"}


def test_change_is_paired_by_seed():
    interval = frozen.change(frozen.by_choice(made_up(), "sigmoid"), "all but beta")
    # Seeds differ by .1, the pairs do not.
    assert interval == pytest.approx((0.25, 0.25, 0.25, 3))


@pytest.mark.parametrize(
    "words, value, outcome",
    [
        ("sigmoid: fixing gamma and beta", 0.5, "supported"),
        ("it is lower", 0.5, "supported"),  # the sigmoid's
        ("relu: fixing gamma and beta", 0.5, "supported"),
        ("it is higher", 0.5, "supported"),  # ReLU's
        ("sigmoid: gamma and beta alone", 0.125, "supported"),
        ("relu: gamma and beta alone", -0.125, "refuted"),
        ("sigmoid: trained alone", 0.0, "refuted"),
        ("relu: trained alone", 0.25, "supported"),
    ],
)
def test_verdict_is_on_the_difference_that_it_names(words, value, outcome):
    (found,) = (v for v in frozen.verdicts(made_up()) if words in v.claim)
    assert found.interval.value == pytest.approx(value)
    assert found.interval.low <= found.interval.high
    assert found.verdict == outcome


def test_small_gammas_are_a_share_over_all_norms(tmp_path):
    config = ARMS["relu-norm"][0]
    own = init_variables(
        make_model(config, num_classes=10), jax.random.key(0), (28, 28, 1)
    )
    variables = jax.tree.map(lambda v: np.stack([np.asarray(v)] * 2), own)
    # Of the second run; there are 6 + 16 + 120 + 84 gammas, all 1 at first.
    variables["params"]["norm1"]["scale"][1, :2] = 0.009, -0.009
    variables["params"]["norm4"]["scale"][1, -1] = 0.0
    variables["params"]["norm2"]["scale"][1, 0] = -0.011
    checkpoint.save_variables(tmp_path, variables)
    rows = [{"config": config.to_dict(), "name": i} for i in range(2)]
    results.write_rows(tmp_path / "runs.jsonl", rows)
    found = frozen.with_small_gammas(tmp_path, rows, None)
    assert [row["small_gammas"] for row in found] == pytest.approx([0, 3 / 226])
    assert [row["name"] for row in found] == [0, 1]


def test_figures_are_drawn_of_made_up_rows(tmp_path):
    frozen.draw(made_up(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "sigmoid.png",
        "relu.png",
        "changes.png",
    }
