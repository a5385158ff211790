import pickle
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest

from bn_jax.runs import checkpoint
from bn_jax.runs.checkpoint import Checkpoints
from bn_jax.runs.json_files import RunError
from bn_jax.training.progress import EpochReport, Progress
from bn_jax.training.state import TrainState
from marks import slow_but

# Where one array cannot be read or written, Orbax leaves the others half done, and its
# threads complain of that when they come to them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

IDENTITY = {"norm": "batch_norm", "seed": 0, "data": "tiny, 30 images", "key": [0, 7]}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(optax.cosine_decay_schedule(0.1, 9), momentum=0.9),
    "adam": optax.adam(0.1),
}


def report(epoch, accuracy):
    """Numbers that decimal fractions cannot hold, as those of a run."""
    return EpochReport(epoch, 2 * epoch, 1 / 3, 0.1 + 0.2, 2 / 3, accuracy, 1e-3, 1 / 7)


def progress(step, *, accuracies=(), optimizer="adam", copies=2, size=3):
    """What a run could have become in `step` steps, with an epoch of two."""
    rng = np.random.default_rng(step)

    def numbers(*shape):
        drawn = rng.standard_normal(shape).astype(np.float32)
        # Numbers that a detour through text or another dtype would change.
        drawn.flat[:4] = [-0.0, 1e-45, np.float32(1) / 3, np.finfo(np.float32).max]
        return drawn

    def layer():
        return {"mean": numbers(copies, size), "var": numbers(copies, size) ** 2}

    params = {"dense": {"kernel": numbers(4, size), "bias": numbers(size + 1)}}
    opt_state = OPTIMIZERS[optimizer].init(params)
    with np.errstate(over="ignore"):
        state = TrainState(
            step=np.int32(step),
            params=params,
            batch_stats={"block": {"norm": layer()}, "norm1": layer()},
            opt_state=jax.tree.map(
                lambda leaf: np.asarray(leaf) + np.asarray(step, leaf.dtype), opt_state
            ),
        )
    history = tuple(report(i, a) for i, a in enumerate(accuracies, start=1))
    losses = numbers(max(step, 4))[:step]
    return Progress(state, losses, losses[::-1].copy(), history, seconds=0.1 * step)


LIKE = progress(0).state


