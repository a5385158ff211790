"""CIFAR from its archives, in both versions, whole and damaged."""

import dataclasses
import gzip
import http.server
import io
import pickle
import shutil
import struct
import tarfile
import threading

import numpy as np
import pytest

from bn_jax.data import DataError, Split, array_cache, load, prepare, tfds_builder
from bn_jax.data.sources import SPECS

# The superclass of each class, as it is widely published with the set.
COARSE = np.array(
    """
     4  1 14  8  0  6  7  7 18  3  3 14  9 18  7 11  3  9  7 11
     6 11  5 10  7  6 13 15  3 15  0 11  1 10 12 14 16  9 11  5
     5 19  8  8 15 13 14 17 18 10 16  4 17  4  2  0 17  4 18 17
    10  3  2 12 12 16 12  1  9 19  2 10  0  1 16 12  9 13 15 13
    16 19  2  4  6 19  5  5  8 19 18  1  2 15  6  0 17  8 14 13
    """.split(),
    np.uint8,
)


def as_python_2(value):
    """Pickle as Python 2 with numpy 1 did: bytes are its texts."""
    if isinstance(value, dict):
        items = b"".join(as_python_2(part) for pair in value.items() for part in pair)
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(as_python_2, value)) + b"e"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", int(value))
    shape = b"".join(map(as_python_2, value.shape))
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01(" + shape + b"tcnumpy\ndtype\nU\x02u1K\0K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"\x89" + as_python_2(value.tobytes()) + b"tb"
    )


@dataclasses.dataclass
class Small:
    name: str
    version: str  # binary or python
    spec: object
    splits: dict
    files: dict  # content by name
    folder: str
    archive: str

    def pack(self, path, files=None):
        """Write an archive with the files, and some that are not read."""
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            directory = tarfile.TarInfo(self.folder)
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            files = self.files if files is None else files
            # The authors' archives have them in no order.
            for name, content in [("readme.html", b"<p>"), *reversed(files.items())]:
                member = tarfile.TarInfo(f"{self.folder}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    def unpack(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@pytest.fixture(
    params=[
        ("cifar10", "binary"),
        ("cifar10", "python"),
        ("cifar100", "binary"),
        ("cifar100", "python"),
    ],
    ids="-".join,
)
def small(request, shrink):
    name, version = request.param
    return make(shrink, name, version)


@pytest.fixture
def cifar10(shrink):
    return make(shrink, "cifar10", "binary")


@pytest.fixture
def pickled(shrink):
    return make(shrink, "cifar10", "python")


def make(shrink, name, version):
    spec = shrink(name, train=15, test=4)
    rng = np.random.default_rng(0)
    classes = len(spec.class_names)
    splits, files = {}, {}
    is_cifar10 = name == "cifar10"
    for split, count in spec.sizes.items():
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, classes, count).astype(np.int32)
        splits[split] = Split(images, labels)
        planes = images.transpose(0, 3, 1, 2).reshape(count, 3072)
        parts = 5 if is_cifar10 and split == "train" else 1
        step = count // parts
        for i in range(parts):
            rows = slice(i * step, (i + 1) * step)
            suffix = ".bin" if version == "binary" else ""
            file = f"data_batch_{i + 1}" if parts == 5 else f"{split}_batch"
            fine = labels[rows].astype(np.uint8)
            coarse = np.zeros_like(fine) if is_cifar10 else COARSE[fine]
            if version == "binary":
                columns = [fine[:, None], planes[rows]]
                columns = columns if is_cifar10 else [coarse[:, None], *columns]
                content = np.concatenate(columns, axis=1).tobytes()
            else:
                keys = {b"labels": fine} if is_cifar10 else {b"fine_labels": fine}
                keys |= {} if is_cifar10 else {b"coarse_labels": coarse}
                batch = {key: [int(v) for v in value] for key, value in keys.items()}
                batch |= {b"data": planes[rows], b"batch_label": b"batch 1 of 5"}
                content = b"\x80\x02" + as_python_2(batch) + b"."
            files[(file if is_cifar10 else split) + suffix] = content
    number = name.removeprefix("cifar")
    inner = {"binary": "bin", "python": "py"}[version]
    folder = f"cifar-10-batches-{inner}" if is_cifar10 else f"cifar-100-{version}"
    archive = f"cifar-{number}-{version}.tar.gz"
    return Small(name, version, spec, splits, files, folder, archive)


