import json
import os
import shutil

import numpy as np
import pytest

from bn_jax.data import DataError, array_cache, load, prepare, tfds_builder
from bn_jax.data.spec import PARTS

NAME = "fashion_mnist"


@pytest.fixture
def cache(tiny):
    """The cache of a set prepared without TFDS's records, which are not read here."""
    tiny.prepared.mkdir(parents=True)
    (tiny.prepared / "dataset_info.json").write_text("{}")
    array_cache.write(tiny.prepared, tiny.train, tiny.test)
    return tiny.prepared / array_cache.FOLDER


def test_arrays_are_memory_mapped(tiny, cache, assert_is_tiny):
    data = load(NAME)
    assert_is_tiny(data)
    assert isinstance(data.train.images, np.memmap)
    assert not data.train.images.flags.writeable
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [*(f"{part}.npy" for part in PARTS), "manifest.json"]
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "flipped", "other"])
def test_damaged_file_is_named_with_the_folder_to_delete(tiny, cache, part, damage):
    path = cache / f"{part}.npy"
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        np.save(path, np.zeros(3))
    with pytest.raises(DataError) as caught:
        load("auto")
    assert f"{path} is damaged" in str(caught.value)
    assert f"Delete the folder {cache};" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "arrays": {}}']
)
def test_damaged_manifest_is_named(tiny, cache, text):
    (cache / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        load(NAME)


def test_arrays_of_another_size_are_refused(tiny, cache):
    tiny.install(sizes={"train": 30, "test": 21})
    with pytest.raises(DataError, match=r"test_images\.npy .* expected \(21, 28"):
        load(NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels.astype(np.int64), "is of int64, expected int32"),
        (lambda labels: labels + 10, "holds the label 1"),
        (lambda labels: labels[::-1].copy(), "the crc32 of the content is"),
    ],
)
def test_labels_that_cannot_be_are_refused(tiny, cache, change, message):
    shutil.rmtree(cache)
    labels = change(tiny.train.labels)
    array_cache.write(tiny.prepared, tiny.train._replace(labels=labels), tiny.test)
    with pytest.raises(DataError, match=message):
        load(NAME)


def test_manifest_records_shapes_and_checksums(cache, tiny):
    manifest = json.loads((cache / "manifest.json").read_text())
    entry = manifest["arrays"]["test_images"]
    assert entry["shape"] == [20, 28, 28, 1]
    assert entry["crc32"] == tiny.spec.crc32["test_images"]


def test_killed_write_leaves_nothing_that_looks_whole(tiny, run_python, assert_is_tiny):
    result = run_python(
        f"""
import numpy as np
save, made = np.save, []
def killed(*args, **kwargs):
    made.append(1)
    if len(made) == 3: os._exit(9)
    save(*args, **kwargs)
np.save = killed
prepare({NAME!r}, data_dir=ROOT, data_files=IDX)
"""
    )
    assert result.returncode == 9, result.stderr
    assert list(tiny.prepared.glob(f"{array_cache.FOLDER}.incomplete-*"))
    assert array_cache.read(tiny.prepared, tiny.spec) is None
    assert_is_tiny(load(NAME))
    assert array_cache.read(tiny.prepared, tiny.spec) is not None


def test_failed_write_cleans_up(tiny, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    tiny.prepared.mkdir(parents=True)
    monkeypatch.setattr(array_cache.np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        array_cache.write(tiny.prepared, tiny.train, tiny.test)
    assert not list(tiny.prepared.iterdir())


def test_set_that_cannot_be_cached_loads_with_one_warning(
    tiny, monkeypatch, assert_is_tiny
):
    tfds_builder.prepare(
        tiny.spec,
        data_dir=tiny.data_dir,
        paths={part: tiny.file(part) for part in PARTS},
    )

    def read_only(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(array_cache, "write", read_only)
    with pytest.warns(UserWarning, match="could not be cached") as caught:
        data = load(NAME)
    assert len(caught) == 1
    assert_is_tiny(data)


def test_second_to_finish_writing_accepts_the_first(tiny, monkeypatch, assert_is_tiny):
    prepare(NAME, data_files=tiny.idx_dir)
    folder = tiny.prepared / array_cache.FOLDER
    rename = os.rename
    rename(folder, tiny.prepared / "first")

    def overtaken(source, target):
        rename(tiny.prepared / "first", folder)  # another process, just before
        rename(source, target)

    monkeypatch.setattr(array_cache.os, "rename", overtaken)
    assert_is_tiny(load(NAME))
    monkeypatch.undo()
    assert sorted(path.name for path in tiny.prepared.glob("bn_jax*")) == [
        array_cache.FOLDER
    ]