def assert_same_bits(a, b):
    chex.assert_trees_all_equal_structs(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@contextmanager
def opened(workdir, identity=IDENTITY):
    checkpoints = Checkpoints(workdir, identity)
    yield checkpoints
    checkpoints.close()


def save(workdir, *several):
    with opened(workdir) as checkpoints:
        for each in several:
            checkpoints.save(each)


def latest(workdir, like=LIKE, identity=IDENTITY):
    with opened(workdir, identity) as checkpoints:
        return checkpoints.latest(like)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_progress_comes_back_from_disk_bit_for_bit(optimizer, tmp_path):
    saved = progress(5, accuracies=(0.1, 0.3), optimizer=optimizer)
    save(tmp_path, saved)
    like = progress(0, optimizer=optimizer).state
    assert_same_bits(latest(tmp_path, like), saved)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_progress_comes_back_from_bytes_bit_for_bit(optimizer):
    sent = progress(5, accuracies=(0.1, 0.3), optimizer=optimizer)
    like = progress(0, optimizer=optimizer).state
    assert_same_bits(checkpoint.from_bytes(checkpoint.to_bytes(sent), like), sent)


def test_model_without_statistics_comes_back(tmp_path):
    state = LIKE.replace(batch_stats={})
    saved = progress(3)._replace(state=state)
    assert_same_bits(checkpoint.from_bytes(checkpoint.to_bytes(saved), state), saved)
    save(tmp_path, saved)
    assert_same_bits(latest(tmp_path, state), saved)


def test_average_of_weights_and_validation_come_back(tmp_path):
    saved = progress(5, accuracies=(0.1, 0.3))
    average = jax.tree.map(lambda leaf: leaf / 3, saved.state.params)
    saved = saved._replace(
        state=saved.state.replace(average=average),
        history=tuple(
            each._replace(validation_loss=1 / 7, validation_accuracy=1 / 9)
            for each in saved.history
        ),
    )
    like = LIKE.replace(average=LIKE.params)
    assert_same_bits(checkpoint.from_bytes(checkpoint.to_bytes(saved), like), saved)
    save(tmp_path, saved)
    assert_same_bits(latest(tmp_path, like), saved)
    with pytest.raises(RunError, match="unknown average/dense/bias"):
        latest(tmp_path, LIKE)


def test_best_is_by_the_validation_set_where_there_is_one(tmp_path):
    # On the test set epochs become worse, on the validation set better until the third.
    validated = (0.2, 0.3, 0.9, 0.8, 0.7, 0.6, 0.5)
    reports = [
        report(epoch, 1 - epoch / 10)._replace(
            validation_loss=0.5, validation_accuracy=accuracy
        )
        for epoch, accuracy in enumerate(validated, start=1)
    ]
    with opened(tmp_path) as checkpoints:
        for epoch in range(1, len(reports) + 1):
            each = progress(2 * epoch)._replace(history=tuple(reports[:epoch]))
            checkpoints.save(each)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps == [6, 10, 12, 14]


def test_nothing_saved_is_no_progress(tmp_path):
    assert latest(tmp_path) is None
    assert checkpoint.from_bytes(checkpoint.to_bytes(None), LIKE) is None


def test_statistics_of_another_number_of_devices_are_read(tmp_path):
    saved = progress(3, copies=4)
    save(tmp_path, saved)
    assert_same_bits(latest(tmp_path), saved)


def test_last_three_and_the_best_are_kept_over_restarts(tmp_path):
    # An epoch is two steps; the second epoch's end is the best, at step 4.
    accuracies = (0.5, 0.9, 0.8, 0.8, 0.85)
    for step in range(1, 11):
        if step != 7:
            save(tmp_path, progress(step, accuracies=accuracies[: step // 2]))
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps == [4, 8, 9, 10]
        checkpoints.save(progress(12, accuracies=(*accuracies, 0.95)))
        assert checkpoints.steps == [9, 10, 12]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "10",
        "12",
        "9",
    ]


def test_checkpoint_of_a_step_is_not_written_twice(tmp_path):
    first = progress(3)
    save(tmp_path, first)
    save(tmp_path, progress(3)._replace(seconds=9.0))
    assert latest(tmp_path).seconds == first.seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "none"}, r"\(norm: 'batch_norm' there, 'none' now\)"),
        (
            {"seed": 1, "key": [0, 8]},
            r"\(key: \[0, 7\] there, \[0, 8\] now; seed: 0 there, 1 now\)",
        ),
        ({"data": "tiny, 31 images"}, r"\(data: 'tiny, 30 images' there, 'tiny, 31"),
    ],
)
def test_checkpoint_of_another_config_or_data_set_is_refused(
    changes, message, tmp_path
):
    save(tmp_path, progress(3))
    with pytest.raises(
        RunError, match=f"/3 is of another run {message}.*another workdir"
    ):
        latest(tmp_path, identity={**IDENTITY, **changes})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"size": 5}, r"params/dense/kernel: float32\[4, 3\] there, float32\[4, 5\]"),
        ({"size": 5}, r"batch_stats/norm1/mean: float32\[3\] there, float32\[5\] now"),
        ({"optimizer": "sgd"}, "unknown opt_state/0/mu/dense/bias"),
        ({"optimizer": "momentum"}, "no opt_state/0/trace/dense/bias"),
    ],
)
def test_checkpoint_of_other_shapes_is_refused(like, message, tmp_path):
    save(tmp_path, progress(3))
    with pytest.raises(RunError, match=f"/3 is of another run .*{message}"):
        latest(tmp_path, progress(0, **like).state)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "byte changed": flip,
    "removed": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("three")
    save(folder, *(progress(step) for step in (2, 4, 6)))
    return folder


