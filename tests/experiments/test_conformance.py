import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import conformance
from marks import slow_but

RESULTS = Path(conformance.__file__).parent / "results" / "conformance"
README = RESULTS / "README.md"

# Many steps, or what tests/test_linen.py tries on ours and Flax's by hand.
SLOW = ("variance_100", "unequal_masks", "empty_shard")


@pytest.mark.parametrize("name", ["bn_jax linen", "bn_jax nnx"])
@pytest.mark.parametrize(
    "check",
    slow_but(
        [check for check in conformance.CHECKS if check not in SLOW],
        conformance.CHECKS,
    ),
)
def test_ours_passes_every_check(name, check):
    _, error = conformance.CHECKS[check]
    value = error(conformance.LIBRARIES[name])
    # In bfloat16, whose steps are 2^-8, a prediction is off by its own rounding.
    limit = 2**-8 if check.startswith("bfloat16") else 1e-4
    assert value is None or value < limit


def test_checks_find_the_faults_of_a_library_that_has_them():
    flax = conformance.LIBRARIES["Flax linen"]
    assert conformance.large_mean(flax) > 100
    assert conformance.masked_shards([3, 1])(flax) > 0.1
    assert np.isnan(conformance.masked_shards([4, 0])(flax))
    assert conformance.diverged_averages(flax) > 0.1
    assert conformance.bfloat16_mean(conformance.LIBRARIES["Flax nnx"]) > 0.5


@pytest.mark.parametrize(
    "check",
    slow_but(
        set(conformance.RENORM_CHECKS) - {"warm_up_nans"}, conformance.RENORM_CHECKS
    ),
)
def test_our_renorm_is_the_papers_and_its_gradients_are_numbers(check):
    _, error = conformance.RENORM_CHECKS[check]
    assert error(conformance.our_renorm) < 1e-5


@pytest.mark.slow
def test_checks_find_the_faults_of_the_renorm_of_reinforcement_learning():
    theirs = conformance.sbx_renorm
    of_deviation = [conformance.off_the_paper(10.0**-n)(theirs) for n in range(3)]
    assert of_deviation == sorted(of_deviation)
    assert of_deviation[0] > 1e-5
    assert of_deviation[2] > 0.05
    assert conformance.off_the_paper(1, 1e4)(theirs) > 1
    # As batch norm, too: the layers before and after the start are computed both.
    for step in (0, conformance.START):
        assert conformance.not_numbers(step)(theirs) > 10


@pytest.mark.parametrize(
    ("name", "errors", "checks"),
    [
        ("table.md", "errors", conformance.CHECKS),
        ("renorm_table.md", "renorm_errors", conformance.RENORM_CHECKS),
    ],
)
def test_page_holds_the_tables_that_the_committed_run_wrote(name, errors, checks):
    written = json.loads((RESULTS / "results.json").read_text())[errors]
    table = conformance.markdown(written, checks)
    assert table == (RESULTS / name).read_text()
    assert table in README.read_text()


def test_page_names_tests_that_exist():
    tests = Path(__file__).parents[1]
    sources = "\n".join(path.read_text() for path in tests.rglob("test_*.py"))
    for page in (README, RESULTS.parents[2] / "README.md"):
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            exists = f"def {name}(" in sources or name == "test_local_stats"
            assert exists, f"{page}: {name}"
