r"""Does our batch renormalisation train CrossQ as well as the one written for it?

CrossQ (Bhatt et al., 2024, arXiv:1902.05605) is reinforcement learning whose networks
are normalised by batch renormalisation, over (s, a) and (s', a') in one batch. SBX's
CrossQ is trained on Pendulum-v1 in two arms, with SBX's own layer and with ours in its
place; all else is the same, and runs of a seed begin with the same weights. Both layers
are batch norm for the first `start` batches; then the limits jump to 3 and 5. The actor
learns at every third update, so that its layers jump later than the critics'.

After the jump the layers differ where the variance v is small: SBX divides by
sqrt(v + r^2 epsilon), ours by sqrt(v + epsilon), as in Ioffe (2017).

  pip install -e '.[rl]'
  python -m experiments.crossq --workdir=runs/crossq     takes 10 minutes

The folder receives results.json: the mean return of the evaluation episodes by arm and
seed, and the interval of the difference. SBX is imported by the functions that use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

import bn_jax.linen
from bn_jax import fields, transforms
from bn_jax.runs import json_files, provenance
from experiments import flag_fields, intervals, launch
from experiments.benchmarks import timing

OURS, THEIRS = "bn_jax", "sbx"
ENVIRONMENT = "Pendulum-v1"
# In steps; as many updates then are one call, which is twice as fast or more. The actor
# learns at every third update, so that a multiple of 3 needs a single program.
UPDATE_EVERY = 12
EPISODE_STEPS = 200  # Pendulum never ends before
EPISODES = 20
EVALUATION_SEED = 1_000_000  # of the first evaluation episode
R_MAX, D_MAX, EPSILON = 3.0, 5.0, 1e-3  # sbx.common.jax_layers.BatchRenorm
PACKAGES = (
    *("sbx-rl", "stable-baselines3", "gymnasium"),
    *("tfp-nightly", "tensorflow-probability", "torch"),
)


@dataclasses.dataclass(frozen=True)
class Design:
    """The options of the experiment.

    Raises:
      ConfigError: naming each bad field, its value, and what was expected.
    """

    steps: int = fields.option(
        10_000, "Environment steps of each run.", valid=fields.AT_LEAST_1
    )
    seeds: int = fields.option(
        5,
        "Runs of each arm.",
        valid=fields.Range("a number at least 2", lambda v: v >= 2),
    )
    start: int = fields.option(
        500, "Batches before the limits jump.", valid=fields.NOT_NEGATIVE
    )
    features: int = fields.option(
        64, "Features of each hidden layer, of two.", valid=fields.AT_LEAST_1
    )

    def __post_init__(self) -> None:
        """Check each field's type and range."""
        fields.check(self)


def batch_renorm(
    *,
    use_running_average: bool,
    momentum: float = 0.99,
    warmup_steps: int = 100_000,
) -> bn_jax.linen.Norm:
    """Return our layer, called as SBX calls its own.

    Args:
      use_running_average: True in prediction, False in training.
      momentum: weight of the OLD average.
      warmup_steps: number of batches before the limits jump.
    """
    transform = transforms.renorm(
        r_max=R_MAX,
        d_max=D_MAX,
        start=warmup_steps,
        momentum=momentum,
        epsilon=EPSILON,
    )
    return bn_jax.linen.Norm(transform, use_running_average=use_running_average)


@contextlib.contextmanager
def layer_in_sbx(layer: Callable[..., Any]) -> Iterator[None]:
    """Put a layer in the place of SBX's, in networks that are built or traced here."""
    from sbx.crossq import policies

    theirs = policies.BatchRenorm
    policies.BatchRenorm = layer
    try:
        yield
    finally:
        policies.BatchRenorm = theirs


def check_installed() -> None:
    """Refuse to start without SBX.

    Raises:
      ConfigError: if it is not installed.
    """
    if importlib.util.find_spec("sbx") is None:
        raise fields.ConfigError(
            "SBX, whose CrossQ is trained, is not installed; pip install -e '.[rl]'"
        )


def train(design: Design, seed: int) -> Any:
    """Return a trained CrossQ."""
    from sbx import CrossQ

    model = CrossQ(
        "MlpPolicy",
        ENVIRONMENT,
        seed=seed,
        train_freq=UPDATE_EVERY,
        gradient_steps=UPDATE_EVERY,
        policy_kwargs={
            "net_arch": [design.features] * 2,
            "renorm_warmup_steps": design.start,
        },
    )
    return model.learn(design.steps)


def evaluate(model: Any) -> float:
    """Return the mean return of episodes whose starts are the same in every run."""
    import gymnasium

    environment = gymnasium.make_vec(ENVIRONMENT, EPISODES, vectorization_mode="sync")
    observations, _ = environment.reset(seed=EVALUATION_SEED)
    returns = np.zeros(EPISODES)
    for _ in range(EPISODE_STEPS):
        actions, _ = model.predict(observations, deterministic=True)
        observations, rewards, *_ = environment.step(actions)
        returns += rewards
    environment.close()
    return float(returns.mean())


def batches(model: Any) -> int:
    """Return the number of batches of the layer that has seen the fewest."""
    states = (model.policy.actor_state, model.policy.qf_state)
    leaves = jax.tree_util.tree_leaves_with_path([s.batch_stats for s in states])
    # Ours calls them count, theirs steps.
    counts = [x for path, x in leaves if path[-1].key in ("count", "steps")]
    return int(min(np.min(count) for count in counts))


def measure(design: Design, arm: str, seed: int) -> dict[str, float]:
    """Train and evaluate one run; print and return what came out."""
    placed = layer_in_sbx(batch_renorm) if arm == OURS else contextlib.nullcontext()
    begin = time.perf_counter()
    with placed:
        model = train(design, seed)
        run = {"return": evaluate(model), "batches": batches(model)}
    run["seconds"] = round(time.perf_counter() - begin, 1)
    print(
        f"seed {seed}, {arm}: mean return {run['return']:.1f}, at least "
        f"{run['batches']} batches a layer, {run['seconds']:.0f} s",
        flush=True,
    )
    return run


def compare(design: Design) -> dict[str, Any]:
    """Train both arms with every seed; return the runs and the difference."""
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for seed in range(design.seeds):
        for arm, of_arm in runs.items():
            of_arm.append(measure(design, arm, seed))
    returns = {arm: [run["return"] for run in of_arm] for arm, of_arm in runs.items()}
    interval = intervals.of_difference(returns[OURS], returns[THEIRS])
    return {
        "returns": returns,
        "difference": interval._asdict(),
        "level": intervals.LEVEL,
        "runs": runs,
    }


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    design = flag_fields.read(Design, flags.FLAGS)
    check_installed()
    with launch.experiment("crossq", dataclasses.asdict(design)) as workdir:
        found = compare(design)
        value, low, high, n = found["difference"].values()
        print(
            f"mean return of {EPISODES} episodes, {OURS} minus {THEIRS}: {value:.1f} "
            f"[{low:.1f}, {high:.1f}], n = {n} seeds"
        )
        summary = {
            **found,
            "versions": timing.versions(PACKAGES),
            "environment": provenance.environment(),
        }
        json_files.write_json(workdir / json_files.RESULTS, summary)
        print(f"written to {workdir}: {json_files.RESULTS}")


def define_flags() -> None:
    flag_fields.define(Design)
    launch.define_workdir_flag()


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(define_flags))
