"""Every function for users has an example, which pytest runs."""

import importlib
import inspect
from pathlib import Path

import pytest

from bn_jax import variants

# The public functions of these are what `__all__` names,
PACKAGES = ["bn_jax"] + [
    f"bn_jax.{name}" for name in ("convert", "data", "models", "runs")
]
# and of these, the functions without an underscore.
MODULES = [
    f"bn_jax.{name}"
    for name in (
        "folding",
        "linen",
        "measures.adaptation",
        "measures.gap",
        "measures.population",
        "measures.uncertainty",
        "nnx",
        "variables",
    )
] + [
    f"bn_jax.variants.{path.stem}"
    for path in sorted(Path(variants.__file__).parent.glob("[!_]*.py"))
    if path.stem != "whitening_matrices"  # which whitening is made of
]
WITHOUT = {
    # Needs the files that a set's authors publish, or a download.
    "bn_jax.data.prepare",
    # Training asks by it whether to measure; users get the error itself.
    "bn_jax.measures.population.refusal",
    # What the other functions of the module, and other modules, are made of.
    "bn_jax.variables.check_variables",
    "bn_jax.variables.collection",
    "bn_jax.variables.leaves_of",
    "bn_jax.variables.replaced",
}


def public(module):
    """The public functions of a module, by name."""
    named = module.__all__ if module.__name__ in PACKAGES else vars(module)
    found = {name: getattr(module, name) for name in named}
    return {
        f"{module.__name__}.{name}": function
        for name, function in found.items()
        if inspect.isfunction(function) and not name.startswith("_")
        if module.__name__ in PACKAGES or function.__module__ == module.__name__
    }


FUNCTIONS = {
    name: function
    for module in map(importlib.import_module, PACKAGES + MODULES)
    for name, function in public(module).items()
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() | WITHOUT))
def test_a_public_function_has_an_example(name):
    has_example = ">>>" in inspect.getdoc(FUNCTIONS[name])
    assert has_example == (name not in WITHOUT)
