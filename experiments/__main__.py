r"""List the experiments, or run one.

  python -m experiments
  python -m experiments NAME --flags     the same as python -m experiments.NAME --flags

Studies are listed with their question, and the verdicts and the time of training that
are recorded in experiments/results; then the other commands. A new file in this folder
is found by itself: a study by its STUDY, any other command by its
`if __name__ == "__main__"`.
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence

from bn_jax.fields import did_you_mean
from experiments import report


def commands() -> dict[str, str]:
    """Return the modules that can be run, with the first line of their docstrings."""
    found = {}
    for path in sorted(report.HERE.rglob("*.py")):
        text = path.read_text()
        if '\nif __name__ == "__main__":' in text and path.stem != "__main__":
            name = ".".join(path.relative_to(report.HERE).with_suffix("").parts)
            doc = ast.get_docstring(ast.parse(text)) or ""
            found[name] = doc.partition("\n")[0]
    return found


def listing() -> str:
    """Return the experiments with their questions, commands and verdicts."""
    recorded = report.recorded()
    lines = []
    for name in report.studies():
        verdicts = "not recorded yet"
        if name in recorded:
            minutes = recorded[name]["seconds"] / 60
            verdicts = f"{report.counts(recorded[name])}; {minutes:.0f} min"
        lines += [
            report.question(name),
            f"  python -m experiments {name} --workdir=runs/{name} --devices=2",
            f"  {verdicts}",
        ]
    others = {k: v for k, v in commands().items() if k not in report.studies()}
    width = max(map(len, others), default=0)
    lines += ["", "Each is tried in a minute with --smoke; --help lists its flags."]
    lines += ["", "Other commands, by the same `python -m experiments NAME`:"]
    lines += [f"  {name:{width}}  {line}" for name, line in others.items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2 or argv[1].startswith("-"):
        print(listing())
        return
    name = argv[1]
    known = commands()
    if name not in known:
        sys.exit(
            f"error: there is no experiment {name!r}{did_you_mean(name, known)}; "
            "`python -m experiments` lists all"
        )
    sys.argv = list(argv[1:])
    sys.modules.pop(f"experiments.{name}", None)  # runpy executes it anew
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv)
