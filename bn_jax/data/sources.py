"""Find, check and load an image set by name.

Which source is taken, and in what order, is decided here; how each is read is in the
file of each set, in `tfds_builder`, `array_cache`, `npz` and `sample`.
"""

import dataclasses
import difflib
import http.client
import os
import threading
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from bn_jax import paths
from bn_jax.data import array_cache, cifar, mnist, npz, sample, svhn
from bn_jax.data.image_data import (
    DataError,
    DataNotFoundError,
    ImageData,
    Kind,
    Split,
)
from bn_jax.data.spec import DatasetSpec

# The table of image sets.
SPECS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        mnist.FASHION_MNIST,
        mnist.MNIST,
        mnist.KMNIST,
        cifar.CIFAR10,
        cifar.CIFAR100,
        svhn.SVHN_CROPPED,
    )
}

# What `load` takes; PATH stands for the path of a file.
DATASETS = ("auto", *SPECS, "sample", f"{npz.PREFIX}PATH")

_SAMPLE_OF = "fashion_mnist"
_PROBE_SECONDS = 5.0


def check_name(name: str) -> None:
    """Refuse a name that `load` does not know, without looking for any data.

    Raises:
        DataError: If it is none of `DATASETS`.

    Examples:
        >>> check_name("fashion_mnits")
        Traceback (most recent call last):
            ...
        bn_jax.data.image_data.DataError: ... Did you mean fashion_mnist?
    """
    is_text = isinstance(name, str)
    if name in ("auto", "sample", *SPECS) or is_text and name.startswith(npz.PREFIX):
        return
    close = difflib.get_close_matches(name, DATASETS, 1) if is_text else []
    hint = f" Did you mean {close[0]}?" if close else ""
    if is_text and name.endswith(".npz"):
        hint = f" Did you mean {npz.PREFIX}{name}?"
    raise DataError(
        f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}.{hint}"
    )


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    data_files: str | os.PathLike[str] | None = None,
) -> ImageData:
    """Load an image set.

    The first of these sources that is there is taken; a damaged one is an error, never
    skipped. All give the same arrays in the same order.

    1. The set's own files in `data_files`. Naming a folder is a choice, so it comes
       before a prepared set, which may be there by chance; and it is strict.
    2. A TFDS set already prepared below `data_dir`, through the arrays cached beside
       it.
    3. For Fashion-MNIST, the IDX files of Debian's package `dataset-fashion-mnist`.
    4. TFDS's download, which TFDS prepares below `data_dir`.

    Args:
        name: One of `DATASETS`. "sample" is the embedded sample of Fashion-MNIST;
            "auto" is "fashion_mnist", or the sample where none of its sources is at
            hand; "npz:PATH" is your own file, see `npz.load`.
        data_dir: TFDS's root folder; by default the environment variable TFDS_DATA_DIR,
            else `~/tensorflow_datasets`.
        data_files: A folder with the files that the set's authors publish: the four IDX
            files of the MNIST family, CIFAR's archive or the folder that it unpacks to,
            the MATLAB files of SVHN. Of CIFAR it may be the archive itself.

    Returns:
        The splits, images uint8 `[N, H, W, C]` and labels int32 `[N]`, and where they
        came from.

    Raises:
        DataError: If the name is unknown, the data is missing or damaged, or
            `data_files` is given for the sample or an npz file.
        ConfigError: If a folder is not a path of this machine.

    Examples:
        >>> from bn_jax import data
        >>> images = data.load("sample")
        >>> images.train.images.shape, images.test.labels[:3].tolist()
        ((6000, 28, 28, 1), [0, 1, 2])
    """
    check_name(name)
    if name == "sample" or name.startswith(npz.PREFIX):
        if data_files is not None:
            where = "is embedded" if name == "sample" else "names its own file"
            raise DataError(
                f"dataset {name!r} {where}, but data_files={os.fspath(data_files)!r} "
                "was given. Leave it out, or name the set that the folder holds."
            )
        return _load_sample(None) if name == "sample" else npz.load(name)
    if name == "auto":
        try:
            return _load_real(SPECS[_SAMPLE_OF], data_dir, data_files)
        except DataNotFoundError as error:
            return _load_sample(error.reason)
    return _load_real(SPECS[name], data_dir, data_files)


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    data_files: str | os.PathLike[str] | None = None,
) -> Path:
    """Prepare a set in TFDS's layout, with the cache of its decoded arrays.

    A set that is already prepared is left as it is, whatever `data_files`.

    Args:
        name: One of `DATASETS` that can be prepared, not "auto", "sample" or an npz
            file.
        data_dir: See `load`.
        data_files: See `load`; by default the files of Debian's package for
            Fashion-MNIST, else TFDS's download.

    Returns:
        The prepared folder, such as `<data_dir>/fashion_mnist/3.0.1`.

    Raises:
        DataError: If the name cannot be prepared, or the data is missing or damaged.
        ConfigError: If a folder is not a path of this machine.
    """
    check_name(name)
    if name not in SPECS:
        raise DataError(
            f"dataset {name!r} cannot be prepared; expected one of {', '.join(SPECS)}."
        )
    spec = SPECS[name]
    prepared = _prepared_folder(spec, data_dir)
    if not _is_prepared(prepared):
        _prepare_records(spec, prepared, _folder(spec, data_files))
    _load_prepared(spec, prepared)
    return prepared