def assert_is(data, small):
    for name in ("train", "test"):
        found, expected = getattr(data, name), small.splits[name]
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)
        assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)
        assert found.images.flags.c_contiguous
        assert not found.images.flags.writeable
        assert not found.labels.flags.writeable


@pytest.mark.parametrize(
    "where", ["archive", "its folder", "unpacked", "unpacked here", "plain tar"]
)
def test_every_place_gives_the_same_arrays(small, tmp_path, where):
    given = tmp_path / "files"
    given.mkdir()
    if where in ("archive", "plain tar"):
        given = small.pack(given / "any name")
    elif where == "its folder":
        small.pack(given / small.archive)
    else:
        small.unpack(given / small.folder if where == "unpacked" else given)
    if where == "plain tar":
        given.write_bytes(gzip.decompress(given.read_bytes()))
    data = load(small.name, data_files=given)
    assert_is(data, small)
    assert (data.name, data.kind) == (small.name, "files")
    assert data.source.startswith(f"{small.spec.title}, 15 + 4 images, CIFAR files in ")
    assert data.num_classes == {"cifar10": 10, "cifar100": 100}[small.name]
    assert data.image_shape == (32, 32, 3)


def test_tfds_reads_what_we_prepare(small, tmp_path):
    archive = small.pack(tmp_path / small.archive)
    prepared = prepare(small.name, data_files=archive)
    archive.unlink()
    assert_is(load(small.name), small)  # from the cached arrays
    shutil.rmtree(prepared / array_cache.FOLDER)
    data = load(small.name)  # from the records
    assert_is(data, small)
    assert data.kind == "tfds"
    builder = tfds_builder.tfds.builder(small.name, data_dir=tmp_path / "tfds")
    skip = {"image": tfds_builder.tfds.decode.SkipDecoding()}
    records = list(builder.as_data_source("test", decoders=skip))
    records.sort(key=lambda record: record["id"])
    assert [r["id"] for r in records] == [b"test_0000%d" % i for i in range(4)]
    labels = small.splits["test"].labels
    np.testing.assert_array_equal([r["label"] for r in records], labels)
    if small.name == "cifar100":
        found = [r["coarse_label"] for r in records]
        np.testing.assert_array_equal(found, COARSE[labels])


def test_classes_of_cifar100_have_their_published_numbers():
    spec = SPECS["cifar100"]
    assert len(set(spec.class_names)) == 100
    # The first and the last of the published list, and those of other spellings.
    published = {0: "apple", 1: "aquarium_fish", 39: "keyboard", 99: "worm"}
    assert {i: spec.class_names[i] for i in published} == published
    superclasses = list(spec.superclasses)
    assert superclasses == sorted(superclasses)
    for label, name in enumerate(spec.class_names):
        assert name in spec.superclasses[superclasses[COARSE[label]]]


def test_binary_version_is_preferred_and_never_mixed(shrink, tmp_path):
    binary = make(shrink, "cifar10", "binary")
    binary.unpack(tmp_path / binary.folder)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"no pickle")
    assert_is(load("cifar10", data_files=tmp_path), binary)
    both = binary.unpack(tmp_path / "both")
    (both / "data_batch_1").write_bytes(b"no pickle")
    assert_is(load("cifar10", data_files=both), binary)
    (both / "test_batch.bin").rename(both / "test_batch")
    assert "lacks test_batch.bin" in error_of("cifar10", both)


def error_of(name, given):
    with pytest.raises(DataError) as caught:
        load(name, data_files=given)
    message = str(caught.value)
    assert str(given) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_missing_files_are_named(cifar10, tmp_path, where):
    (tmp_path / "empty").mkdir()
    message = error_of("cifar10", tmp_path / where)
    assert "cifar-10-binary.tar.gz or cifar-10-python.tar.gz" in message


def test_files_of_the_other_set_are_refused(small, tmp_path):
    other = {"cifar10": "cifar100", "cifar100": "cifar10"}[small.name]
    assert "lacks" in error_of(other, small.pack(tmp_path / "archive"))


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_missing_batch_is_named(small, tmp_path, form):
    name = list(small.files)[-1]
    del small.files[name]
    if form == "archive":
        given = small.pack(tmp_path / small.archive)
    else:
        given = small.unpack(tmp_path / small.folder)
    assert f"lacks {name}, expected the" in error_of(small.name, given)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "end lost", "text"])
