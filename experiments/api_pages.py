r"""Build the API pages of bn_jax, from its docstrings.

  pip install -e '.[docs]'
  python -m experiments.api_pages --workdir=runs/api        a minute

Open index.html in --workdir. A warning ends the command, such as one of a docstring
that cannot be read.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Sequence

from absl import app

import bn_jax
from bn_jax.fields import ConfigError
from experiments import launch


def modules() -> list[str]:
    """Return the names of the modules to ask pdoc for, so that it takes in all.

    It takes a package's modules with it, unless the package says what it exports.
    """
    found = [m.name for m in pkgutil.walk_packages(bn_jax.__path__, "bn_jax.")]
    parents = {name: name.rpartition(".")[0] for name in found}
    return [
        "bn_jax",
        *(n for n in found if hasattr(importlib.import_module(parents[n]), "__all__")),
    ]


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    folder = launch.workdir()
    if importlib.util.find_spec("pdoc") is None:
        raise ConfigError("pdoc is not installed; pip install -e '.[docs]'")
    import pdoc

    pdoc.render.configure(docformat="google", math=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of NamedTuples, which pdoc looks up in a module of their own; their types are
        # shown as they are written.
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc.pdoc(*modules(), output_directory=folder)
    pages = len(list(folder.rglob("*.html")))
    print(f"{pages} pages; written to {folder}: index.html")


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(launch.define_workdir_flag))
