import json
import subprocess
import sys

import jax
import pytest

from bn_jax.runs import json_files, provenance, results, workdirs
from bn_jax.runs.json_files import RunError

CONFIG = {"norm": "batch_norm", "epochs": 3}


def start(workdir, config=CONFIG, **options):
    with workdirs.held(workdir, config, **options):
        results.start_run(workdir, config)
    return workdir


def test_start_writes_config_and_environment(tmp_path):
    workdir = start(tmp_path / "new" / "folder")
    assert json_files.read_json(workdir / "config.json") == CONFIG
    environment = json_files.read_json(workdir / "environment.json")
    assert environment["jax"] == jax.__version__
    assert (environment["backend"], environment["device_count"]) == ("cpu", 8)
    assert all(name.isupper() for name in environment["cpu_instructions"])  # X86_V3


def test_processor_with_no_more_than_numpy_was_compiled_for_has_no_instructions(
    monkeypatch,
):
    for config in ({"SIMD Extensions": {"baseline": ["NEON"]}}, {}):
        monkeypatch.setattr("numpy.show_config", lambda mode, config=config: config)
        assert provenance.environment()["cpu_instructions"] == []


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="thesis.tex but no config.json.*new workdir"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("there", "now", "message"),
    [
        ({**CONFIG, "exact": True}, CONFIG, "holds a sweep, and this is a run"),
        (CONFIG, {**CONFIG, "exact": True}, "holds a run, and this is a sweep"),
        ({"experiment": "bias"}, CONFIG, "holds the experiment bias, and this is a"),
        (
            {**CONFIG, "exact": True, "part": [2, 3]},
            {**CONFIG, "exact": True},
            "holds part 2 of 3 of a sweep, and this is a sweep; give another workdir",
        ),
    ],
)
def test_folder_of_another_kind_of_run_is_refused(there, now, message, tmp_path):
    start(tmp_path, there)
    with pytest.raises(RunError, match=message):
        start(tmp_path, now)
    assert json_files.read_json(tmp_path / "config.json") == there


def test_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(
        RunError, match="cannot write to .*notes: Not a directory; make"
    ):
        start(tmp_path / "notes")


