"""The learning rates at which a choice trains to a bar, with batch norm and without.

Runs are known by their norm, one of `NORMS`, and their rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from experiments import intervals
from experiments.estimate import Statistic
from experiments.intervals import LEVEL, Interval
from experiments.scores import Row, Runs

NORMS = ("batch_norm", "none")


def rates_of(runs: Runs) -> list[float]:
    """Return the rates that were tried, in order of size."""
    return sorted({rate for _, rate in runs})


class Bar(NamedTuple):
    """What a run has to reach for its rate to be workable."""

    key: str
    words: str
    reached: Callable[[Row], bool]


def workable(runs: Runs, norm: str, bar: Bar) -> list[list[float]]:
    """Return by seed the rates at which a run reaches a bar, in order of size."""
    rates = rates_of(runs)
    reached = [[bar.reached(row) for row in runs[norm, rate]] for rate in rates]
    return [
        [rate for rate, works in zip(rates, of_seed, strict=True) if works]
        for of_seed in zip(*reached, strict=True)
    ]


def largest_rates(runs: Runs, bar: Bar) -> list[float]:
    """Return by seed log10 of the largest workable rate with norm to that without.

    It is infinite where no rate works without norm, or the largest that was tried works
    with it: the ratio is then at least as large as any that is claimed.
    """
    found = []
    for with_norm, without in zip(
        *(workable(runs, norm, bar) for norm in NORMS), strict=True
    ):
        if not with_norm:
            found.append(-math.inf if without else 0.0)
        elif not without or with_norm[-1] == rates_of(runs)[-1]:
            found.append(math.inf)
        else:
            found.append(math.log10(with_norm[-1] / without[-1]))
    return found


def widths(runs: Runs, norm: str, bar: Bar) -> list[float]:
    """Return by seed the decades between the least and the largest workable rate."""
    return [
        math.log10(rates[-1] / rates[0]) if rates else 0.0
        for rates in workable(runs, norm, bar)
    ]


def ratio(bar: Bar) -> Statistic:
    """Return the median over seeds of `largest_rates`."""
    return lambda runs, *, level=LEVEL: intervals.of_median(
        largest_rates(runs, bar), level=level
    )


def wider(bar: Bar) -> Statistic:
    """Return by how many decades the band is wider with norm, by signed ranks."""

    def statistic(runs: Runs, *, level: float = LEVEL) -> Interval:
        with_norm, without = (widths(runs, norm, bar) for norm in NORMS)
        return intervals.by_ranks(
            [a - b for a, b in zip(with_norm, without, strict=True)], level=level
        )

    return statistic
