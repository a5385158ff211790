"""Figures of results. No other package imports matplotlib.

Each function writes one image of 150 dots an inch, in the format that the ending of its
path names. In writing it raises what Matplotlib and the system do: ValueError where
there is no such format, OSError where the path cannot be written.
"""

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