def test_damaged_archive_is_named(cifar10, tmp_path, damage):
    path = cifar10.pack(tmp_path / "archive.tar.gz")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "end lost":
        content = content[:-2]
    else:
        content = b"<html>"
    path.write_bytes(content)
    message = error_of("cifar10", path)
    assert "cannot be read" in message
    assert "fetch it again" in message


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + c[:3073]])
def test_binary_file_of_another_length_is_refused(cifar10, tmp_path, change):
    cifar10.files["data_batch_3.bin"] = change(cifar10.files["data_batch_3.bin"])
    message = error_of("cifar10", cifar10.pack(tmp_path / "archive"))
    assert "data_batch_3.bin in" in message
    assert "expected 3 images of 3,073 bytes = 9,219" in message


def test_label_out_of_range_is_refused(cifar10, tmp_path):
    content = cifar10.files["data_batch_2.bin"]
    cifar10.files["data_batch_2.bin"] = b"\x0a" + content[1:]
    message = error_of("cifar10", cifar10.pack(tmp_path / "archive"))
    assert "the label 10 at position 3 of the train labels" in message


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ([1, 2], "holds none as its array 'data'"),
        ({b"labels": [1, 2, 3]}, "holds none as its array 'data'"),
        ({b"data": b"abc", b"labels": [1, 2, 3]}, "holds none as its array 'data'"),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2, 3]},
            r"of shape (2, 3072) as its array 'data', expected bytes of shape (3, 3072",
        ),
        ({b"data": np.zeros((3, 3072), np.uint8)}, "lacks 'labels', expected a list"),
        (
            {b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2]},
            "lacks 'labels', expected a list of 3 integers",
        ),
        (
            {b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2, b"3"]},
            "lacks 'labels', expected a list of 3 integers",
        ),
        (
            {b"data": np.zeros((3, 3072), np.uint8), b"labels": [1, 2, -1]},
            "the label -1 at position 5",
        ),
    ],
)
def test_pickle_of_other_content_is_refused(pickled, tmp_path, batch, problem):
    pickled.files["data_batch_2"] = b"\x80\x02" + as_python_2(batch) + b"."
    assert problem in error_of("cifar10", pickled.pack(tmp_path / "archive"))


def test_pickle_that_runs_code_is_refused_and_not_run(pickled, tmp_path):
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return open, (str(marker), "w")

    pickled.files["data_batch_4"] = pickle.dumps({"data": Malicious()}, 2)
    message = error_of("cifar10", pickled.pack(tmp_path / "archive"))
    assert "data_batch_4 in" in message
    assert "open, which was not called" in message
    assert not marker.exists()


def test_link_in_an_archive_is_not_followed(cifar10, tmp_path):
    path = tmp_path / "archive"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    assert "lacks data_batch_1.bin" in error_of("cifar10", path)


def test_file_that_is_too_large_is_not_unpacked(cifar10, tmp_path):
    path = tmp_path / "archive"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("data_batch_1.bin")
        member.size = 10**8
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(member, zeros)
    assert "data_batch_1.bin of 100,000,000 bytes, exp" in error_of("cifar10", path)


def test_archive_is_downloaded_and_prepared(cifar10, tmp_path, monkeypatch):
    content = cifar10.pack(tmp_path / cifar10.archive).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                self.wfile.write(content)
            except ConnectionError:  # the probe reads no more than the header
                pass

        def log_message(self, *args):
            del args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{cifar10.archive}"
        spec = dataclasses.replace(cifar10.spec, urls={"archive": url})
        monkeypatch.setitem(SPECS, "cifar10", spec)
        data = load("cifar10")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert data.kind == "tfds"
    assert_is(data, cifar10)
    assert_is(load("cifar10"), cifar10)


def test_strict_name_without_data_tells_the_ways(cifar10, tmp_path):
    with pytest.raises(DataError) as caught:
        load("cifar10")
    message = str(caught.value)
    assert str(tmp_path / "tfds" / "cifar10" / "3.0.2") in message
    assert "data_files=FOLDER with the CIFAR files, such as cifar-10-bi" in message
    assert "the embedded sample" not in message
