"""Marks for cases of a test."""

import pytest


def slow_but(quick, cases):
    """Cases, all of which but the quick ones run with the slow tests alone.

    A case is a value, or a tuple of the values of several arguments.
    """
    slow = pytest.mark.slow
    return [
        case
        if case in quick
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
        for case in cases
    ]