@pytest.mark.parametrize(
    "damage", slow_but(["cut", "byte changed", "removed"], DAMAGES)
)
def test_damaged_checkpoint_is_refused_or_gives_the_same_bits(damage, three, tmp_path):
    whole = latest(three)
    files = [path.relative_to(three) for path in three.glob("checkpoints/6/**/*")]
    refused = 0
    for i, file in enumerate(path for path in files if (three / path).is_file()):
        copy = tmp_path / str(i)
        shutil.copytree(three, copy)
        DAMAGES[damage](copy / file)
        try:
            read = latest(copy)
        except RunError as error:
            message = str(error)
            mend = "move it away, and the run resumes from step 4 ("
            assert f"the checkpoint {copy}/checkpoints/6 is damaged: {mend}" in message
            refused += 1
        else:
            assert_same_bits(read, whole)
    assert refused >= 4  # arrays, their manifest and their names, and the JSON file


@pytest.mark.parametrize("part", ["arrays", "run"])
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(part, three, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(three, copy)
    for step, before in ((6, "step 4"), (4, "step 2"), (2, "the beginning")):
        damaged = copy / "checkpoints" / str(step)
        shutil.rmtree(damaged / part)
        with pytest.raises(RunError, match=f"move it away, .* resumes from {before} "):
            latest(copy)
        damaged.rename(damaged.with_suffix(".damaged"))
    assert latest(copy) is None


def test_half_checkpoint_is_ignored_and_its_step_can_be_saved(three, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(three, copy)
    half = copy / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "6", half)
    shutil.rmtree(half / "run")
    assert_same_bits(latest(copy), progress(6))
    save(copy, progress(8))
    assert_same_bits(latest(copy), progress(8))
    assert not half.exists()


# What Python does where it runs what it has read.
EXECUTES = ("pickle.find_class", "exec", "compile", "marshal.loads", "import")


def test_reading_a_checkpoint_executes_nothing(three, monkeypatch):
    latest(three)  # imports what there is to import

    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint was read by pickle")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    heard, listening = [], True

    def hear(event, args):
        if listening and event in EXECUTES:
            heard.append((event, args))

    sys.addaudithook(hear)
    assert_same_bits(latest(three), progress(6))
    listening = False
    assert heard == []


def test_no_file_of_a_checkpoint_is_a_pickle(three):
    files = [path for path in three.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        # A pickle begins with its protocol and ends with a stop.
        content = path.read_bytes()
        assert not (content[:1] == b"\x80" and content[-1:] == b".")
        assert b"numpy._core" not in content and b"cnumpy" not in content


# Runs in a process of its own, as no file of it can grow while the disk is full.
FULL_DISK = """
import resource
import sys
from pathlib import Path

sys.path[:0] = sys.argv[2:]
from test_checkpoint import IDENTITY, Checkpoints, RunError, checkpoint, progress, save

for i, num_bytes in enumerate([0, 100, 2000]):
    folder = Path(sys.argv[1]) / str(i)
    folder.mkdir()
    save(folder, progress(2))
    checkpoints = Checkpoints(folder, IDENTITY)
    variables = {"params": progress(2, size=1000).state.params}
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, -1))
    for write in (
        lambda: (checkpoints.save(progress(4, size=1000)), checkpoints.close()),
        lambda: checkpoint.save_variables(folder, variables),
    ):
        try:
            write()
        except RunError as error:
            print(str(error).replace("\\n", " "))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
"""


@pytest.mark.slow
def test_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    # Orbax may leave threads that wait for folders, for 20 minutes.
    paths = map(str, (tmp_path, *Path(__file__).parents[:2]))
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *paths],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    messages = iter(ran.stdout.splitlines())
    for i in range(3):
        folder = tmp_path / str(i)
        for name in ("checkpoints", "variables"):
            message = next(messages)
            assert message.startswith(f"cannot write {folder}/{name}: what was ")
            assert "written before is kept; make room, " in message
        assert_same_bits(latest(folder), progress(2))
        with pytest.raises(RunError, match="no folder variables"):
            checkpoint.load_variables(folder, {}, {})
        save(folder, progress(4))
        assert_same_bits(latest(folder), progress(4))


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc"):
        with pytest.raises(RunError, match=f"cannot write {folder}/checkpoints: "):
            Checkpoints(Path(folder), IDENTITY)
