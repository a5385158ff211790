"""The command `experiments.train`, in this process: models, norms and data by name."""

import dataclasses
import functools
import os
import re
import signal
import traceback
from pathlib import Path

import numpy as np
import pytest
from absl import app

from bn_jax import data, moments, runs
from bn_jax.runs import json_files, results
from bn_jax.training.config import TrainConfig
from bn_jax.training.sweep import Sweep
from experiments import launch, train


@pytest.fixture
def command(in_process):
    """Runs the command in a folder of its own; returns what it printed.

    Raises SystemExit with the line of an error. How this ends a process is in
    test_lenet.py.
    """
    return functools.partial(
        in_process,
        lambda: app.run(
            train.main, flags_parser=launch.flags_parser(train.define_flags)
        ),
    )


def test_of_many_numbers_the_first_are_printed():
    assert launch.numbers([0.5, -1.25]) == "  0.500  -1.250"
    words = launch.numbers([1.0] * 40).split()
    assert words == ["1.000"] * 16 + ["...", "of", "40"]


def colour_images(num_examples, seed):
    """Images of 8 x 8 pixels, whose class is their brightest channel."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_examples) % 3
    images = rng.integers(0, 100, (num_examples, 8, 8, 3), dtype=np.uint8)
    images[np.arange(num_examples), ..., labels] += 100
    return images, labels


@pytest.fixture
def images(tmp_path):
    """Writes images.npz into the folder of the command, with other arrays if given."""

    def images(**arrays):
        train_images, train_labels = colour_images(90, 0)
        test_images, test_labels = colour_images(30, 1)
        default = {
            "train_images": train_images,
            "train_labels": train_labels,
            "test_images": test_images,
            "test_labels": test_labels,
        }
        np.savez(tmp_path / "images.npz", **{**default, **arrays})

    return images


OWN_IMAGES = ("--dataset=npz:images.npz", "--devices=1", "--batch_size=20")
MLP = ("--model=mlp:activation=relu,widths=8x8", "--learning_rate=0.1")


@pytest.mark.slow
def test_mlp_on_the_sample_is_trained_and_evaluated_again(command):
    said = command(
        "--workdir=run",
        *("--dataset=sample", "--train_examples=600", "--batch_size=100"),
        *("--epochs=1", "--devices=1", "--norm=layer", *MLP),
    )
    assert re.search(r"^epoch 1/1  loss .* test accuracy", said, re.MULTILINE)
    config = json_files.read_json(Path("run/config.json"))
    assert config["model"] == "mlp:widths=8x8,activation=relu"
    assert "the same numbers as in run/results.json" in command("--load=run")


@pytest.mark.slow
def test_own_colour_images_with_validation_and_averaged_weights(command, images):
    images()
    said = command(
        "--workdir=run",
        *(*OWN_IMAGES, *MLP, "--epochs=4", "--validation=30"),
        *("--inputs=standardised", "--average_weights=0.5"),
    )
    lines = re.findall(r"^epoch \d/4 .*validation accuracy ([\d.]+)", said, re.M)
    found = json_files.read_json(Path("run/results.json"))
    rows = results.read_metrics(Path("run"))
    validated = [row["validation_accuracy"] for row in rows]
    assert lines == [f"{accuracy:.3f}" for accuracy in validated]
    assert found["validation_accuracy"] == validated[-1]
    assert found["validation_loss"] == rows[-1]["validation_loss"]
    assert f"validation accuracy {validated[-1]:.3f}, test accuracy" in said
    assert validated[-1] > 0.6  # of three classes
    assert found["task"]["image_shape"] == [8, 8, 3]
    assert found["class_names"] == ["0", "1", "2"]
    assert (
        f"average of the weights: test accuracy {found['test_accuracy_averaged']:.3f}"
        in said
    )
    best = max(range(4), key=lambda i: (validated[i], i))
    assert found["best_epoch"] == best + 1
    assert found["best_validation_accuracy"] == validated[best]
    assert found["best_test_accuracy"] == rows[best]["test_accuracy"]
    assert f"best on the validation set: epoch {best + 1}, validation" in said

    run = runs.load("run")
    last, average = run.variables["params"], run.average
    assert average["dense1"]["kernel"].shape == last["dense1"]["kernel"].shape
    assert not np.array_equal(average["dense1"]["kernel"], last["dense1"]["kernel"])
    again = command("--load=run")
    for name in ("test_accuracy_exact", "test_loss_averaged", "best_test_loss"):
        assert f"{name:22s} {found[name]:.6f}" in again
    assert "the same numbers as in run/results.json" in again
    assert re.search("^best on .*set: epoch.*$", said, re.M)[0] in again


@pytest.mark.slow
def test_run_on_a_file_that_has_moved_is_evaluated_on_it(command, images, tmp_path):
    images()
    command("--workdir=run", *OWN_IMAGES, *MLP, "--epochs=1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images.npz").rename(tmp_path / "elsewhere" / "images.npz")
    with pytest.raises(SystemExit, match="images.npz does not exist.*npz:PATH"):
        command("--load=run")
    with pytest.raises(SystemExit, match="--dataset=sample with --load of a run on np"):
        command("--load=run", "--dataset=sample")
    said = command("--load=run", "--dataset=npz:elsewhere/images.npz")
    assert "note: the run was on 90 + 30 images, npz file images.npz, crc32" in said
    assert "the same numbers as in run/results.json" in said
    images(test_labels=np.roll(colour_images(30, 1)[1], 1))
    with pytest.raises(SystemExit, match="numbers differ from those that the run wr"):
        command("--load=run")


@pytest.mark.slow
def test_run_that_was_given_its_data_is_evaluated_on_those_that_a_flag_names(
    command, tiny_data, tmp_path
):
    """The config of such a run says auto, whatever data Python gave it."""
    config = TrainConfig(
        model="mlp:widths=8", epochs=1, train_examples=150, batch_size=50
    )
    sample = data.load("sample")
    runs.train(config, sample, workdir=tmp_path / "run")
    assert "the same numbers as in" in command("--load=run", "--dataset=sample")
    other = dataclasses.replace(tiny_data, source="others")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "load_data", lambda name: other)
        with pytest.raises(
            SystemExit, match="numbers differ .* the data, others, .* from"
        ):
            command("--load=run")


@pytest.mark.slow
def test_sweeps_that_are_given_one_by_one_are_combined(command):
    said = command(
        *("--workdir=run", "--smoke", "--devices=1", "--model=mlp:widths=8"),
        *("--train_examples=600", "--sweep=learning_rate=0.1,0.3", "--sweep=seed=0..2"),
    )
    assert "6 members of the sweep" in said
    assert len(json_files.read_rows(Path("run/runs.jsonl"))) == 6


@pytest.mark.slow
def test_best_member_by_validation_is_told(command, images):
    images()
    arguments = ("--epochs=1", "--validation=30", "--sweep=learning_rate=0.1,0.1234567")
    said = command("--workdir=run", *OWN_IMAGES, MLP[0], *arguments)
    found = json_files.read_json(Path("run/results.json"))
    label, accuracy = found["best_by_validation"], found["best_validation_accuracy"]
    members = re.findall("^learning_rate .*", said, re.M)
    assert len({line.index("  loss ") for line in members}) == 1
    best = f"best on the validation set: {label}, accuracy {accuracy:.3f}\n"
    assert best in said
    assert best in command("--load=run")


@pytest.mark.slow
def test_losses_that_overflow_in_prediction_are_null_and_the_run_ends(command):
    options = ("--smoke", "--devices=1", "--model=mlp:widths=8x8")
    said = command("--workdir=run", "--learning_rate=1e30", *options)
    assert "written to run" in said
    assert json_files.read_json(Path("run/results.json"))["test_loss_exact"] is None
    assert "the same numbers as in run/results.json" in command("--load=run")


SECOND_FAILS = "model.norm_layers=11,1"  # of two members that share a program


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=lenett"],
            r"model='lenett'; expected one of .* \(did you mean lenet",
        ),
        (["--norm=grup"], r"norm='grup'; expected one of .* \(did you mean group\?\)"),
        (["--optimizer=sdg"], r"optimizer='sdg'; .* \(did you mean sgd\?\)"),
        (
            ["--dataset=cifar1O"],
            "dataset 'cifar1O' is unknown; .* Did you mean cifar10",
        ),
        (
            ["--norm=batch_norm:momentum=2"],
            r"momentum=2; expected a number in \[0, 1\]",
        ),
        (["--norm=group:num_groups=two"], "num_groups=two; expected an integer"),
        (["--norm=layer:momentum=0.9"], "no option 'momentum'"),
        (
            ["--norm=layer", "--norm_statistics=moving"],
            "norm_statistics='moving' with norm='layer', which keeps no moving stat",
        ),
        (["--norm=group:num_groups=3"], "num_groups=3 does not .* 8 .* layer norm1;"),
        (["--epochs=ten"], "--epochs=ten; expected an integer$"),
        (["--learning_rate=fast"], "--learning_rate=fast; expected a number$"),
        (
            ["--learning_rate=0.1,1"],
            "--learning_rate=0.1,1; expected a number: several values are a sweep, "
            "--sweep=learning_rate=0.1,1$",
        ),
        (
            ["--seed=0..2"],
            "--seed=0..2; expected an integer: .* --sweep=seed=0..2$",
        ),
        (["--resume=maybe"], "--resume=maybe; expected true or false$"),
        (["--lr=0.1"], "--lr is no flag; did you mean --learning_rate. --help lists"),
        (
            ["--activation=relu"],
            "is no flag; did you mean --model=lenet:activation=VALUE. --help",
        ),
        (
            ["--momentum=0.9"],
            "mean --norm=batch_norm:momentum=VALUE or --optimizer=sgd:momentum=VALUE. ",
        ),
        (["--dropout=0.5"], "did you mean --model=lenet:dropout_rate=VALUE. --help"),
        (
            ["--optimizer=sgd,momentum=0.9"],
            r"one of sgd, .* \(options follow a colon: sgd:momentum=0.9\)$",
        ),
        (
            ["--seed=7", "--sweep=weight_decay=0.1,0.2;seed=0..1"],
            "--seed=7 together with --sweep=seed=0..1; give one of them$",
        ),
        (["--decay=all"], "--decay=all without --weight_decay; give it, too$"),
        (["--init_statistics=fresh"], "--init_statistics=fresh without --init_from; g"),
        (["--merged_stats=first"], "--merged_stats=first without --batch_stats; give"),
        (
            ["--sweep=seed=0..1;accumulate_stats=each,once"],
            "--sweep=accumulate_stats=each,once without --accumulate; give it, too",
        ),
        (
            ["--norm=layer", "--accumulate=2", "--accumulate_stats=once"],
            "accumulate_stats='once' with a model that keeps no moving statistics; le",
        ),
        (
            ["--norm=layer", "--devices=2", "--batch_stats=per_device"],
            "batch_stats='per_device' with a model that keeps no moving statistics",
        ),
        (
            ["--batch_stats=per_device"],
            "per_device on one device, .*; give --devices=N",
        ),
        (
            ["--sweep=batch_stats=synced,per_device"],
            "batch_stats='per_device' in a sweep, whose members train on one device",
        ),
        (["--norm.momentum=0.5"], "is no flag; options .* --norm=NAME:momentum=VALUE"),
        (["nonsense"], "unexpected 'nonsense'; flags begin with --"),
        (
            ["--model=mlp:widths=64x"],
            "widths=64x; expected values with x between, each",
        ),
        (["--model=mlp:widths=64x0"], "widths=64x0; expected .*an integer at least 1"),
        (["--model=lenet"], "LeNet does not fit images of 8 x 8 x 3: .*give larger im"),
        (
            ["--augment=crop_and_flip:size=17"],
            "size=17' of .* expected a size of at mo",
        ),
        (["--accumulate=3"], "accumulate=3 does not divide batch_size=20; give a div"),
        (["--batch_size=91"], "batch_size=91 is larger than the training set of 90"),
        (["--validation=90"], "validation=90"),
        (["--sweep=norm=layer|grup"], r"did you mean group\?.* \(in a sweep of norm\)"),
        (["--sweep=model=mlp|lenet"], r"--model=\S+ together with --sweep=model=mlp"),
        (["--sweep=norm.axis=1,2"], "has no option 'axis'"),
        (
            ["--model=mlp:widths=8x8,bias_before_norm=true", f"--sweep={SECOND_FAILS}"],
            "norm_layers has 1 digit; expected 2",
        ),
    ],
)
def test_what_does_not_fit_ends_in_a_line_and_leaves_no_folder(
    arguments, message, command, images, tmp_path
):
    images()
    with pytest.raises(SystemExit) as ended:
        command("--workdir=run", *OWN_IMAGES, *MLP, *arguments)
    assert re.match(f"error: .*{message}", ended.value.code)
    assert "\n" not in ended.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "images.npz does not exist, expected an npz file"),
        (
            {"train_labels": np.array([0, None] * 45)},
            "pickled objects, which are not r",
        ),
        ({"test_images": np.zeros((30, 8, 8, 3))}, "dtype float64, expected uint8"),
        (
            {"train_labels": np.array(["cat", "dog", "eel"] * 30)},
            "of dtype <U3, expected .*names, numbers = numpy.unique.labels, return_inv",
        ),
    ],
)
def test_file_that_cannot_be_read_ends_in_a_line_and_leaves_no_folder(
    arrays, message, command, images, tmp_path
):
    if arrays is not None:
        images(**arrays)
    with pytest.raises(SystemExit) as ended:
        command("--workdir=run", *OWN_IMAGES, *MLP)
    assert re.match(f"error: .*{message}", ended.value.code)
    assert "\n" not in ended.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir=DIR to train"),
        (["--workdir=a", "--load=b"], "both are given; give --workdir=DIR to train"),
        (["--load=nowhere"], "load='nowhere' does not exist; expected the folder of"),
        (["--load=a", "--norm=none"], "so leave out --norm"),
        (
            ["--load=a", "--sweep=seed=1", "--smoke", "--devices=2", "--noresume"],
            "so leave out --devices, --resume, --smoke, --sweep",
        ),
        (["--workdir="], "workdir='' names no folder; give its path, or '.' for this"),
        (["--workdir=gs://bucket/a"], "workdir='gs://bucket/a' is an address of a st"),
        (["--workdir=~nobody-here/a"], "there is no home folder of ~nobody-here; give"),
        (["--workdir=a\udcff"], r"workdir='a.udcff' holds bytes that are no UTF-8"),
        (
            ["--workdir=a", "--num_processes=2", "--process_id=1"],
            "--num_processes=2 and --process_id=1 without --coordinator_address; give",
        ),
        (
            ["--workdir=a", "--nodistributed", "--coordinator_address=host:1234"],
            "--nodistributed with --coordinator_address=host:1234; leave out one",
        ),
        (["--workdir=a", "--parallel=pmpa"], r"one of pmap, jit \(did you mean pmap"),
        (["--workdir=a", "--sweep=seed=5..1"], "5..1 holds no integer; .*: 1..5"),
        (
            ["--workdir=a", "--sweep=learning_rate=1,0.1,1.0"],
            "members 1 and 3 are the same, learning_rate=1.0; give each value once",
        ),
        (
            ["--workdir=a", "--sweep=seed=0..100000000"],
            "100,000,001 members or more; expected at most 100,000",
        ),
        (
            ["--workdir=a", "--sweep=sed=1,2"],
            r"'sed' is no field \(did you mean seed\?\)",
        ),
        (
            ["--workdir=a", "--smoke", "--model=lenet:first_padding=100000"],
            "LeNet needs an array of .* GB for 32 images of 28 x 28 x 1; expected at",
        ),
        (
            ["--workdir=a", "--smoke", "--model=mlp:widths=100000000"],
            "MLP needs an array of .* twice the memory: give a smaller model",
        ),
        (["--workdir=a", "--epochs=0"], "epochs=0; expected a number at least 1"),
        (["--workdir=a", "--optimizer=lamp"], "optimizer='lamp'; expected one of sgd"),
        (
            ["--workdir=a", "--dataset=cifar"],
            "dataset 'cifar' is unknown; .*one of auto",
        ),
        (
            ["--workdir=a", "--dataset=fashion_mnist", "--data_files=nowhere"],
            "nowhere is not a folder; expected a folder with the four IDX files",
        ),
        (["--workdir=a", "--smoke", "--devices=0"], "devices='0'; expected all, or a"),
        (["--workdir=a", "--smoke", "--checkpoint_every=5"], "such as 1epoch, 2epochs"),
        (["--workdir=a", "--seed=4294967296"], r"a number from 0 to 2\*\*32 - 1"),
        (
            ["--workdir=a", "--smoke", "--devices=3"],
            "batch_size=256 does not divide over 3 devices; give a multiple of 3",
        ),
        (
            ["--workdir=/dev/null/a", "--smoke", *MLP],
            "cannot write to the working directory /dev/null/a: .*another workdir",
        ),
        (
            ["--workdir=a", "--smoke", "--batch_size=6001"],
            "batch_size=6001 is larger than the training set of 6,000 images",
        ),
    ],
)
def test_mistake_ends_in_a_line_that_says_the_mend(
    arguments, message, command, tmp_path
):
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    assert re.match(f"error: .*{message}", ended.value.code)
    assert "\n" not in ended.value.code
    assert not any(tmp_path.iterdir())


NORMS = ("batch_norm", "group:num_groups=4")
SWEEP = f"--sweep=norm={'|'.join(NORMS)};seed=0..1"


@pytest.mark.slow
def test_sweep_of_two_programs_is_resumed_and_not_repeated(
    command, images, monkeypatch
):
    images()
    arguments = (*OWN_IMAGES, *MLP, "--epochs=3", "--checkpoint_every=2steps", SWEEP)
    said = command("--workdir=whole", *arguments)
    printed = re.findall(r"^norm (\S+) +seed (\d)", said, re.MULTILINE)
    assert printed == [(norm, seed) for norm in NORMS for seed in "01"]
    rows = json_files.read_rows(Path("whole/runs.jsonl"))
    assert [(r["config"]["norm"], str(r["config"]["seed"])) for r in rows] == printed
    folders = sorted(path.name for path in Path("whole").glob("program*"))
    assert folders == ["program1", "program2"]

    finished = []  # norm, first and last step of each program that came to its end
    train_all = Sweep.train
    is_first = True

    def train_noted(sweep):
        first = sweep.step
        for epoch in train_all(sweep):
            if is_first and finished and sweep.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield epoch
        finished.append((sweep.configs[0].norm, first, sweep.step))

    monkeypatch.setattr(Sweep, "train", train_noted)
    with pytest.raises(SystemExit) as ended:
        command("--workdir=run", *arguments)
    assert ended.value.code == 128 + signal.SIGTERM
    assert finished == [(NORMS[0], 0, 12)]
    is_first = False
    said = command("--workdir=run", *arguments)
    assert finished[1:] == [(NORMS[0], 12, 12), (NORMS[1], 6, 12)]
    assert "resuming from step 6 of 12" in said
    assert json_files.read_rows(Path("run/runs.jsonl")) == rows
    again = command("--load=run")
    assert re.search("the same numbers (as in run/runs.jsonl|but for rounding)", again)
    assert f"member 4 of 4: seed=1, norm={NORMS[1]}" in again
    assert again.count("(the run wrote ") == 2 * 4 + 2 * 2  # exact ones of batch norm
    command("--workdir=run", *arguments)
    assert len(finished) == 3


def test_seven_files_lie_from_the_command_to_the_mean(command, monkeypatch):
    folders = [Path(module.__file__).parents[1] for module in (launch, runs)]
    measured, roads = moments.moments_over, set()

    def moments_over(*arguments):
        paths = [Path(frame.filename) for frame in traceback.extract_stack()]
        ours = (
            path.relative_to(folder).as_posix()
            for path in paths
            for folder in folders
            if path.is_relative_to(folder)
        )
        names = [n for n in ours if n.startswith(("bn_jax/", "experiments/"))]
        roads.add(tuple(dict.fromkeys(names)))
        return measured(*arguments)

    monkeypatch.setattr(moments, "moments_over", moments_over)
    command(
        *("--workdir=run", "--dataset=sample", "--epochs=1", "--devices=1"),
        "--train_examples=256",
    )
    assert (
        "experiments/train.py",
        "bn_jax/runs/run.py",
        "bn_jax/training/loop.py",
        "bn_jax/models/lenet.py",
        "bn_jax/linen.py",
        "bn_jax/functional.py",  # which calls the seventh, moments.py
    ) in roads
