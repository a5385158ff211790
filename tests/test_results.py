import json

import jax
import pytest

from bn_jax import results
from bn_jax.results import RunError

CONFIG = {"norm": "batch_norm", "epochs": 3}


def test_start_writes_config_and_environment(tmp_path):
    workdir = results.start_run(tmp_path / "new" / "folder", CONFIG)
    assert results.read_json(workdir / "config.json") == CONFIG
    environment = results.read_json(workdir / "environment.json")
    assert environment["jax"] == jax.__version__
    assert (environment["backend"], environment["device_count"]) == ("cpu", 8)


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="thesis.tex but no config.json.*new folder"):
        results.start_run(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the working directory"):
        results.start_run(tmp_path / "file" / "run", CONFIG)


def test_number_that_json_cannot_hold_leaves_the_old_file_whole(tmp_path):
    results.write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}
    assert len(list(tmp_path.iterdir())) == 1


def test_metrics_come_back_in_order(tmp_path):
    for epoch in (1, 2):
        results.append_metrics(tmp_path, {"epoch": epoch})
    assert results.read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
