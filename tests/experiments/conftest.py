import pytest
from absl import app, flags

from experiments import launch


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    """Runs an experiment here, as its command would in a folder of its own.

    It saves the seconds that a process takes to import everything. What the experiment
    printed is returned; SystemExit, which may hold the line of an error, is raised.
    """
    monkeypatch.chdir(tmp_path)
    # JAX is set up for tests, and the output is pytest's.
    monkeypatch.setattr(launch, "set_up_jax", launch._check_processes)
    for name in ("set_up_cache", "_quiet_orbax", "_keep_output"):
        monkeypatch.setattr(launch, name, lambda: None)
    before = set(flags.FLAGS)

    def in_process(start, *arguments):
        monkeypatch.setattr(
            app,
            "run",
            lambda main, flags_parser: main(flags_parser(["program", *arguments])),
        )
        try:
            start()
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
        return capsys.readouterr().out

    return in_process
