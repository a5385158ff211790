import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.data import Split
from bn_jax.training import evaluation
from bn_jax.training.evaluation import Evaluator
from bn_jax.training.state import Network
from marks import slow_but


class LogOfMean(nn.Module):
    """Logits of which those of an image of zeros, such as padding, are infinite."""

    @nn.compact
    def __call__(self, x, train):
        del train
        weights = self.param("weights", nn.initializers.ones, (10,))
        return jnp.log(x.mean((1, 2, 3)))[:, None] * weights


PREDICT = Network(LogOfMean(), (2, 2, 1)).predict

WEIGHTS = np.linspace(-1.0, 1.0, 10)


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(3)
    images = rng.integers(1, 256, (37, 2, 2, 1), dtype=np.uint8)
    return Split(images, rng.integers(0, 10, 37, dtype=np.int32))


@pytest.fixture(scope="module")
def expected(split):
    """Mean loss and accuracy, written out in float64."""
    x = split.images.astype(np.float64).mean((1, 2, 3)) / 255
    logits = np.log(x)[:, None] * WEIGHTS
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    of_label = log_p[np.arange(37), split.labels]
    return -of_label.mean(), (logits.argmax(1) == split.labels).mean()


DIVISIONS = [(1, 500), (1, 37), (1, 10), (1, 1), (3, 5), (8, 4)]


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "part_size"),
    slow_but(
        [
            (1, 500, 37),
            (1, 37, 2**16),
            (1, 10, 36),
            (1, 1, 10),
            (3, 5, 2**16),
            (3, 5, 36),
            (8, 4, 37),
            (8, 4, 10),
        ],
        [(*each, size) for each in DIVISIONS for size in (2**16, 37, 36, 10)],
    ),
)
def test_every_example_counts_once_however_they_are_divided(
    split, expected, devices, num_devices, batch_size, part_size, monkeypatch
):
    monkeypatch.setattr(evaluation, "_PART_SIZE", part_size)
    for stored in (True, False):
        evaluate = Evaluator(
            PREDICT,
            split,
            devices=devices[:num_devices],
            stored=stored,
            batch_size=batch_size,
        )
        for _ in range(2):
            result = evaluate({"params": {"weights": np.float32(WEIGHTS)}})
            assert result.loss == pytest.approx(expected[0], rel=1e-5)
            assert result.accuracy == expected[1]


def test_parts_are_of_one_shape_so_that_one_program_takes_them(
    split, devices, monkeypatch
):
    monkeypatch.setattr(evaluation, "_PART_SIZE", 10)
    evaluate = Evaluator(PREDICT, split, devices=devices[:2], batch_size=3)
    # 37 examples in 4 parts of at most 10, each as 2 batches of 3 a device.
    parts = list(evaluate._parts())
    assert [counts.shape for _, counts in parts] == [(2, 6)] * 4
    assert [int(counts.sum()) for _, counts in parts] == [10, 10, 10, 7]


def test_data_that_is_not_stored_is_sent_anew_at_each_evaluation(split, devices):
    images = split.images.copy()
    changing = Split(images, split.labels)
    evaluators = {
        stored: Evaluator(PREDICT, changing, devices=devices[:1], stored=stored)
        for stored in (True, False)
    }
    variables = {"params": {"weights": np.float32(WEIGHTS)}}
    before = evaluators[False](variables)
    images[:] = 255  # whose logits are 0: the loss is that of chance
    assert evaluators[True](variables) == before
    assert evaluators[False](variables).loss == pytest.approx(np.log(10))


def test_compilation_is_timed_once(split, devices):
    evaluate = Evaluator(PREDICT, split, devices=devices[:1])
    assert evaluate.compile_seconds == 0
    variables = {"params": {"weights": jnp.ones(10)}}
    evaluate(variables)
    seconds = evaluate.compile_seconds
    assert seconds > 0
    evaluate(jax.tree.map(lambda leaf: 2 * leaf, variables))
    assert evaluate.compile_seconds == seconds


def test_empty_data_set_is_refused(split, devices):
    empty = Split(split.images[:0], split.labels[:0])
    with pytest.raises(ValueError, match="no examples to evaluate on; give at least"):
        Evaluator(PREDICT, empty, devices=devices[:1])
