"""The TFDS layout: round trip, damage, interruption, and TFDS's own view of it."""

import json

import numpy as np
import pytest

from bn_jax.data import DataError, array_cache, load, prepare, tfds_builder
from bn_jax.data.sources import SPECS

NAME = "fashion_mnist"
tfds = tfds_builder.tfds


def remove_cache(tiny):
    for path in (tiny.prepared / array_cache.FOLDER).iterdir():
        path.unlink()
    (tiny.prepared / array_cache.FOLDER).rmdir()


def test_round_trip_keeps_values_and_order(tiny, assert_is_tiny):
    assert prepare(NAME, data_files=tiny.idx_dir) == tiny.prepared
    assert_is_tiny(load(NAME))  # from the cache
    remove_cache(tiny)
    assert_is_tiny(load(NAME))  # from the records, which TFDS shuffled
    assert_is_tiny(load(NAME))


def test_fresh_process_reads_the_records(tiny, run_python, assert_is_tiny):
    # TFDS loads its modules on demand: one that preparing needs may be absent here.
    prepare(NAME, data_files=tiny.idx_dir)
    remove_cache(tiny)
    result = run_python(f"print(load({NAME!r}, data_dir=ROOT).kind)")
    assert (result.stdout, result.stderr) == ("tfds\n", "")
    assert_is_tiny(load(NAME))  # checked against the cache that it wrote


def test_prepared_set_is_left_as_it_is(tiny, monkeypatch):
    prepare(NAME, data_files=tiny.idx_dir)
    before = {
        path: path.stat().st_mtime_ns for path in sorted(tiny.prepared.rglob("*"))
    }
    monkeypatch.delattr(tfds_builder, "prepare")
    prepare(NAME, data_files=tiny.idx_dir / "nowhere")
    assert before == {
        path: path.stat().st_mtime_ns for path in sorted(tiny.prepared.rglob("*"))
    }


def test_tfds_lists_and_reads_what_we_prepared(tiny):
    prepare(NAME, data_files=tiny.idx_dir)
    (reference,) = tfds.core.utils.file_utils.list_datasets_in_data_dir(tiny.data_dir)
    assert (reference.dataset_name, reference.version) == (NAME, "3.0.1")
    # Its own builder of this name, with its own features.
    builder = tfds.builder(NAME, data_dir=tiny.data_dir)
    assert builder.info.features["image"].shape == (28, 28, 1)
    assert builder.info.features["label"].names == list(tiny.spec.class_names)
    assert builder.info.supervised_keys == ("image", "label")
    source = builder.as_data_source(
        "test", decoders={"image": tfds.decode.SkipDecoding()}
    )
    assert len(source) == 20
    labels = [record["label"] for record in source]
    assert sorted(labels) == sorted(tiny.test.labels)


@pytest.mark.parametrize("name", SPECS)
def test_table_agrees_with_tfds(name, tmp_path):
    spec = SPECS[name]
    builder = tfds.builder(name, data_dir=tmp_path)
    ours = tfds_builder.SpecBuilder(spec, data_dir=tmp_path).info.features
    theirs = builder.info.features
    assert str(builder.version) == spec.version
    assert set(ours) == set(theirs)
    assert theirs["image"].shape == spec.image_shape
    for key in {"label", "coarse_label"} & set(theirs):
        assert ours[key].num_classes == theirs[key].num_classes
    if spec.id_digits is None:  # the others have their names in the archive
        assert tuple(theirs["label"].names) == spec.class_names
    known = {**tfds.core.download.checksums.get_all_url_infos(), **builder.url_infos}
    assert set(spec.urls.values()) <= set(known)


