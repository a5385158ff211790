"""Marks for cases of a test, and what its way of compiling allows."""

import os

import pytest


def rounding_of_plain_code():
    """Return the tolerance for what is the same to the bit in the code that users get.

    The plain code of conftest.py may round another way from program to program.
    """
    return 1e-6 if os.environ.get("XLA_FLAGS") else 0


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