def test_unfinished_run_of_the_same_config_is_gone_on_with(tmp_path):
    start(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    start(tmp_path)
    assert results.read_metrics(tmp_path) == [{"epoch": 1}]
    with pytest.raises(
        RunError, match="unfinished run of this config; give resume=True"
    ):
        start(tmp_path, resume=False)


def test_run_of_another_config_is_refused_and_the_differences_named(tmp_path):
    start(tmp_path)
    message = r"\(epochs: 3 there, 5 now; lr: None there, 0.1 now\)"
    with pytest.raises(RunError, match=f"holds a run of another config {message}"):
        start(tmp_path, {**CONFIG, "epochs": 5, "lr": 0.1})
    assert json_files.read_json(tmp_path / "config.json") == CONFIG


def test_finished_run_is_refused_unless_it_may_be_repeated(tmp_path):
    start(tmp_path)
    json_files.write_json(tmp_path / "results.json", {"loss": 1.0})
    with pytest.raises(RunError, match="finished run of this config; read it with --l"):
        start(tmp_path)
    start(tmp_path, repeat=True)
    assert json_files.read_json(tmp_path / "results.json") == {"loss": 1.0}


def test_start_that_was_killed_before_the_config_was_whole_is_begun_anew(tmp_path):
    (tmp_path / "config.json.unfinished").write_text('{"norm": ')
    start(tmp_path)
    assert json_files.read_json(tmp_path / "config.json") == CONFIG


DAMAGED = {
    "empty": b"",
    "cut": b'{"norm": ',
    "list": b"[1, 2]",
    "null": b"null",
    "no text": b'{"norm": "\xff"}',
    "deep": b"[" * 100_000,
    "digits": b'{"seed": ' + b"1" * 5000 + b"}",
    "no number": b'{"loss": NaN}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_config_is_named_and_left_alone(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        RunError, match="config.json is damaged: it .*holds? .*; restore it from a copy"
    ):
        start(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == content


def test_folder_in_the_place_of_a_file_is_named(tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).mkdir()
    with pytest.raises(RunError, match="cannot read .*/config.json: Is a directory"):
        start(tmp_path)
    with pytest.raises(RunError, match="cannot read .*/metrics.jsonl: Is a directory"):
        results.read_metrics(tmp_path)


def test_row_that_is_no_object_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n[2]\n')
    with pytest.raises(RunError, match="metrics.jsonl is damaged: line 2 holds no JS"):
        results.read_metrics(tmp_path)


def test_link_to_a_folder_is_refused_and_left_alone(tmp_path):
    start(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "run" / "checkpoints"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=f"{link} is a link to another folder, .*put th"):
        start(tmp_path / "run")
    assert link.is_symlink()


def test_links_are_replaced_and_never_followed(tmp_path):
    outside = tmp_path / "thesis.tex"
    outside.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("a.json", "a.json.unfinished", "metrics.jsonl", "metrics.jsonl.unfinished")
    for name in names:
        (folder / name).symlink_to(outside)
    json_files.write_json(folder / "a.json", {"loss": 1.0})
    results.append_metrics(folder, {"epoch": 1})
    results.write_metrics(folder, results.read_metrics(folder))
    assert outside.read_text() == "precious"
    assert json_files.read_json(folder / "a.json") == {"loss": 1.0}
    assert results.read_metrics(folder) == [{"epoch": 1}]
    assert not [path for path in folder.iterdir() if path.is_symlink()]


@pytest.mark.parametrize("parent", ["file", "/proc"])
def test_folder_that_cannot_be_made_is_refused(tmp_path, parent):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / parent / "run"  # an absolute parent replaces tmp_path
    message = f"cannot write to the working directory {workdir}: .*writable, or give"
    with pytest.raises(RunError, match=message), workdirs.locked(workdir):
        pass


# Holds a folder; then no file that it writes can grow, as if the disk were full.
OTHER = """
import resource, sys, time
from pathlib import Path
from bn_jax.runs import json_files, results, workdirs
held, folder = map(Path, sys.argv[1:])
with workdirs.locked(held):
    print("held", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, -1))
    for write in (
        lambda: json_files.write_json(folder / "a.json", {"loss": [2.0] * 100}),
        lambda: results.append_metrics(folder, {"epoch": 2, "loss": [2.0] * 100}),
    ):
        try:
            write()
        except json_files.RunError as error:
            print(error, flush=True)
    print("written", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another process, the folder that it holds, one that it wrote to, what it said."""
    held, folder = (tmp_path_factory.mktemp(name) for name in ("held", "full"))
    json_files.write_json(folder / "a.json", {"loss": 1.0})
    command = [sys.executable, "-c", OTHER, str(held), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = list(iter(lambda: process.stdout.readline().rstrip("\n"), "written"))
        yield process, held, folder, said
        process.kill()


def test_folder_is_held_against_other_processes_until_this_one_ends(other):
    process, held, _, said = other
    assert said[0] == "held"
    with pytest.raises(
        RunError, match=f"another process is at work in {held}; wait for it, or give"
    ):
        start(held)
    assert [path.name for path in held.iterdir()] == [".lock"]
    process.kill()
    process.wait()
    start(held)


def test_full_disk_is_named_and_files_are_left_whole(other):
    _, _, folder, (_, *messages) = other
    for name, message in zip(("a.json", "metrics.jsonl"), messages, strict=True):
        expected = f"cannot write {folder / name}: File too large; what was written"
        assert message.startswith(expected)
    assert json_files.read_json(folder / "a.json") == {"loss": 1.0}


def test_number_that_json_cannot_hold_leaves_the_old_file_whole(tmp_path):
    json_files.write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        json_files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.0}
    assert len(list(tmp_path.iterdir())) == 1


def test_metrics_come_back_in_order(tmp_path):
    for epoch in (1, 2):
        results.append_metrics(tmp_path, {"epoch": epoch})
    assert results.read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]


def test_metrics_that_are_written_anew_leave_no_line_of_the_old_ones(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    with pytest.raises(RunError, match="metrics.jsonl is damaged"):
        results.read_metrics(tmp_path)
    results.write_metrics(tmp_path, [{"epoch": 1}])
    results.append_metrics(tmp_path, {"epoch": 2})
    assert results.read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_folder_of_no_run_names_one_inside_and_no_experiment(tmp_path):
    for name, config in (("a", {"experiment": "compare"}), ("b", {"epochs": 1})):
        (tmp_path / name).mkdir()
        json_files.write_json(tmp_path / name / "config.json", config)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(RunError, match=rf"of a run, such as {tmp_path / 'b'}$"):
        json_files.read_object(tmp_path / "config.json")
