"""Figures of results. No other package imports matplotlib."""

from bn_jax import extras

extras.need("train", "matplotlib")

from bn_jax.plots.judged import Judged, claims
from bn_jax.plots.panels import (
    bar_panels,
    bars,
    by_choice,
    distributions,
    estimates,
    growth,
    matrices,
    small_multiples,
)
from bn_jax.plots.runs import (
    arms_by_epoch,
    curves,
    gamma_beta,
    members_by_epoch,
)

__all__ = [
    "Judged",
    "arms_by_epoch",
    "bar_panels",
    "bars",
    "by_choice",
    "claims",
    "curves",
    "distributions",
    "estimates",
    "gamma_beta",
    "growth",
    "matrices",
    "members_by_epoch",
    "small_multiples",
]
