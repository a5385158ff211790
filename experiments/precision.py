r"""Does batch norm train as well when the network computes in bfloat16?

bfloat16 has 8 bits of precision. Parameters, gradients' updates, batch statistics and
moving averages stay in float32; activations and the factors of products are rounded.
This trains LeNet, and a ResNet of 8 layers and width 8 on 5,120 images, in both, from
the same seeds and in the same orders.

  python -m experiments.precision --workdir=runs/precision --devices=2      10 minutes
  python -m experiments.precision --workdir=runs/precision-try --smoke

What would refute it: a loss that differs by more than the bounds, of which LeNet's is
the spread of published re-runs. Figure: precision.png.

What came out (5 to 10 seeds; all of it in experiments/README.md): both train to the
same loss; the differences are -.002 nats (LeNet's) and -.001. On a CPU bfloat16 is
slower.
"""

from __future__ import annotations

from experiments import scores, study
from experiments.claims import LOSS_DIFFERENCE, Claim
from experiments.estimate import paired
from experiments.figures import SPREAD, figure, spreads

RESNET = {
    "model": "resnet:depth=8,width=8",
    "learning_rate": 0.1,
    "train_examples": 5120,
}
CLAIMS = (
    Claim(
        "in bfloat16 LeNet trains to the same loss",
        LOSS_DIFFERENCE,
        key="lenet",
        value=paired(scores.loss, "lenet_bfloat16", "lenet"),
        above=-0.01,
        below=0.01,
        reason="two standard deviations of the published re-runs",
    ),
    Claim(
        "in bfloat16 a ResNet trains to the same loss",
        LOSS_DIFFERENCE,
        key="resnet",
        value=paired(scores.loss, "resnet_bfloat16", "resnet"),
        above=-0.02,
        below=0.02,
        reason="a thirtieth of what it learns in these 80 steps",
    ),
)

STUDY = study.Study(
    name="precision",
    place=11,
    design=study.design(epochs=2),
    arms={
        "lenet": [{}],
        "lenet_bfloat16": [{"precision": "bfloat16"}],
        "resnet": [RESNET],
        "resnet_bfloat16": [{**RESNET, "precision": "bfloat16"}],
    },
    claims=CLAIMS,
    figures={
        "precision.png": figure(
            "estimates",
            spreads(
                {"training loss, nats": scores.loss},
                {
                    "LeNet, float32": "lenet",
                    "LeNet, bfloat16": "lenet_bfloat16",
                    "ResNet, float32": "resnet",
                    "ResNet, bfloat16": "resnet_bfloat16",
                },
            ),
            SPREAD,
            finding="In bfloat16 LeNet's loss is {lenet} nats higher, the ResNet's "
            "{resnet}.",
            alt="Training loss of LeNet and of a ResNet, in float32 and in bfloat16.",
        )
    },
)

if __name__ == "__main__":
    study.start(STUDY)
