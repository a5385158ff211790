import dataclasses

import chex
import jax
import numpy as np
import pytest

from bn_jax.measures import population
from bn_jax.training import scoring, task
from bn_jax.training.config import TrainConfig
from bn_jax.training.scoring import MAX_LAYERWISE_CALLS, Score
from bn_jax.training.task import Task
from small_runs import swept, trained

IMAGES = np.random.default_rng(0).integers(0, 256, (1200, 2, 2, 1), dtype=np.uint8)
TASK = Task(image_shape=(2, 2, 1), num_classes=10)


def network_of(num_norms):
    """An MLP of so many norms, and its initial variables."""
    config = TrainConfig(model=f"mlp:widths={'x'.join(['4'] * num_norms)}")
    network = task.make_network(config, TASK)
    return network, network.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("num_norms", "mode"),
    [(MAX_LAYERWISE_CALLS, "layerwise"), (MAX_LAYERWISE_CALLS + 1, "one_pass")],
)
def test_many_layers_are_measured_in_one_pass(num_norms, mode):
    assert scoring.exact_mode(*network_of(num_norms), IMAGES[:1]) == mode


@pytest.mark.slow
def test_statistics_in_one_pass_do_not_depend_on_the_devices(devices):
    network, variables = network_of(3)
    one, two = (
        jax.device_get(
            scoring.exact_statistics(
                network, variables, IMAGES, devices=devices[:n], mode="one_pass"
            )
        )
        for n in (1, 2)
    )
    chex.assert_trees_all_close(two, one, rtol=1e-4)
    # Batches of another size give others, so that this says something.
    larger = population.exact_statistics(
        network.predict, variables, IMAGES, batch_size=1000, mode="one_pass"
    )
    difference = np.subtract(larger["norm3"]["var"], one["norm3"]["var"])
    assert np.abs(difference / one["norm3"]["var"]).max() > 1e-3


@pytest.mark.slow
def test_deep_networks_are_scored_in_one_pass_alone_and_in_a_sweep(
    tiny_config, tiny_data, monkeypatch
):
    monkeypatch.setattr(scoring, "MAX_LAYERWISE_CALLS", 1)
    config = dataclasses.replace(tiny_config, epochs=1)
    alone = trained(config, tiny_data).score().to_row()
    assert alone["exact_mode"] == "one_pass"
    (row,) = swept([config], tiny_data).rows()
    assert row["exact_mode"] == "one_pass"
    for name in ("test_loss_exact", "test_accuracy_exact"):
        assert row[name] == pytest.approx(alone[name], rel=1e-4)


def test_row_of_a_score_says_what_is_not_as_usual():
    usual = {
        "test_loss": 0.5,
        "test_accuracy": 0.8,
        "test_loss_exact": None,
        "test_accuracy_exact": None,
    }
    assert Score(**usual).to_row() == usual
    more = {"exact_refused": "an NNX module", "test_loss_averaged": 0.4}
    assert Score(**usual, **more).to_row() == {**usual, **more}
