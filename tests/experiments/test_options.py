import pytest

from bn_jax.training import members
from bn_jax.training.config import TrainConfig
from bn_jax.training.task import Task, make_network
from experiments import options

DESIGN = options.STUDY.design(epochs=3, seeds=3, dataset="sample")
ARMS = {
    arm: DESIGN.configs(choices)
    for arm, choices in options.STUDY.arms_of(DESIGN).items()
}
FAST, TWO_PASSES = options.FAST, options.TWO_PASSES


def row(arm, config):
    """Return a made-up run; each option moves its scores by a known amount."""
    seed = config.seed
    momentum, epsilon = options.numbers_of({"config": config.to_dict()})
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
    (found,) = (v for v in options.STUDY.verdicts(rows) if words in v.claim)
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_arm_is_a_sweep_of_models_that_can_be_made(arm):
    members.check(ARMS[arm])
    make_network(ARMS[arm][0], Task(num_classes=10, image_shape=(28, 28, 1)))
    assert len(set(ARMS[arm])) == len(ARMS[arm])
    assert "/" not in arm and ":" not in arm


def test_arms_but_the_first_differ_from_the_chapters_run_in_their_norm_alone():
    chapter = TrainConfig(dataset="sample", epochs=3)
    assert chapter in ARMS["numbers"]
    for arm in options.NORMS:
        first = ARMS[arm][0].to_dict()
        assert {**first, "norm": "batch_norm"} == chapter.to_dict()
        assert options.numbers_of({"config": first}) == (0.9, 1e-5)


def test_momenta_and_epsilons_of_the_claim_are_all_trained_once():
    pairs = [
        options.numbers_of({"config": c.to_dict()})
        for c in ARMS["numbers"]
        if c.seed == 0
    ]
    assert sorted(pairs) == sorted(
        [(m, 1e-5) for m in (0, 0.5, 0.9, 0.99, 0.999)]
        + [(0.9, 1e-12), (0.9, 1e-3), (0.99, 1e-3)]
    )


def test_runs_are_known_by_option_in_order_of_seeds():
    runs = options.STUDY.runs(made_up())
    assert len(runs) == 8 + len(options.NORMS)
    for rows in runs.values():
        assert [row["config"]["seed"] for row in rows] == [0, 1, 2]
    keras = runs["momentum 0.99, epsilon 0.001 (Keras)"][2]
    assert options.numbers_of(keras) == (0.99, 1e-3)


def test_spread_over_momenta_is_the_largest_in_any_epoch_from_one_seed():
    rows = made_up()
    # Seeds differ, momenta do not.
    assert verdict(rows, "no part in training").interval.value == 0
    (moved,) = (
        r
        for r in rows
        if r["config"]["seed"] == 1 and options.numbers_of(r)[0] == 0.999
    )
    moved["loss"] = [2.0, 1.5, 0.6]
    assert verdict(rows, "no part in training").interval.value == 0.5


def test_first_steps_are_compared_by_seed():
    runs = options.STUDY.runs(made_up())
    assert options.first_steps_differ(FAST, TWO_PASSES)(runs).value == 2**-14
    assert options.first_steps_differ(options.CHAPTER, TWO_PASSES)(runs).value == 0
    differences = options.summary(runs)["loss_difference_to_two_passes_in_20_steps"]
    assert differences == {"fast_variance": 2**-14, "ours": 0}


# Differences of the made-up scores, the same for each seed, and so without spread.
@pytest.mark.parametrize(
    "words, value, outcome",
    [
        ("no part in training", 0.0, "holds"),
        (".999 is too slow", 0.75 - 0.25 - 0.8125, "supported"),
        ("slower average predicts better", 0.03125, "supported"),
        ("Keras's epsilon", 0.25, "refuted"),
        ("fast variance", 2**-14, "holds"),  # 6.1e-5, below 1e-4
        ("without scale and bias", 0.125, "supported"),
    ],
)
def test_verdict_is_on_the_difference_that_it_names(words, value, outcome):
    found = verdict(made_up(), words)
    assert found.interval.value == pytest.approx(value)
    assert found.interval.n == 3
    assert found.verdict == outcome


def test_figures_are_drawn_of_made_up_rows(tmp_path):
    options.STUDY.draw(made_up(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "claims.png",
        "options.png",
        "momentum.png",
    }
