r"""Train LeNet with batch normalisation on Fashion-MNIST: the chapter's run.

This is the main experiment of the d2l chapter on batch normalisation: LeNet with a
batch norm before each sigmoid, plain SGD with learning rate 1.0, batches of 256 images,
10 epochs. It prints a line per epoch and, at the end, what the first layer learned.
The flags are those of `experiments.train`, whose defaults are this run.

  python -m experiments.lenet --workdir=runs/lenet             the chapter's run
  python -m experiments.lenet --workdir=runs/flax --norm=flax  with Flax's own layer
  python -m experiments.lenet --workdir=runs/none --norm=none --learning_rate=0.9
  python -m experiments.lenet --workdir=runs/smoke --smoke     a try in seconds
  python -m experiments.lenet --load=runs/lenet                evaluate it again
  python -m experiments.lenet --workdir=runs/rates --devices=2 \
    --sweep="learning_rate=0.1,0.3,1.0;seed=0..2"              nine runs in one program
"""

from __future__ import annotations

from absl import app

from experiments import launch, train

if __name__ == "__main__":
    app.run(train.main, flags_parser=launch.flags_parser(train.define_flags))
