"""A byte of a run's folder that has changed changes no number in silence."""

import shutil

import chex
import numpy as np
import pytest

from bn_jax.fields import ConfigError
from bn_jax.runs import checkpoint, json_files
from bn_jax.runs import run as run_lib
from bn_jax.runs.json_files import RunError
from bn_jax.training import loop
from bn_jax.training.config import RunOptions
from marks import slow_but

# Where one array cannot be read, Orbax's threads complain when they come to them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

OPTIONS = RunOptions(devices="1", checkpoint_every="5steps")
# By kind: patterns of files, relative to the folder.
KINDS = {
    "arrays": ("checkpoints/10/arrays/**/d/*", "variables/**/d/*"),
    "metadata": (
        "checkpoints/10/*",
        "checkpoints/10/arrays/*",
        "checkpoints/10/arrays/array_metadatas/*",
        "checkpoints/10/arrays/ocdbt*/*",
        "variables/*",
        "variables/array_metadatas/*",
        "variables/ocdbt*/*",
    ),
    "JSON": ("*.json", "*.jsonl", "checkpoints/10/run/*"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, tiny_data):
    folder = tmp_path_factory.mktemp("flipped") / "run"
    run_lib.train(tiny_config, tiny_data, workdir=folder, options=OPTIONS)
    return folder


def numbers(folder, like, identity):
    """All numbers that are read of a run: by `load`, and by one that resumes."""
    run = run_lib.load(folder)
    checkpoints = checkpoint.Checkpoints(folder, identity)
    try:
        progress = checkpoints.latest(like)
    finally:
        checkpoints.close()
    of_run = (run.variables, run.metrics, run.results, run.config.to_dict())
    return of_run, progress


@pytest.mark.parametrize(
    ("kind", "count"),
    slow_but(
        [("arrays", 3), ("metadata", 3), ("JSON", 3)],
        [
            *((kind, 3) for kind in KINDS),
            ("arrays", 100),
            ("metadata", 50),
            ("JSON", 50),
        ],
    ),
)
def test_flip_is_refused_or_changes_no_number(
    kind, count, folder, tiny_config, tiny_data, tmp_path
):
    like = loop.Trainer(tiny_config, tiny_data).progress().state
    saved = json_files.read_json(next(folder.glob("checkpoints/10/run/metadata")))
    identity = saved["identity"]
    expected = numbers(folder, like, identity)
    found = {path for p in KINDS[kind] for path in folder.glob(p) if path.is_file()}
    files = sorted(path.relative_to(folder) for path in found)
    assert len(files) >= 2
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(count):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        path = copy / files[rng.integers(len(files))]
        content = bytearray(path.read_bytes())
        if content:
            content[rng.integers(len(content))] ^= rng.integers(1, 256)
        path.write_bytes(content)
        try:
            got = numbers(copy, like, identity)
        except (RunError, ConfigError) as error:
            assert str(copy) in str(error), error
            refused += 1
        else:
            chex.assert_trees_all_equal(got, expected)
        shutil.rmtree(copy)
    print(f"{kind}: {refused} of {count} refused")
    assert refused or count == 3  # a few may all be of bytes that nothing reads


def test_changed_array_is_named_with_the_mend(folder, tmp_path, tiny_config, tiny_data):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    known = json_files.read_json(copy / "checksums.json")
    known["arrays"]["variables"]["params/norm1/scale"] += 1
    json_files.write_json(copy / "checksums.json", known)
    with pytest.raises(
        RunError,
        match="variables are damaged: params/norm1/scale hold other numbers than "
        "were written; restore it from a copy, or train again in another folder",
    ):
        run_lib.load(copy)
