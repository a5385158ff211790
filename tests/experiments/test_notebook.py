"""The notebook: paired with its text, without outputs, and running, each cell twice."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOK = FOLDER / "batch_norm.ipynb"


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_is_that_of_its_text():
    text = jupytext.read(NOTEBOOK.with_suffix(".py"))
    notebook = jupytext.read(NOTEBOOK)
    command = "jupytext --sync experiments/notebooks/batch_norm.py"
    assert cells(notebook) == cells(text), f"they differ; {command}"


def test_notebook_is_committed_without_outputs():
    for cell in jupytext.read(NOTEBOOK).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_where_it_is_missing_bn_jax_is_installed_with_what_training_needs(monkeypatch):
    first = next(c for c in jupytext.read(NOTEBOOK).cells if c.cell_type == "code")
    install, found, _ = first.source.partition("# For a try")
    assert found
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda run, check: commands.append(run))
    exec(install, {})
    (command,) = commands
    requirement = Requirement(command[-1])
    assert (requirement.name, requirement.extras) == ("bn_jax", {"train"})


def test_each_figure_of_the_notebook_is_its_own():
    # Other functions of pyplot draw into the last figure, which a script keeps open.
    text = NOTEBOOK.with_suffix(".py").read_text()
    assert set(re.findall(r"\bplt\.(\w+)", text)) == {"subplots", "show"}


@pytest.mark.slow
def test_notebook_runs_and_each_cell_can_be_run_twice(monkeypatch):
    monkeypatch.setenv("BN_JAX_EPOCHS", "1")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = jupytext.read(NOTEBOOK)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
    )
    said = []
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            for _ in range(2):
                client.execute_cell(cell, i)  # raises what the cell raises
            said += [
                output.get("text", "")
                for output in cell.outputs
                if output.output_type == "stream" and output.name == "stdout"
            ]
    said = "".join(said)
    assert "8 x cpu" in said
    assert "8 devices: " in said
    assert "epoch 1: loss" in said
