"""Which source `load` takes, and what it says when there is none."""

import functools
import http.server
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from bn_jax.data import (
    DATASETS,
    DataError,
    check_name,
    idx,
    load,
    prepare,
    sources,
    tfds_builder,
)

NAME = "fashion_mnist"


@pytest.fixture
def serve(tiny):
    """Serve the IDX files over loopback and point the table at them."""
    servers = []
    dropped = set()  # paths whose connection is closed without an answer

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path in dropped:
                self.close_connection = True
            else:
                super().do_GET()

        def log_message(self, *args):
            del args

    def start(*drop):
        dropped.update(drop)
        handler = functools.partial(Handler, directory=tiny.idx_dir)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        tiny.install(urls=idx.urls(f"http://127.0.0.1:{server.server_port}/"))

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_names_are_public():
    assert DATASETS == (
        "auto",
        "fashion_mnist",
        "mnist",
        "kmnist",
        "cifar10",
        "cifar100",
        "svhn_cropped",
        "sample",
        "npz:PATH",
    )


@pytest.mark.parametrize("name", ["cifar", "", "npz", "mnist:"])
@pytest.mark.parametrize("call", [load, prepare, check_name])
def test_unknown_name_lists_the_names(call, name):
    with pytest.raises(DataError) as caught:
        call(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in DATASETS)
    assert "\n" not in str(caught.value)


def test_name_that_is_nearly_right_is_guessed():
    with pytest.raises(DataError, match="Did you mean cifar10?"):
        check_name("CIFAR10".lower().replace("1", "_1"))
    with pytest.raises(DataError, match="Did you mean npz:mine/images.npz?"):
        check_name("mine/images.npz")


@pytest.mark.parametrize("name", [None, 3, Path("a.npz")])
def test_name_that_is_no_text_is_unknown(name):
    with pytest.raises(DataError, match="is unknown; expected one of"):
        load(name)


def test_names_are_checked_without_looking_for_data():
    for name in (*DATASETS, "npz:nowhere.npz", "npz:~/a=1,b:c.npz"):
        check_name(name)


@pytest.mark.parametrize("name", ["auto", "sample", "npz:a.npz"])
def test_only_real_sets_are_prepared(name):
    with pytest.raises(DataError, match=f"dataset '{name}' cannot be prepared"):
        prepare(name)


def test_sample_refuses_data_files(tiny):
    with pytest.raises(DataError, match="'sample' is embedded, but data_files"):
        load("sample", data_files=tiny.idx_dir)


def test_strict_name_without_data_tells_the_three_ways(tiny, caplog, capfd):
    with pytest.raises(DataError) as caught:
        load(NAME)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])
    message = str(caught.value)
    assert "\n" not in message
    assert str(tiny.prepared) in message
    assert tiny.spec.system_folder in message
    assert "Connection refused" in message
    for way in (
        "a machine with internet",
        "apt-get install dataset-fashion-mnist",
        "data_files=FOLDER",
        "the dataset auto or sample",
    ):
        assert way in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_auto_without_data_takes_the_sample_and_says_why(tiny):
    data = load("auto")
    assert (data.name, data.kind) == ("sample", "sample")
    assert len(data.train.labels) == 6_000
    assert "is not at hand" in data.fallback_reason
    assert "Connection refused" in data.fallback_reason
    assert "apt-get" not in data.fallback_reason


@pytest.mark.parametrize("name", ["auto", NAME])
def test_system_folder_is_used_where_nothing_is_prepared(tiny, assert_is_tiny, name):
    tiny.install(system_folder=str(tiny.idx_dir))
    data = load(name)
    assert_is_tiny(data)
    assert (data.name, data.kind, data.fallback_reason) == (NAME, "files", None)
    assert not tiny.data_dir.exists()  # reading IDX files writes nothing


@pytest.mark.parametrize("given", ["idx_dir", "system"])
def test_auto_raises_on_damaged_data_that_is_there(tiny, given):
    tiny.file("test_labels").unlink()
    if given == "system":
        tiny.install(system_folder=str(tiny.idx_dir))
    with pytest.raises(DataError, match="lacks 1 of the 4"):
        load("auto", data_files=tiny.idx_dir if given == "idx_dir" else None)


