"""What the documents promise: links that lead somewhere, commands that parse."""

import inspect
import re
import runpy
import shlex
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import app

from bn_jax import models, transforms
from bn_jax.data import sources

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "experiments" / "README.md",
    *sorted((ROOT / "experiments" / "results").rglob("README.md")),
]
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_links_inside_the_repository_lead_somewhere(document):
    text = without_code(document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text()), target


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("norm", transforms.NORMS),
        ("model", models.MODELS),
        ("dataset", sources.SPECS),
    ],
)
def test_readme_names_all_that_a_flag_takes(flag, names):
    text = (ROOT / "README.md").read_text()
    (row,) = re.findall(rf"^\| `--{flag}` \| (.*) \|$", text, re.MULTILINE)
    assert set(names) <= set(re.findall(r"`(\w+)`", row))


def layers_by_library(library):
    """Return objects that have the arguments and arrays of a library as attributes."""
    if library == "Flax":
        from flax import linen

        variables = linen.BatchNorm(False).init(jax.random.key(0), jnp.ones((2, 3)))
        call = parameters(linen.BatchNorm.__call__)
        return [linen.BatchNorm(), types.SimpleNamespace(**flat(variables)), call]
    if library == "PyTorch":
        torch = pytest.importorskip("torch")
        return [torch.nn, torch.nn.BatchNorm2d(3), torch.nn.SyncBatchNorm(3)]
    if library == "Keras":
        keras = pytest.importorskip("keras")
        layer = keras.layers.BatchNormalization()
        layer.build((None, 3))
        return [layer, parameters(layer.call)]
    haiku = pytest.importorskip("haiku")
    apply = haiku.transform_with_state(
        lambda x: haiku.BatchNorm(True, True, 0.9)(x, is_training=True)
    )
    params, state = apply.init(jax.random.key(0), jnp.ones((2, 3)))
    names = {path.split("~/")[-1]: 0 for path in state} | flat(params)
    return [
        types.SimpleNamespace(**names),
        parameters(haiku.BatchNorm.__init__),
        parameters(haiku.BatchNorm.__call__),
    ]


def flat(variables):
    return {name: 0 for group in variables.values() for name in group}


def parameters(function):
    return types.SimpleNamespace(**inspect.signature(function).parameters)


@pytest.mark.parametrize("library", ["Flax", "PyTorch", "Keras", "Haiku"])
def test_names_of_other_libraries_are_theirs(library, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    text = (ROOT / "README.md").read_text().split("## Names in other libraries")[1]
    head, _, *rows = re.findall(r"^\|(.*)\|$", text.split("\n## ")[0], re.MULTILINE)
    column = [cell.strip() for cell in head.split("|")].index(library)
    theirs = layers_by_library(library)
    checked = 0
    for row in rows:
        for name, value in re.findall(
            r"`\.?(\w+)(?:=(\S+?))?(?:\(\))?`", row.split("|")[column]
        ):
            found = [getattr(of, name) for of in theirs if hasattr(of, name)]
            assert found, name
            if re.fullmatch(r"-?[\d.e-]+", value):
                defaults = {getattr(of, "default", of) for of in found}
                assert float(value) in defaults, name
            checked += 1
    assert checked > 8


def commands():
    """Each command of an experiment that a document names, once."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        # In a block, to the end of the line; within a sentence, to the backtick, which
        # may be a line further.
        blocks = re.findall(r"^```sh$(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines()]
        for line in [*lines, *re.findall(r"`([^`]*)`", without_code(text))]:
            for command in re.split(r"&&|;(?=\s)|\s#\s", line):
                words = " ".join(command.split())
                match = re.search(r"python3? -m (experiments\S*)(.*)", words)
                if match:
                    whole = (match[1] + match[2]).rstrip()
                    if whole.count('"') % 2:  # the end of a command within a command
                        whole = whole.rstrip('"')
                    found[whole] = document.name
    return found


@pytest.mark.parametrize("command", commands())
def test_command_of_a_document_has_its_flags(command, in_process, monkeypatch):
    module, *arguments = shlex.split(command)
    arguments = [a for a in arguments if a not in ("...", "&")]
    if module == "experiments":
        assert not [a for a in arguments if a.startswith("-")]
        return
    parsed = []

    def run(main, flags_parser):
        del main
        parsed.append(flags_parser(["program", *arguments]))

    def start():
        monkeypatch.setattr(app, "run", run)
        path = ROOT / (module.replace(".", "/") + ".py")
        runpy.run_path(str(path), run_name="__main__")

    in_process(start)
    assert parsed


def test_commands_are_found_in_blocks_and_in_sentences():
    found = commands()
    assert len(found) > 40
    assert any(c.startswith("experiments.train --workdir=runs/rates") for c in found)
    assert "experiments.bias" in found
