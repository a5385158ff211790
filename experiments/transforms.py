r"""What do other normalising transforms do in the place of batch norm?

The chapter's seventh exercise asks for other transforms: is the probability integral
transform one, is an estimate of the whole covariance matrix? This trains LeNet with
each in the place of batch norm, all else equal: per-example norms (layer, group,
instance), batch renormalisation, whitening of groups of features by four methods, and
ranks made uniform or Gaussian.

  python -m experiments.transforms --workdir=runs/transforms --devices=2    15 minutes
  python -m experiments.transforms --workdir=runs/transforms-try --smoke

Instance norm follows the convolutions alone, since in a dense layer it would leave
nothing. Features that do not divide into groups of the size asked for are cut into the
largest groups below it. The rate is the chapter's, 1.0, for all: this compares drop-in
replacements, not each at its best. Figures: transforms.png, loss and accuracies;
covariance.png, of the features of the first dense layer before and after each, in the
untrained network.

What came out (3 seeds, 3 epochs; all of it in experiments/README.md): ZCA in groups of
16 trains to .082 nats less than batch norm in as many steps, at .63 of the speed, and
by the batch's own statistics predicts best, .881 to .857; by moving averages it is
worse than batch norm. PCA hardly trains. Ranks end within .02 nats of batch norm;
layer, group and instance norm are .15 to .37 nats behind at this rate.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_jax import fields
from bn_jax.training.config import TrainConfig
from experiments import study
from experiments.study import Arms, Row

if TYPE_CHECKING:
    from bn_jax.data import ImageData
    from experiments.claims import Verdict


def _whitening(method: str, size: int | None, **options: int) -> str:
    parts = {"method": method, "max_group_size": size, **options}
    return "whitening:" + ",".join(f"{k}={v}" for k, v in parts.items())


# Norm, and a title, by the name of the arm.
ARMS: dict[str, tuple[str, str]] = {
    "batch_norm": ("batch_norm", "batch norm"),
    "renorm": ("renorm", "batch renormalisation"),
    "layer": ("layer", "layer norm"),
    "group": ("group:num_groups=2", "group norm, 2 groups"),
    "instance": ("instance", "instance norm, convolutions"),
    **{
        f"zca-{size}": (_whitening("zca", size), f"ZCA, groups of {size}")
        for size in (8, 16, 64)
    },
    "zca-all": (_whitening("zca", None), "ZCA, all features"),
    "pca-16": (_whitening("pca", 16), "PCA, groups of 16"),
    "cholesky-16": (_whitening("cholesky", 16), "Cholesky, groups of 16"),
    **{
        f"iternorm-16-{t}": (
            _whitening("iternorm", 16, num_iterations=t),
            f"IterNorm, 16, {t} step{'s' if t > 1 else ''}",
        )
        for t in (1, 3, 5, 7)
    },
    "uniform": ("quantile:target=uniform", "ranks to uniform"),
    "gaussian": ("quantile:target=gaussian", "ranks to Gaussian"),
}
GROUP = 15  # of the 120 features: the greatest divisor up to 16
SHOWN = 24  # features of the covariance that is drawn


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Transforms by name."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 3)
    learning_rate: float = fields.option_of(TrainConfig, "learning_rate")
    arms: tuple[str, ...] = fields.option(
        tuple(ARMS), "Which transforms are trained.", choices=tuple(ARMS)
    )


def arms(design: Design, rows: Sequence[Row]) -> Arms:
    """Return a run for each transform and seed."""
    del rows
    return {
        arm: [
            design.config(
                norm=ARMS[arm][0],
                norm_layers="1100" if arm == "instance" else "1111",
                seed=seed,
            )
            for seed in range(design.seeds)
        ]
        for arm in design.arms
    }


def with_covariance(folder: Path, rows: list[Row], data: ImageData) -> list[Row]:
    """Add to the first row of an arm what its transform makes of a covariance."""
    del folder
    import numpy as np

    x = dense_features(data)
    y = transformed(rows[0]["config"]["norm"], x)
    covariance = np.cov(y, rowvar=False, bias=True)
    first = {
        **rows[0],
        "covariance_distance": distance(covariance),
        "distance_within_groups": distance_within(covariance, GROUP),
        "covariance": _shown(covariance),
        "covariance_before": _shown(np.corrcoef(x, rowvar=False)),
    }
    return [first, *rows[1:]]


def _shown(covariance: Any) -> list[list[float]]:
    part: list[list[float]] = covariance[:SHOWN, :SHOWN].round(3).tolist()
    return part


def distance(covariance: Any) -> float:
    """Return the Frobenius norm of a covariance less the identity, by sqrt(C)."""
    import numpy as np

    c = len(covariance)
    return float(np.linalg.norm(covariance - np.eye(c)) / math.sqrt(c))


def distance_within(covariance: Any, size: int) -> float:
    """Return the mean distance of the blocks of features that are one group."""
    starts = range(0, len(covariance), size)
    blocks = [covariance[i : i + size, i : i + size] for i in starts]
    return sum(map(distance, blocks)) / len(blocks)


def dense_features(data: ImageData) -> Any:
    """Return what the first dense layer of an untrained LeNet makes of 256 images."""
    import jax
    import numpy as np

    from bn_jax.training import state as state_lib
    from bn_jax.training import step as step_lib

    model = state_lib.make_model(TrainConfig(), num_classes=len(data.class_names))
    images = data.train.images[:256]
    variables = state_lib.init_variables(model, jax.random.key(0), images.shape[1:])
    _, state = model.apply(
        variables,
        step_lib.to_float(jax.numpy.asarray(images)),
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "dense1",
    )
    return np.asarray(state["intermediates"]["dense1"]["__call__"][0], np.float64)


def transformed(norm: str, x: Any) -> Any:
    """Return what an untrained layer of this norm makes of a batch `[N, C]`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bn_jax import models

    constructor = models.norm_by_name(norm, momentum=0.9, epsilon=1e-5)
    assert constructor is not None
    layer = constructor(use_running_average=False)
    features = jnp.asarray(x, jnp.float32)
    variables = layer.init(jax.random.key(0), features)
    y, _ = layer.apply(variables, features, mutable=["batch_stats"])
    return np.asarray(y, np.float64)


