import numpy as np
import pytest

from bn_jax.training import members
from bn_jax.training.config import value_of
from experiments import estimate, frozen, scores

DESIGN = frozen.STUDY.design(epochs=4, seeds=3, dataset="sample")
SEEDS = range(5, 8)
ARMS = {
    arm: DESIGN.configs(choices, SEEDS)
    for arm, choices in frozen.STUDY.arms_of(DESIGN).items()
}
# By what learns: the loss above that of all, and the accuracy.
MADE_UP = {
    "all": (0.0, 0.875),
    "all but beta": (0.25, 0.875),
    "all but gamma": (0.125, 0.875),
    "all but both": (-0.5, 0.875),
    "gamma, beta and the last layer": (1.0, 0.75),
    "gamma and beta alone": (1.5, 0.625),
    "as many others a channel": (1.5, 0.5),
    "gamma and beta, gamma drawn": (1.5, 0.5),
    "the same, five times as long": (1.5, 0.5),
}


def row(arm, config):
    activation, choice = frozen.choice_of({"arm": arm, "config": config.to_dict()})
    above, accuracy = MADE_UP[choice]
    if activation == "relu":
        above, accuracy = -above, 1 - accuracy
    return {
        "arm": arm,
        "config": config.to_dict(),
        "loss": [2.0, 2.0 + above + 0.1 * config.seed],
        "test_accuracy": [0.1, 0.2],
        "test_accuracy_exact": accuracy,
        "small_gammas": 0.25 if activation == "relu" else 0.0,
    }


def made_up():
    # Last seed first: pairs are made by seed, not by place.
    return [row(arm, c) for arm, configs in ARMS.items() for c in reversed(configs)]


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_sweep(arm):
    members.check(ARMS[arm])
    assert len(set(ARMS[arm])) == len(ARMS[arm])


def test_arms_differ_in_activation_with_its_rate_and_in_what_learns():
    assert len(ARMS) == 12
    for arm, configs in ARMS.items():
        activation, _, kind = arm.partition("-")
        assert {c.learning_rate for c in configs} == {frozen.RATES[activation]}
        found = {value_of(c.to_dict(), "model.activation") for c in configs}
        assert found == {activation}
        trained = {c.trained for c in configs}
        assert trained == {of["trained"] for of in frozen.LEARNING[kind].values()}
        gammas = {value_of(c.to_dict(), "model.gamma") for c in configs}
        assert gammas == {"uniform" if "drawn" in kind else "ones"}
        assert {c.epochs for c in configs} == {20 if kind == "drawn_long" else 4}
        others = [
            c.to_dict() | dict.fromkeys(("model", "learning_rate", "trained", "epochs"))
            for c in configs
            if c.seed == SEEDS[0]
        ]
        assert all(other == others[0] for other in others)


def test_runs_are_known_by_activation_and_what_learns_in_order_of_seeds():
    runs = frozen.STUDY.runs(made_up()).where(lambda choice: choice[0] == "relu")
    assert {title for _, title in runs} == set(MADE_UP)
    for of_choice in runs.values():
        assert [row["config"]["seed"] for row in of_choice] == list(SEEDS)


def test_change_is_paired_by_seed():
    pair = ("sigmoid", "all but beta"), ("sigmoid", frozen.FREE)
    interval = estimate.paired(scores.loss, *pair)(frozen.STUDY.runs(made_up()))
    # Seeds differ by .1, the pairs do not.
    assert interval == pytest.approx((0.25, 0.25, 0.25, 3))


@pytest.mark.parametrize(
    "words, value, outcome",
    [
        ("sigmoid: fixing gamma and beta costs", -0.5, "refuted"),
        ("relu: fixing gamma and beta costs", 0.5, "supported"),
        ("sigmoid: gamma and beta alone", 0.125, "supported"),
        ("relu: gamma and beta alone", -0.125, "refuted"),
        # (0 + .5) / (226 + 1) and (.25 * 226 + .5) / (226 + 1)
        ("sigmoid: trained alone, gammas switch features off", 0.5 / 227, "refuted"),
        ("relu: trained alone, gammas switch features off", 57 / 227, "supported"),
    ],
)
def test_verdict_is_on_the_difference_that_it_names(words, value, outcome):
    found = next(v for v in frozen.STUDY.verdicts(made_up()) if words in v.claim)
    assert found.interval.value == pytest.approx(value)
    assert found.interval.low <= found.interval.high
    assert found.verdict == outcome


def test_small_gammas_are_a_share_over_all_norms():
    # There are 6 + 16 + 120 + 84 gammas, all 1 at first.
    sizes = dict(zip(frozen.NORMS, (6, 16, 120, 84), strict=True))
    params = {norm: {"scale": np.ones(size)} for norm, size in sizes.items()}
    assert frozen.small_gammas({}, {"params": params}, None) == {"small_gammas": 0.0}
    params["norm1"]["scale"][:2] = 0.009, -0.009
    params["norm4"]["scale"][-1] = 0.0
    params["norm2"]["scale"][0] = -0.011
    found = frozen.small_gammas({}, {"params": params}, None)
    assert found["small_gammas"] == pytest.approx(3 / 226)


@pytest.mark.slow
def test_figures_are_drawn_of_made_up_rows(tmp_path):
    frozen.STUDY.draw(made_up(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "claims.png",
        "sigmoid.png",
        "relu.png",
        "changes.png",
    }
