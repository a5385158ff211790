r"""Can the bias before batch norm be left out, and why?

The chapter's first exercise. Batch norm subtracts the mean, and with it any constant
that was added: the loss does not depend on such a bias, its gradient is 0, and in
training it stays what it was. This trains LeNet with its four biases and without, from
the same seeds, and looks at the gradients of the trained networks.

  python -m experiments.bias --workdir=runs/bias --devices=2                  1 minute
  python -m experiments.bias --workdir=runs/bias-try --smoke

Gradients and outputs are of a batch of 256 training images in float64, so that no
effect is due to rounding. Figure: bias.png.

What would refute it: a gradient beyond rounding, or another loss without the biases.

What came out (5 seeds; all of it in experiments/README.md): the biases are exactly
redundant. Their gradients are below 3e-15 of those of the weights, adding N(0, 1) to
each changes no logit by more than 9e-15, and without their 226 numbers (44,652 of
44,878 are left) the loss after two epochs is the same to 2e-6 nats.
"""

from __future__ import annotations

from experiments import scores, study
from experiments.claims import LOSS_DIFFERENCE, Claim
from experiments.estimate import largest, largest_difference, paired, spread
from experiments.figures import SPREAD, figure
from experiments.measurements.biases import LAYERS, effects

EXACTLY_0 = "exactly 0 but for rounding; a dependence would be of order 1"
CLAIMS = (
    Claim(
        "the gradient of a bias before batch norm is 0",
        "largest gradient of a bias by the largest of its layer's weights, float64",
        key="gradient",
        value=largest(lambda row: max(row["gradient_ratio"].values()), "with_bias"),
        below=1e-10,
        reason=EXACTLY_0,
    ),
    Claim(
        "a bias before batch norm does not change the output",
        "largest change of a logit when N(0, 1) is added to each bias, float64",
        value=largest(lambda row: row["output_change"], "with_bias"),
        below=1e-10,
        reason=EXACTLY_0,
    ),
    Claim(
        "without the biases the loss is the same at the first step",
        "largest difference of the loss, nats, over seeds",
        value=largest_difference(
            lambda row: row["first_step_losses"][:1], "with_bias", "without_bias"
        ),
        below=1e-5,
        reason="rounding of float32",
    ),
    Claim(
        "without the biases LeNet trains as well",
        LOSS_DIFFERENCE,
        key="loss",
        value=paired(scores.loss, "without_bias", "with_bias"),
        above=-0.01,
        below=0.01,
        reason="rounding alone differs, but at rate 1.0 it grows to the spread of "
        "seeds; two standard deviations of the published re-runs",
    ),
)

STUDY = study.Study(
    name="bias",
    place=2,
    design=study.design(epochs=2, learning_rate=1.0),
    arms={
        "with_bias": [{}],
        "without_bias": [{"model": "lenet:bias_before_norm=false"}],
    },
    claims=CLAIMS,
    figures={
        "bias.png": figure(
            "estimates",
            {
                "gradient of the bias, to that of the weights (float64)": {
                    layer: spread(
                        lambda row, layer=layer: row["gradient_ratio"][layer],
                        "with_bias",
                    )
                    for layer in LAYERS
                }
            },
            SPREAD,
            finding="Gradients of the biases are at most {gradient} of those of the "
            "weights, which is rounding in float64.",
            alt="The largest gradient of a bias by that of the weights, a dot for each "
            "of four layers, all far below 1e-10.",
        )
    },
    probe=effects,
    summary=lambda runs: {
        "parameters": {arm: rows[-1]["parameters"] for arm, rows in runs.items()}
    },
)

if __name__ == "__main__":
    study.start(STUDY)
