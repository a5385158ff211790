import os
import subprocess
import sys

import pytest

from bn_jax import extras


def test_what_is_missing_is_named_with_its_extra():
    extras.need("flax", "jax", "flax")
    with pytest.raises(ImportError, match="not installed: no_such, nor_this"):
        extras.need("train", "no_such", "jax", "nor_this")
    with pytest.raises(ImportError, match=r"pip install 'bn_jax\[train\]'"):
        extras.need("train", "no_such")


def test_scripts_beside_a_checkout_import_what_is_installed(tmp_path):
    # A folder without __init__.py, as a checkout is, is a namespace package to Python.
    (tmp_path / "bn_jax" / "bn_jax").mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text("import bn_jax; print(bn_jax.__file__)")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == extras.__file__.replace("extras.py", "__init__.py")
