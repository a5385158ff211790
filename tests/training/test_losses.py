import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.training.losses import losses

LOGITS = np.float32([[2, -1, 0.5], [0, 0, 0], [-30, 5, 60]])
LABELS = np.array([0, 2, 1], np.int32)


def test_without_smoothing_they_are_those_of_optax():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_array_equal(losses(LOGITS, LABELS), expected)
    assert expected[1] == pytest.approx(np.log(3))


def test_smoothing_moves_its_share_to_all_classes():
    targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), 0.1)
    expected = optax.softmax_cross_entropy(LOGITS, targets)
    smooth = jax.jit(lambda s: losses(LOGITS, LABELS, label_smoothing=s))
    np.testing.assert_allclose(smooth(0.1), expected, rtol=1e-5)  # a traced share
    np.testing.assert_allclose(smooth(0.0), losses(LOGITS, LABELS), rtol=1e-6)
    # By hand at equal logits: log 3, whatever the share.
    np.testing.assert_allclose(
        losses(LOGITS, LABELS, label_smoothing=0.5)[1], np.log(3), rtol=1e-6
    )


def test_few_bits_are_computed_with_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)  # exact in these
    for smoothing in (0.0, 0.1):
        found = losses(logits, LABELS, label_smoothing=smoothing)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(
            found, losses(LOGITS, LABELS, label_smoothing=smoothing)
        )