def test_prepared_set_comes_before_the_system_folder(tiny, assert_is_tiny):
    prepare(NAME, data_files=tiny.idx_dir)
    tiny.install(system_folder=str(tiny.idx_dir))
    data = load("auto")
    assert_is_tiny(data)
    assert data.kind == "tfds"


def test_given_idx_dir_comes_before_a_prepared_set(tiny):
    prepare(NAME, data_files=tiny.idx_dir)
    assert load(NAME, data_files=tiny.idx_dir).kind == "files"
    with pytest.raises(DataError, match="is not a folder"):
        load(NAME, data_files=tiny.idx_dir / "nowhere")


def test_data_dir_argument_comes_before_the_environment(tiny, tmp_path):
    folder = prepare(NAME, data_dir=tmp_path / "other", data_files=tiny.idx_dir)
    assert folder == tmp_path / "other" / NAME / "3.0.1"
    assert not tiny.data_dir.exists()
    assert load(NAME, data_dir=tmp_path / "other").kind == "tfds"


@pytest.mark.parametrize("name", ["auto", NAME])
def test_download_prepares_the_set(tiny, assert_is_tiny, serve, name):
    serve()
    data = load(name)
    assert_is_tiny(data)
    assert data.kind == "tfds"
    assert data.source == f"Fashion-MNIST, 30 + 20 images, TFDS set in {tiny.prepared}"
    shutil.rmtree(tiny.idx_dir)
    assert_is_tiny(load(name))


def test_file_missing_on_the_server_is_one_error(tiny, serve):
    tiny.file("train_images").unlink()
    serve()
    with pytest.raises(DataError, match=r"download from .* failed .*404") as caught:
        load(NAME)
    assert caught.value.__cause__ is None
    assert not tiny.prepared.exists()
    assert load("auto").kind == "sample"


def test_connection_lost_after_the_probe_is_reported_once(
    tiny, serve, monkeypatch, caplog
):
    # TFDS's ten retries take 204 s.
    downloader = tfds_builder.tfds.core.download.downloader
    monkeypatch.setattr(downloader, "MAX_RETRIES", 1)
    serve("/train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"download from .* failed \(ConnectionError"):
        load(NAME)
    assert not [record for record in caplog.records if "urllib3" in record.name]
    assert load("auto").kind == "sample"


def test_damaged_download_is_an_error_even_for_auto(tiny, serve):
    content = tiny.file("train_labels").read_bytes()
    tiny.file("train_labels").write_bytes(content[:-10])
    serve()
    with pytest.raises(DataError, match="truncated or damaged gzip file"):
        load("auto")
    assert not tiny.prepared.exists()


def test_server_that_never_answers_is_given_up(tiny, monkeypatch):
    monkeypatch.setattr(sources, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        tiny.install(urls=idx.urls(f"http://127.0.0.1:{server.getsockname()[1]}/"))
        start = time.monotonic()
        with pytest.raises(DataError, match="no answer within|timed out"):
            load(NAME)
        assert time.monotonic() - start < 5


@pytest.mark.slow
def test_unreachable_download_is_reported_once(run_python):
    result = run_python(
        "from bn_jax.data import DataError\n"
        f"try: load({NAME!r}, data_dir=ROOT)\n"
        "except DataError as error: print(error)\n"
    )
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    assert "Connection refused" in result.stdout
    assert result.stderr == ""


def test_idx_cache_and_sample_load_without_tfds(tiny, run_python):
    prepare(NAME, data_files=tiny.idx_dir)
    result = run_python(
        f"""
assert load({NAME!r}, data_files=IDX).kind == "files"
assert load({NAME!r}, data_dir=ROOT).kind == "tfds"
assert load("sample").kind == "sample"
assert load("auto", data_dir=IDX).kind == "sample"
banned = ("tensorflow_datasets", "scipy.io", "matplotlib", "flax", "absl")
print(sorted(set(banned) & set(sys.modules)))
"""
    )
    assert result.stdout == "[]\n", result.stderr
