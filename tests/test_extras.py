import pytest

from bn_jax import extras


def test_what_is_missing_is_named_with_its_extra():
    extras.need("flax", "jax", "flax")
    with pytest.raises(ImportError, match="not installed: no_such, nor_this"):
        extras.need("train", "no_such", "jax", "nor_this")
    with pytest.raises(ImportError, match=r"pip install 'bn_jax\[train\]'"):
        extras.need("train", "no_such")
