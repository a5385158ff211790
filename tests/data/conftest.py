"""A set of 30 + 20 images that stands for Fashion-MNIST in every test here."""

import dataclasses
import gzip
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from bn_jax.data import Split, idx
from bn_jax.data.sources import SPECS
from bn_jax.data.spec import PARTS, DatasetSpec

NAME = "fashion_mnist"
FULL = SPECS[NAME]  # before any test replaces it


@dataclasses.dataclass
class Tiny:
    """The tiny set, its IDX files and its TFDS root."""

    spec: DatasetSpec
    train: Split
    test: Split
    idx_dir: Path
    data_dir: Path
    install: object  # puts a changed spec into the table

    @property
    def prepared(self):
        return self.data_dir / NAME / self.spec.version

    def file(self, part):
        return self.idx_dir / f"{idx.STEMS[part]}.gz"

    def content(self, part):
        """The unzipped bytes of a file."""
        return gzip.decompress(self.file(part).read_bytes())

    def rewrite(self, part, content):
        self.file(part).write_bytes(gzip.compress(content, compresslevel=1))


def as_idx(values):
    """Encode uint8 values of any shape as an IDX file."""
    dims = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes((0, 0, 8, values.ndim)) + dims + values.tobytes()


def make_split(seed, count):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
    return Split(images, rng.integers(0, 10, count).astype(np.int32))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    train, test = make_split(1, 30), make_split(2, 20)
    arrays = dict(zip(PARTS, (*train, *test), strict=True))
    spec = dataclasses.replace(
        FULL,
        sizes={"train": 30, "test": 20},
        crc32={
            part: zlib.crc32(array.astype(np.uint8)) for part, array in arrays.items()
        },
        system_folder=str(tmp_path / "system"),
        urls=idx.urls("http://127.0.0.1:9/"),  # the discard port: refuses at once
    )
    monkeypatch.setitem(SPECS, NAME, spec)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    idx_dir = tmp_path / "idx"
    idx_dir.mkdir()

    def install(**changes):
        monkeypatch.setitem(SPECS, NAME, dataclasses.replace(SPECS[NAME], **changes))

    data = Tiny(spec, train, test, idx_dir, tmp_path / "tfds", install)
    for part, array in arrays.items():
        values = array.astype(np.uint8)
        data.rewrite(part, as_idx(values[..., 0] if values.ndim == 4 else values))
    return data


@pytest.fixture
def shrink(tmp_path, monkeypatch):
    """Give a set of the table other sizes, and no way to a download."""

    def to(name, *, train, test):
        spec = SPECS[name]
        urls = {
            key: f"http://127.0.0.1:9/{url.rpartition('/')[2]}"
            for key, url in spec.urls.items()
        }
        spec = dataclasses.replace(
            spec, sizes={"train": train, "test": test}, urls=urls
        )
        monkeypatch.setitem(SPECS, name, spec)
        return spec

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return to


@pytest.fixture
def assert_is_tiny(tiny):
    """Compare loaded data with the tiny set, values, order and types."""

    def check(data):
        for found, expected in ((data.train, tiny.train), (data.test, tiny.test)):
            np.testing.assert_array_equal(found.images, expected.images)
            np.testing.assert_array_equal(found.labels, expected.labels)
            assert found.images.dtype == np.uint8
            assert found.labels.dtype == np.int32
            assert found.images.flags.c_contiguous
            assert found.labels.flags.c_contiguous

    return check


@pytest.fixture
def run_python(tiny):
    """Run code in a fresh interpreter with the tiny set in its table."""
    setup = f"""
import dataclasses, os, sys
from bn_jax.data import load, prepare
from bn_jax.data.sources import SPECS
SPECS[{NAME!r}] = dataclasses.replace(
    SPECS[{NAME!r}], sizes={tiny.spec.sizes!r}, crc32={tiny.spec.crc32!r},
    system_folder=None, urls={tiny.spec.urls!r})
IDX, ROOT = {str(tiny.idx_dir)!r}, {str(tiny.data_dir)!r}
"""

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", setup + code],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
        )

    return run


@pytest.fixture
def full():
    """The full Fashion-MNIST from Debian's package."""
    folder = Path(FULL.system_folder)
    if not folder.is_dir():
        pytest.skip(f"Debian's dataset-fashion-mnist is not installed in {folder}")
    return idx.read(idx.find(folder, FULL), FULL)
