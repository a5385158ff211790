"""What to install where a package is missing that the core does not need."""

from __future__ import annotations

from importlib import util


def need(extra: str, *modules: str) -> None:
    """Refuse to go on without modules, which an extra of ours brings.

    Raises:
      ImportError: naming those that are missing, and what to install.
    """
    missing = [name for name in modules if util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"not installed: {', '.join(missing)}. The core of bn_jax does without; "
            f"for this part pip install 'bn_jax[{extra}]', or in a checkout "
            f"pip install -e '.[{extra}]'"
        )