def _load_real(
    spec: DatasetSpec,
    data_dir: str | os.PathLike[str] | None,
    data_files: str | os.PathLike[str] | None,
) -> ImageData:
    prepared = _prepared_folder(spec, data_dir)
    folder = _folder(spec, data_files)
    if folder is not None and (data_files is not None or not _is_prepared(prepared)):
        splits = spec.read(spec.find(folder, spec), spec)
        return _image_data(spec, splits, "files", f"{spec.files} in {folder}")
    if not _is_prepared(prepared):
        _prepare_records(spec, prepared, None)
    splits = _load_prepared(spec, prepared)
    return _image_data(spec, splits, "tfds", f"TFDS set in {prepared}")


def _load_sample(fallback_reason: str | None) -> ImageData:
    data = _image_data(
        SPECS[_SAMPLE_OF], sample.read(), "sample", "the sample embedded in bn_jax"
    )
    return dataclasses.replace(data, name="sample", fallback_reason=fallback_reason)


def _image_data(
    spec: DatasetSpec, splits: tuple[Split, Split], kind: Kind, origin: str
) -> ImageData:
    train, test = splits
    return ImageData(
        name=spec.name,
        train=train,
        test=test,
        class_names=spec.class_names,
        kind=kind,
        source=(
            f"{spec.title}, {len(train.labels):,} + {len(test.labels):,} images, "
            f"{origin}"
        ),
    )


def _prepared_folder(
    spec: DatasetSpec, data_dir: str | os.PathLike[str] | None
) -> Path:
    # The default is TFDS's own, repeated here so that TFDS need not be imported.
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return paths.local(root, "data_dir") / spec.name / spec.version


def _is_prepared(prepared: Path) -> bool:
    # TFDS writes into a sibling folder and renames it at the end, so a folder with this
    # file is whole, and one without it was not left by an interrupted preparation.
    if (prepared / "dataset_info.json").is_file():
        return True
    if prepared.exists():
        raise DataError(
            f"{prepared} holds no dataset_info.json, so it is no prepared TFDS set. "
            "Delete the folder, or give another data_dir."
        )
    return False


def _folder(
    spec: DatasetSpec, data_files: str | os.PathLike[str] | None
) -> Path | None:
    """Return the folder of published files, if one was given or is installed."""
    if data_files is not None:
        return paths.local(data_files, "data_files")
    if spec.system_folder is not None and Path(spec.system_folder).is_dir():
        return Path(spec.system_folder)
    return None


def _prepare_records(spec: DatasetSpec, prepared: Path, folder: Path | None) -> None:
    """Write the TFDS set from the published files in `folder`, or by a download."""
    paths = None
    if folder is not None:
        paths = spec.find(folder, spec)
    elif (failure := _probe(_last_url(spec))) is not None:
        raise _not_found(spec, prepared, failure)
    from bn_jax.data import tfds_builder

    try:
        tfds_builder.prepare(spec, data_dir=prepared.parents[1], paths=paths)
    except tfds_builder.DownloadError as error:
        raise _not_found(spec, prepared, str(error)) from None


def _load_prepared(spec: DatasetSpec, prepared: Path) -> tuple[Split, Split]:
    splits = array_cache.read(prepared, spec)
    if splits is not None:
        return splits
    from bn_jax.data import tfds_builder

    splits = tfds_builder.read(prepared, spec)
    try:
        array_cache.write(prepared, *splits)
    except OSError as error:
        warnings.warn(
            f"the arrays of {prepared} could not be cached beside it ({error}); each "
            "load will decode the records again.",
            stacklevel=3,
        )
    return splits


def _last_url(spec: DatasetSpec) -> str:
    return list(spec.urls.values())[-1]


def _not_found(spec: DatasetSpec, prepared: Path, failure: str) -> DataNotFoundError:
    looked = [f"no TFDS set in {prepared}"]
    ways = [
        f"run once on a machine with internet, so that TFDS downloads it, and copy "
        f"{prepared.parents[1]}"
    ]
    if spec.system_folder is not None:
        looked.append(f"no {spec.files} in {spec.system_folder}")
        ways.append(f"apt-get install {spec.system_package}")
    address, _, example = _last_url(spec).rpartition("/")
    ways.append(f"data_files=FOLDER with the {spec.files}, such as {example}")
    mend = f"To get the data: {'; or '.join(ways)}."
    if spec.name == _SAMPLE_OF:
        mend += (
            " Or train on the embedded sample of 6,000 + 1,000 images with "
            "the dataset auto or sample."
        )
    return DataNotFoundError(
        f"{spec.title} is not at hand: {', '.join(looked)}, and the download "
        f"from {address} failed ({failure}).",
        mend,
    )


def _probe(url: str) -> str | None:
    """Return why `url` cannot be reached, or None if it can.

    Without a network, TFDS's download retries for 204 s (ten times each with a doubling
    pause; measured with TFDS 4.9.10), and a firewall that drops packets would hold it
    for longer, so it is started only where one quick request succeeds.
    """
    outcome = [f"no answer within {_PROBE_SECONDS:g} s"]

    def request() -> None:
        try:
            with urllib.request.urlopen(url, timeout=_PROBE_SECONDS):
                outcome[0] = ""
        except urllib.error.HTTPError as error:
            outcome[0] = f"HTTP status {error.code}"
            error.close()
        except (OSError, http.client.HTTPException) as error:
            outcome[0] = str(getattr(error, "reason", error))

    # The timeout of a socket covers neither the look-up of the name nor all addresses
    # together; a daemon thread can be left behind.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return outcome[0] or None