def of_arm(rows: Sequence[Row], arm: str, name: str) -> list[float]:
    """Return a value at the end, of an arm's runs by seed; of guessing, if diverged."""
    values = [study.last(row, name) for row in study.runs_of(rows, arm)]
    return [study.guessing(name) if math.isnan(value) else value for value in values]


def at_equal_time(rows: Sequence[Row], arm: str) -> list[float]:
    """Return the training loss of an arm's runs in the time of batch norm's epochs.

    An epoch's loss is taken for that at its end, with straight lines between; NaN where
    the arm is not through its first epoch by then.
    """
    import numpy as np

    runs = study.runs_of(rows, arm)
    (norm, *_) = study.runs_of(rows, "batch_norm")
    epochs = np.arange(1, len(norm["loss"]) + 1)
    speed = runs[0]["examples_per_second"] / norm["examples_per_second"]
    losses = [[math.nan if v is None else v for v in row["loss"]] for row in runs]
    return [
        float(np.interp(speed * epochs[-1], epochs, loss, left=math.nan))
        for loss in losses
    ]


def summary(rows: Sequence[Row]) -> Row:
    """Return each arm's mean loss in the time that batch norm's epochs take."""
    present = study.arms_of(rows)
    if "batch_norm" not in present:
        return {}
    means = {
        arm: sum(losses) / len(losses)
        for arm in present
        for losses in [at_equal_time(rows, arm)]
    }
    return {
        "loss_at_equal_time": {
            arm: None if math.isnan(mean) else mean for arm, mean in means.items()
        }
    }


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    def apart(a: str, b: str) -> intervals.Interval:
        return intervals.of_difference(of_arm(rows, a, "loss"), of_arm(rows, b, "loss"))

    def distance_of(arm: str, name: str = "covariance_distance") -> intervals.Interval:
        value = next(row[name] for row in rows if row["arm"] == arm and name in row)
        return intervals.Interval(value, value, value, 1)

    speed = {row["arm"]: row["examples_per_second"] for row in rows}
    loss = "paired difference of the training loss, nats"

    def slowdown() -> intervals.Interval:
        ratio = speed["batch_norm"] / speed["zca-16"]
        return intervals.Interval(ratio, ratio, ratio, 1)

    def convergence() -> intervals.Interval:
        distances = [
            distance_of(arm, "distance_within_groups").value for arm in iternorms
        ]
        ratio = max(b / a for a, b in itertools.pairwise(distances))
        return intervals.Interval(ratio, ratio, ratio, 1)

    def loses(arm: str, claim: str) -> study.Claim:
        return study.Claim(
            (arm, "batch_norm"),
            lambda: decide(
                f"{claim} trains to a higher loss than batch norm",
                loss,
                apart(arm, "batch_norm"),
                above=0.0,
                reason="the sign is the claim",
            ),
        )

    iternorms = [f"iternorm-16-{t}" for t in (1, 3, 5, 7)]
    claims = [
        study.Claim(
            ("zca-16", "batch_norm"),
            lambda: decide(
                "whitening in groups of 16 trains to a lower loss a step than batch "
                "norm",
                loss,
                apart("zca-16", "batch_norm"),
                below=0.0,
                reason="the sign is the claim",
            ),
        ),
        study.Claim(
            ("zca-16", "batch_norm"),
            lambda: decide(
                "it costs more time a step",
                "ratio of examples a second, batch norm to ZCA",
                slowdown(),
                above=1.1,
                reason="a tenth, beyond what the machine's speed varies by",
            ),
        ),
        study.Claim(
            ("pca-16", "zca-16"),
            lambda: decide(
                "PCA whitening is erratic: it trains to a higher loss than ZCA",
                loss,
                apart("pca-16", "zca-16"),
                above=0.05,
                reason="five times the deviation of the loss over published re-runs",
            ),
        ),
        *(
            loses(target, f"the probability integral transform, {target},")
            for target in ("uniform", "gaussian")
        ),
        *(
            loses(arm, f"{ARMS[arm][1]}, at batch norm's rate,")
            for arm in ("layer", "group", "instance")
        ),
        study.Claim(
            ["batch_norm"],
            lambda: decide(
                "batch norm leaves features correlated",
                "distance of the covariance to the identity, by sqrt(C)",
                distance_of("batch_norm"),
                above=0.1,
                reason="0 would be none; 256 images of independent features have .7",
            ),
        ),
        study.Claim(
            ["zca-all"],
            lambda: decide(
                "ZCA of all features leaves none",
                "distance of the covariance to the identity, by sqrt(C)",
                distance_of("zca-all"),
                below=0.1,
                reason="epsilon, 1e-5 beside the least variances, keeps it from 0",
            ),
        ),
        study.Claim(
            iternorms,
            lambda: decide(
                "each two steps of IterNorm come closer to the identity",
                "largest ratio of distances within groups, 3 to 1, 5 to 3, 7 to 5 "
                "steps",
                convergence(),
                below=1.0,
                reason="Newton's iteration converges",
            ),
        ),
    ]
    return study.judge(study.arms_of(rows), claims)


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    present = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    values = {
        "training loss, nats": lambda arm: of_arm(rows, arm, "loss"),
        "the same, in batch norm's time": lambda arm: at_equal_time(rows, arm),
        "test accuracy, moving averages": lambda arm: of_arm(
            rows, arm, "test_accuracy"
        ),
        "test accuracy, its batch of 500": lambda arm: [
            row["test_accuracy_batch"] or 0.1 for row in study.runs_of(rows, arm)
        ],
    }
    if "batch_norm" not in present:
        del values["the same, in batch norm's time"]
    panels = {
        label: {ARMS[arm][1]: study.mean_and_range(of(arm)) for arm in present}
        for label, of in values.items()
    }
    seeds = {row["config"]["seed"] for row in rows}
    epochs, rate = (rows[0]["config"][name] for name in ("epochs", "learning_rate"))
    plots.estimates(
        panels,
        f"{epochs} epochs at rate {rate}; n = {len(seeds)} seeds; line: least to "
        "greatest",
        folder / "transforms.png",
    )
    firsts = [row for row in rows if "covariance" in row]
    matrices = {"before, as correlation": firsts[0]["covariance_before"]}
    matrices |= {ARMS[row["arm"]][1]: row["covariance"] for row in firsts}
    plots.matrices(
        matrices,
        f"covariance of the first {SHOWN} of 120 features, 256 images, untrained LeNet",
        folder / "covariance.png",
    )


if __name__ == "__main__":
    study.start(
        study.Study(
            name="transforms",
            design=Design,
            stages=(arms,),
            verdicts=verdicts,
            draw=draw,
            exact=False,
            complete=with_covariance,
            summary=summary,
            smoke={"arms": ("batch_norm", "layer", "zca-16")},
        )
    )
