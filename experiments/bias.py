r"""Can the bias before batch norm be left out, and why?

The chapter's first exercise. Batch norm subtracts the mean, and with it any constant
that was added: the loss does not depend on such a bias, its gradient is 0, and in
training it stays what it was. This trains LeNet with the four biases and without, from
the same seeds, and looks at the gradients of the trained networks.

  python -m experiments.bias --workdir=runs/bias --devices=2                  1 minute
  python -m experiments.bias --workdir=runs/bias-try --smoke

Gradients and outputs are of a batch of 256 training images in float64, so that rounding
cannot stand for an effect. Figure: bias.png.

What came out (5 seeds; all of it in experiments/README.md): exactly redundant. Their
gradients are below 3e-15 of those of the weights, adding N(0, 1) to each changes no
logit by more than 9e-15, and without their 226 numbers (44,652 of 44,878 are left) the
loss after two epochs is the same to 2e-6 nats.
"""

from __future__ import annotations

import dataclasses
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

LAYERS = ("conv1", "conv2", "dense1", "dense2")
TITLES = {"with_bias": "with biases", "without_bias": "without"}


@dataclasses.dataclass(frozen=True)
class Design(study.Design):
    """Two arms from the same seeds."""

    epochs: int = fields.option_of(TrainConfig, "epochs", 2)
    seeds: int = fields.option_of(study.Design, "seeds", 5)
    learning_rate: float = fields.option_of(TrainConfig, "learning_rate")


def arms(design: Design, rows: Sequence[Row]) -> Arms:
    """Return runs with and without the biases, from the same seeds."""
    del rows
    return {
        arm: [
            design.config(bias_before_norm=arm == "with_bias", seed=seed)
            for seed in range(design.seeds)
        ]
        for arm in TITLES
    }


def with_gradients(folder: Path, rows: list[Row], data: ImageData) -> list[Row]:
    """Add what the trained networks' biases do, and the number of parameters."""
    import jax
    import numpy as np

    from bn_jax.runs import sweeps

    variables = sweeps.load_variables(folder)
    found = []
    for i, row in enumerate(rows):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(own["params"]))
        effects = bias_effects(row["config"], own, data) if _has_bias(row) else {}
        found.append({**row, "parameters": count, **effects})
    return found


def _has_bias(row: Row) -> bool:
    has_bias: bool = row["config"]["bias_before_norm"]
    return has_bias


def bias_effects(config: Any, variables: Any, data: ImageData) -> Row:
    """Return, in float64, how biases before a norm change loss and output.

    Returns:
      `gradient_ratio`: for each layer, the largest gradient of a bias by the largest of
      a weight; `output_change`: the largest change of a logit when a standard normal
      number is added to each bias.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from bn_jax.training import state as state_lib
    from bn_jax.training import step as step_lib

    train = data.train
    with jax.enable_x64(True):
        model = state_lib.make_model(
            TrainConfig.from_dict(config), num_classes=len(data.class_names)
        )
        variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), variables)
        images, labels = (
            jnp.asarray(train.images[:256]),
            jnp.asarray(train.labels[:256]),
        )

        def logits_of(params: Any) -> Any:
            return step_lib.predict_by_batch(
                model, {**variables, "params": params}, images
            )

        def loss_of(params: Any) -> Any:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits_of(params), labels
            )
            return losses.mean()

        params = variables["params"]
        gradients = jax.jit(jax.grad(loss_of))(params)
        rng = np.random.default_rng(0)
        moved = {
            layer: {**own, "bias": own["bias"] + rng.normal(size=own["bias"].shape)}
            for layer, own in params.items()
            if layer in LAYERS
        }
        apply = jax.jit(logits_of)
        change = jnp.abs(apply({**params, **moved}) - apply(params)).max()
        return {
            "gradient_ratio": {
                layer: float(
                    jnp.abs(gradients[layer]["bias"]).max()
                    / jnp.abs(gradients[layer]["kernel"]).max()
                )
                for layer in LAYERS
            },
            "output_change": float(change),
        }


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    from experiments import intervals
    from experiments.claims import decide

    of_arm = {arm: study.runs_of(rows, arm) for arm in TITLES}
    with_bias = of_arm["with_bias"]
    n = len(with_bias)
    ratio = max(max(row["gradient_ratio"].values()) for row in with_bias)
    change = max(row["output_change"] for row in with_bias)
    first = max(
        abs(a["first_step_losses"][0] - b["first_step_losses"][0])
        for a, b in zip(*of_arm.values(), strict=True)
    )
    why = "exactly 0 but for rounding; a dependence would be of order 1"
    return [
        decide(
            "the gradient of a bias before batch norm is 0",
            "largest gradient of a bias by the largest of its layer's weights, float64",
            intervals.Interval(ratio, ratio, ratio, n),
            below=1e-10,
            reason=why,
        ),
        decide(
            "a bias before batch norm does not change the output",
            "largest change of a logit when N(0, 1) is added to each bias, float64",
            intervals.Interval(change, change, change, n),
            below=1e-10,
            reason=why,
        ),
        decide(
            "without the biases the loss is the same at the first step",
            "largest difference of the loss, nats, over seeds",
            intervals.Interval(first, first, first, n),
            below=1e-5,
            reason="rounding of float32",
        ),
        decide(
            "without the biases LeNet trains as well",
            "paired difference of the training loss, nats",
            intervals.of_difference(
                *(
                    [study.final_loss(row) for row in of_arm[arm]]
                    for arm in ("without_bias", "with_bias")
                )
            ),
            above=-0.01,
            below=0.01,
            reason="rounding alone differs, but at rate 1.0 it grows to the spread of "
            "seeds; two standard deviations of the published re-runs",
        ),
    ]


def summary(rows: Sequence[Row]) -> Row:
    """Return the number of parameters of each arm."""
    return {"parameters": {row["arm"]: row["parameters"] for row in rows}}


def draw(rows: Sequence[Row], folder: Path) -> None:
    from bn_jax import plots

    ratios = {
        layer: [row["gradient_ratio"][layer] for row in rows if _has_bias(row)]
        for layer in LAYERS
    }
    plots.estimates(
        {
            "gradient of the bias, to that of the weights (float64)": {
                layer: study.mean_and_range(values) for layer, values in ratios.items()
            }
        },
        f"n = {len(ratios['conv1'])} seeds; line: least to greatest",
        folder / "bias.png",
    )


if __name__ == "__main__":
    study.start(
        study.Study(
            name="bias",
            design=Design,
            stages=(arms,),
            verdicts=verdicts,
            draw=draw,
            exact=False,
            complete=with_gradients,
            summary=summary,
        )
    )
