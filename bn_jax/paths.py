"""Paths as users write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bn_jax.fields import ConfigError


def local(path: str | os.PathLike[str], name: str) -> Path:
    """Return a path on this machine, `~` and `~user` replaced by home folders.

    Args:
      path: as the user wrote it.
      name: of the argument, for messages.

    Raises:
      ConfigError: if it is empty, is an address of a store, holds bytes that are no
        text, or names a user that there is not.
    """
    text = os.fspath(path)
    if not text:
        raise ConfigError(
            f"{name}={text!r} names no folder; give its path, or '.' for this one"
        )
    store = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if store is not None:
        raise ConfigError(
            f"{name}={text!r} is an address of a store; expected a folder of this "
            "machine: mount the store (gs by gcsfuse, s3 by mount-s3), or give a "
            "folder and copy it there afterwards"
        )
    try:
        text.encode()
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name}={text!r} holds bytes that are no UTF-8, which checkpoints cannot "
            "be named by; rename the folder"
        ) from None
    except RuntimeError:
        raise ConfigError(
            f"{name}={text!r}: there is no home folder of {Path(text).parts[0]}; give "
            "the folder by its full path"
        ) from None
