import dataclasses

import numpy as np

from bn_jax.training import members
from bn_jax.training.config import TrainConfig

# A layer without norm has a bias in any case, so that all members have the same.
MODEL = "mlp:widths=8x8x8,bias_before_norm=true"


def test_layers_without_digits_are_all_switched_on():
    base = dataclasses.replace(TrainConfig(), model=MODEL)
    for spec, expected in (
        ("model.norm_layers=none,101", [[True, True, True], [True, False, True]]),
        ("model.norm_layers=011,none", [[False, True, True], [True, True, True]]),
    ):
        configs = members.parse(spec, base)
        assert len(members.grouped(configs)) == 1
        found = members.stack_values(configs)["model.norm_layers"]
        np.testing.assert_array_equal(found, expected)
