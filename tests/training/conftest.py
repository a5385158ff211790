import dataclasses
import os

import numpy as np
import pytest

from bn_jax import data as data_lib
from bn_jax.training import loop
from bn_jax.training.config import TrainConfig


def tiny_split(seed, num_examples):
    """Images whose class can be read off: row 2 * class is bright, the rest noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_examples) % 10).astype(np.int32)
    images = rng.integers(0, 100, (num_examples, 28, 28, 1), dtype=np.uint8)
    images[np.arange(num_examples), 2 * labels + 4] = 255
    return data_lib.Split(images, labels)


@pytest.fixture(scope="session")
def tiny_data():
    return data_lib.ImageData(
        name="tiny",
        train=tiny_split(0, 170),
        test=tiny_split(1, 37),
        class_names=tuple("0123456789"),
        kind="sample",
        source="tiny, 170 + 37 images",
    )


@pytest.fixture(scope="session")
def tiny_config():
    """Two epochs of five steps, and twenty images an epoch left over."""
    return dataclasses.replace(TrainConfig(), epochs=2, batch_size=30)


@pytest.fixture
def signal_at():
    """Lets a test send its own process a signal in a step of a run."""

    def signal_at(step, signum, monkeypatch):
        train = loop.Trainer.train

        def signalled(trainer):
            for report in train(trainer):
                if trainer.step == step:
                    os.kill(os.getpid(), signum)
                yield report

        monkeypatch.setattr(loop.Trainer, "train", signalled)

    return signal_at
