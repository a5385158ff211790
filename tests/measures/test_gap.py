import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bn_jax.linen import BatchNorm
from bn_jax.measures.gap import gap


def predict(model, variables, x):
    return model.apply(variables, x, train=False)


class Classifier(nn.Module):
    """Logits that are the standardised inputs themselves."""

    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, name="norm")(x)


def test_gap_tells_how_far_statistics_are_and_what_they_cost():
    x = jnp.array([[0.0, 2.0], [4.0, 6.0], [0.0, 2.0], [4.0, 6.0]])
    model = Classifier()
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), x
    )
    # Running mean 0 and variance 1; exact mean (2, 4), variance 4: gaps 4 / 2, log 4.
    # Each batch of two holds both rows, so its own statistics are the exact ones.
    report = gap(
        functools.partial(predict, model),
        variables,
        x,
        jnp.array([0, 1, 0, 0]),
        measure_on=x,
        batch_size=2,
    )
    assert report.running["norm"] == pytest.approx((2.0, np.log(4.0)), rel=1e-5)
    assert report.training["norm"] == pytest.approx((0.0, 0.0), abs=1e-5)
    # Exact: both logits of a row are equal, -1 or 1: loss log 2, label 0 wins the tie.
    assert report.loss["exact"] == pytest.approx(np.log(2), rel=1e-5)
    assert report.loss["training"] == pytest.approx(np.log(2), rel=1e-5)
    # Running: logits (0, 2) and (4, 6), so label 1 is 2 ahead.
    behind, ahead = np.log(1 + np.exp(2)), np.log(1 + np.exp(-2))
    assert report.loss["running"] == pytest.approx((3 * behind + ahead) / 4, rel=1e-4)
    assert report.accuracy["running"] == pytest.approx(0.25)


def test_gap_in_training_is_the_mean_over_batches_even_of_a_constant_feature():
    x = jnp.array([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0]])
    model = Classifier()
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), x
    )
    report = gap(
        functools.partial(predict, model),
        variables,
        x,
        jnp.zeros(3, int),
        measure_on=x,
        batch_size=2,
    )
    # Feature 0: exact mean 2, variance 8/3. Batch (0, 2): mean 1, variance 1; batch
    # (4): mean 4, variance 0, to which epsilon = 1e-5 is added.
    deviation = np.sqrt(8 / 3)
    mean = (1 / deviation + 2 / deviation) / 2
    log_var = (np.log(8 / 3) + np.log((8 / 3) / 1e-5)) / 2
    assert report.training["norm"] == pytest.approx((mean, log_var), rel=1e-4)
    # Feature 1 is 7 throughout: running mean 0 and variance 1 are 7 / sqrt(1e-5) off.
    running = (7 / np.sqrt(1e-5), np.log(1 / 1e-5))
    assert report.running["norm"] == pytest.approx(running, rel=1e-4)


@pytest.mark.parametrize("labels", [jnp.zeros(2, int), jnp.zeros((3, 1), int)])
def test_gap_refuses_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="labels have shape .* for 3 inputs"):
        gap(
            lambda variables, x: x,
            {},
            jnp.ones((3, 2)),
            labels,
            measure_on=jnp.ones((3, 2)),
            batch_size=2,
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 0], "labels are from 0 to 2, but the model has 2 classes; expected"),
        ([0, -1, 1, 0], "labels are from -1 to 1, .*from 0 to 1"),
        ([0.0, 1.0, 1.0, 0.0], "labels have dtype float32; expected integers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    """Out of range they would take the loss of another class, or NaN."""
    x, model = jnp.ones((4, 2)), Classifier()
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), x
    )
    with pytest.raises(ValueError, match=message):
        gap(model, variables, x, labels, measure_on=x, batch_size=2)


def test_model_that_returns_more_than_logits_is_refused():
    x = jnp.ones((4, 2))
    variables = Classifier().init(jax.random.key(0), x, train=False)

    def logits_and_more(variables, x):
        return predict(Classifier(), variables, x), x

    with pytest.raises(ValueError, match="gives a tuple; expected logits, .* alone"):
        gap(
            logits_and_more,
            variables,
            x,
            jnp.zeros(4, int),
            measure_on=x,
            batch_size=2,
        )


def test_outputs_that_are_no_logits_are_refused():
    x, model = jnp.ones((4, 3, 2)), Classifier()
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), x
    )
    with pytest.raises(ValueError, match=r"outputs of shape \[4, 3, 2\]; .*logits"):
        gap(model, variables, x, [0, 1, 0, 1], measure_on=x, batch_size=4)
    with pytest.raises(ValueError, match="inputs are a list; expected an array"):
        gap(model, variables, [x], [0, 1, 0, 1], measure_on=x, batch_size=4)


def test_table_of_a_model_without_batch_statistics_says_why_its_rows_are_equal():
    model, x = nn.GroupNorm(1), jnp.array([[0.0, 1.0], [2.0, 5.0]])
    report = gap(
        model, model.init(jax.random.key(0), x), x, [0, 1], measure_on=x, batch_size=2
    )
    assert len(set(report.loss.values())) == 1
    assert str(report).endswith(
        "no layer has batch statistics, so that all are the same"
    )