@pytest.mark.parametrize("num_shards", [1, 3])  # of a large set
def test_order_is_that_of_tfds_for_its_own_keys(tmp_path, num_shards):
    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"key": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": ((i, {"key": i}) for i in range(50))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Toy(data_dir=tmp_path)
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(num_shards=num_shards),
    )
    assert builder.info.splits["train"].num_shards == num_shards
    stored = [record["key"] for record in builder.as_data_source("train")]
    assert stored == tfds_builder._stored_order("train", 50)
    assert stored != list(range(50))


def edit_info(tiny, change):
    path = tiny.prepared / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def error_after_preparing(tiny, damage):
    """Prepare, drop the cache, damage, and return what load says."""
    prepare(NAME, data_files=tiny.idx_dir)
    remove_cache(tiny)
    damage()
    with pytest.raises(DataError) as caught:
        load("auto")
    assert str(tiny.prepared) in str(caught.value)
    return str(caught.value)


def test_tfrecord_is_refused_with_the_mend(tiny):
    def damage():
        edit_info(tiny, lambda info: info.update(fileFormat="tfrecord"))

    message = error_after_preparing(tiny, damage)
    assert "was prepared as tfrecord, which needs TensorFlow" in message
    assert "another data_dir" in message
    assert "as data_files" in message


def test_other_number_of_examples_is_refused(tiny):
    def damage():
        tiny.install(sizes={"train": 31, "test": 20})

    message = error_after_preparing(tiny, damage)
    assert "'train': 30" in message
    assert "'train': 31" in message


def test_other_content_is_refused(tiny):
    def damage():
        tiny.install(crc32=dict(tiny.spec.crc32, test_images=1))

    message = error_after_preparing(tiny, damage)
    assert "does not hold Fashion-MNIST's test images" in message


@pytest.mark.parametrize("damage", ["absent", "truncated", "flipped"])
def test_damaged_records_are_named(tiny, damage):
    def apply():
        (path,) = tiny.prepared.glob("*train.array_record*")
        content = path.read_bytes()
        if damage == "absent":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])

    message = error_after_preparing(tiny, apply)
    assert "damaged records of the train split" in message


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_unreadable_metadata_is_named(tiny, file):
    message = error_after_preparing(
        tiny, lambda: (tiny.prepared / file).write_text("{")
    )
    assert "is not a TFDS set" in message


def test_folder_without_metadata_is_refused(tiny):
    tiny.prepared.mkdir(parents=True)
    for call in (load, prepare):
        with pytest.raises(DataError, match=r"no dataset_info\.json"):
            call(NAME)


def test_data_dir_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be prepared in .*file") as caught:
        prepare(NAME, data_dir=tmp_path / "file", data_files=tiny.idx_dir)
    assert "another data_dir" in str(caught.value)


def test_killed_preparation_leaves_nothing_that_looks_whole(
    tiny, run_python, assert_is_tiny
):
    result = run_python(
        f"""
from bn_jax.data import tfds_builder
as_png, made = tfds_builder._as_png, []
def killed(image):
    made.append(1)
    if len(made) == 40: os._exit(9)  # within the second split
    return as_png(image)
tfds_builder._as_png = killed
prepare({NAME!r}, data_dir=ROOT, data_files=IDX)
"""
    )
    assert result.returncode == 9, result.stderr
    assert list(tiny.data_dir.rglob("*incomplete*"))
    assert not tiny.prepared.exists()
    assert load("auto").kind == "sample"
    prepare(NAME, data_files=tiny.idx_dir)
    assert_is_tiny(load(NAME))


def test_second_to_finish_preparing_accepts_the_first(
    tiny, monkeypatch, assert_is_tiny
):
    as_png, calls = tfds_builder._as_png, []

    def overtaken(image):
        if not calls:
            calls.append(1)
            prepare(NAME, data_files=tiny.idx_dir)  # another process, from start to end
        return as_png(image)

    monkeypatch.setattr(tfds_builder, "_as_png", overtaken)
    prepare(NAME, data_files=tiny.idx_dir)
    assert_is_tiny(load(NAME))
    assert not list(tiny.data_dir.rglob("*incomplete*"))
