r"""Put finished runs and sweeps side by side.

  python -m experiments.compare runs/a runs/b --workdir=runs/compared

Prints a table of the fields in which they differ and of their scores, and writes it to
table.md in --workdir, with curves.png: loss and accuracies by epoch, a colour for each
value. Runs that differ in their seed alone are one line, with a band from the least to
the greatest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from bn_jax.fields import ConfigError
from bn_jax.runs import compare, json_files
from experiments import launch

if __name__ != "__main__":
    flags.disclaim_key_flags()


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    """Compare the folders that are given."""
    if len(argv) < 2:
        raise ConfigError("give folders of finished runs or sweeps to compare")
    places = [Path(path).resolve() for path in argv[1:]]
    for path, place in zip(argv[1:], places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{path} is given twice; give each folder once")
    folder = launch.workdir()
    members = [member for path in argv[1:] for member in compare.read(path)]
    groups = compare.grouped(members)
    with launch.experiment("compare", {"folders": list(argv[1:])}):
        from bn_jax import plots  # here, as it takes a second to import

        text = compare.table(groups)
        json_files.remove_link(folder / "table.md").write_text(text + "\n")
        plots.members_by_epoch(
            {label: [m.row for m in of] for label, of in groups.items()},
            json_files.remove_link(folder / "curves.png"),
        )
    print(text)
    print(f"written to {folder}: table.md, curves.png")


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(launch.define_workdir_flag))
