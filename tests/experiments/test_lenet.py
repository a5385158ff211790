import os
import re
import subprocess
import sys

import pytest

from bn_jax import results


def lenet(*arguments, cwd):
    """Run the experiment as a user does, in another folder than the checkout's."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.lenet", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "TFDS_DATA_DIR": str(cwd / "no-tfds-here")},
    )


def test_help_explains_itself_to_a_newcomer(tmp_path):
    shown = lenet("--help", cwd=tmp_path)
    assert "python -m experiments.lenet --workdir=" in shown.stdout
    flags = "norm epochs batch_size learning_rate momentum epsilon seed dataset smoke"
    for flag in [*flags.split(), "data_dir", "idx_dir", "workdir", "load"]:
        assert f"--{flag}:" in shown.stdout or f"--[no]{flag}:" in shown.stdout


def test_smoke_run_trains_reports_and_reads_back(tmp_path):
    ran = lenet("--workdir=run", "--smoke", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert "6,000 + 1,000 images, the sample embedded in bn_jax" in said[0]
    assert said[1].startswith("epoch 1/1  loss ")
    assert "train accuracy" in said[1] and "test accuracy" in said[1]
    assert said[1].endswith("examples/s")
    assert said[2].startswith("norm1 gamma") and len(said[2].split()) == 8
    assert said[3].startswith("norm1 beta") and len(said[3].split()) == 8
    assert "by exact statistics" in said[4]
    assert "written to run: config.json, curves.png" in said[-1]
    assert ran.stderr == ""
    # One epoch of 23 steps on 6,000 images: far from trained, far from chance.
    assert results.read_json(tmp_path / "run/results.json")["train_accuracy"] > 0.3

    read = lenet("--load=run", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    assert "the same numbers as in run/results.json" in read.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --workdir=DIR to train"),
        (["--workdir=a", "--load=b"], "give --workdir=DIR to train"),
        (["--workdir=a", "run"], r"unexpected arguments \['run'\]"),
        (["--workdir=a", "--norm=nrom"], "norm='nrom'; expected one of batch_norm"),
        (["--workdir=a", "--optimizer=lion"], "optimizer='lion'; expected one of sgd"),
        (["--workdir=a", "--dataset=cifar"], "dataset='cifar'; expected one of auto"),
        (["--workdir=a", "--epochs=0"], "epochs=0; expected a number at least 1"),
        (
            ["--workdir=a", "--momentum=2"],
            r"momentum=2.0; expected a number in \[0, 1\]",
        ),
        (["--workdir=a", "--epohcs=3"], "Unknown command line flag 'epohcs'"),
        (
            ["--workdir=a", "--dataset=fashion_mnist", "--idx_dir=nowhere"],
            "nowhere is not a folder; expected a folder with the four IDX files",
        ),
        (["--load=nowhere"], "no config.json in nowhere"),
        (
            ["--workdir=a", "--smoke", "--batch_size=6001"],
            "batch_size=6001 is larger than the training set of 6000 images",
        ),
    ],
)
def test_mistake_ends_in_a_line_that_says_the_mend(tmp_path, arguments, message):
    ran = lenet(*arguments, cwd=tmp_path)
    assert ran.returncode == 1
    assert re.search(message, ran.stderr)
    assert "Traceback" not in ran.stderr
    assert not any(tmp_path.iterdir())
