"""Runs what asks for it in both directions."""

import pytest


@pytest.fixture(params=["from", "to"])
def direction(request):
    """Who makes the layer: the other library ("from" there), or bn_jax ("to" there)."""
    return request.param
