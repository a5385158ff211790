r"""Which batch norm gives the right numbers where it is hard?

Small reproductions of known faults, on ours and on the libraries that are installed:
Flax Linen and NNX always; Haiku, Equinox, Keras and PyTorch with the extra `peers`.
Only outputs are compared: the statistics that a library predicts with are computed from
its predictions at two points. The table holds errors; `nan` is a result that is not a
number, `-` means that the library is not installed or lacks the feature, and `refuses`
that it raises an error.

A second table compares batch renormalisation with the formula of Ioffe (2017), and
counts the gradients that are not numbers. SBX, CrossQ and PureJaxQL have one layer from
each other; none is installed, so that it is written here from its definition.

  pip install -e '.[peers]'
  python -m experiments.conformance --workdir=runs/conformance     takes a minute

The folder receives results.json, table.md and renorm_table.md; recorded ones are in
experiments/results/conformance. Libraries that need not be installed are imported by
the functions that use them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from flax import linen as flax_linen
from flax import nnx as flax_nnx

import bn_jax
import bn_jax.linen
import bn_jax.nnx
from bn_jax.averages import CountedState
from bn_jax.runs import json_files, provenance
from bn_jax.variants.renorm import batch_renorm
from experiments import launch
from experiments.benchmarks import timing

EPSILON = 1e-5


class Trained(NamedTuple):
    """A layer after some batches in training mode."""

    y: np.ndarray  # output for the last batch, float64
    predict: Callable[[np.ndarray], np.ndarray]  # float64 in and out


# (batches [T, N, C], weight of the old average, dtype) -> the trained layer.
Train = Callable[[np.ndarray, float, str], Trained]


class Library(NamedTuple):
    """How to use one library's batch norm."""

    module: str  # must be installed
    train: Train
    linen: type[flax_linen.Module] | None = None  # its module with masks and axes


def linen(module: type[flax_linen.Module]) -> Train:
    """Return how to train a Linen module."""

    def train(batches: np.ndarray, momentum: float, dtype: str) -> Trained:
        layer = module(momentum=momentum, epsilon=EPSILON, dtype=dtype)
        x = jnp.asarray(batches[0], dtype)
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        for batch in batches:
            y, updates = layer.apply(
                variables,
                jnp.asarray(batch, dtype),
                use_running_average=False,
                mutable=["batch_stats"],
            )
            variables = {**variables, **updates}

        def predict(x: np.ndarray) -> np.ndarray:
            y = layer.apply(variables, jnp.asarray(x, dtype), use_running_average=True)
            return np.asarray(y, np.float64)

        return Trained(np.asarray(y, np.float64), predict)

    return train


def nnx(module: type[flax_nnx.Module]) -> Train:
    """Return how to train an NNX module."""

    def train(batches: np.ndarray, momentum: float, dtype: str) -> Trained:
        layer = module(
            batches.shape[-1],
            momentum=momentum,
            epsilon=EPSILON,
            dtype=jnp.dtype(dtype),
            rngs=flax_nnx.Rngs(0),
        )
        for batch in batches:
            y = layer(jnp.asarray(batch, dtype), use_running_average=False)

        def predict(x: np.ndarray) -> np.ndarray:
            y = layer(jnp.asarray(x, dtype), use_running_average=True)
            return np.asarray(y, np.float64)

        return Trained(np.asarray(y, np.float64), predict)

    return train


def haiku(batches: np.ndarray, momentum: float, dtype: str) -> Trained:
    """Train Haiku's module."""
    import haiku as hk

    def forward(x: Any, training: bool) -> Any:
        return hk.BatchNorm(True, True, decay_rate=momentum, eps=EPSILON)(x, training)

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = model.init(
        jax.random.key(0), jnp.asarray(batches[0], dtype), training=True
    )
    for batch in batches:
        y, state = model.apply(params, state, jnp.asarray(batch, dtype), training=True)

    def predict(x: np.ndarray) -> np.ndarray:
        y, _ = model.apply(params, state, jnp.asarray(x, dtype), training=False)
        return np.asarray(y, np.float64)

    return Trained(np.asarray(y, np.float64), predict)


def equinox(mode: str) -> Train:
    """Return how to train Equinox's layer in one of its modes."""

    def train(batches: np.ndarray, momentum: float, dtype: str) -> Trained:
        import equinox as eqx

        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            batches.shape[-1],
            "batch",
            eps=EPSILON,
            momentum=momentum,
            mode=mode,
            dtype=jnp.dtype(dtype),
        )

        def mapped(layer: Any) -> Any:
            return jax.vmap(
                layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
            )

        for batch in batches:
            y, state = mapped(layer)(jnp.asarray(batch, dtype), state)
        frozen = eqx.nn.inference_mode(layer)

        def predict(x: np.ndarray) -> np.ndarray:
            return np.asarray(
                mapped(frozen)(jnp.asarray(x, dtype), state)[0], np.float64
            )

        return Trained(np.asarray(y, np.float64), predict)

    return train


def keras(batches: np.ndarray, momentum: float, dtype: str) -> Trained:
    """Train Keras's layer, on JAX unless the environment says otherwise."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from keras import layers, ops

    layer = layers.BatchNormalization(momentum=momentum, epsilon=EPSILON, dtype=dtype)
    for batch in batches:
        y = layer(ops.convert_to_tensor(batch, dtype), training=True)

    def predict(x: np.ndarray) -> np.ndarray:
        y = layer(ops.convert_to_tensor(x, dtype), training=False)
        return np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")), np.float64)

    last = ops.convert_to_numpy(ops.cast(y, "float32"))
    return Trained(np.asarray(last, np.float64), predict)


def torch(batches: np.ndarray, momentum: float, dtype: str) -> Trained:
    """Train PyTorch's layer."""
    import torch as torch_lib

    kind = getattr(torch_lib, dtype)
    layer = torch_lib.nn.BatchNorm1d(
        batches.shape[-1], eps=EPSILON, momentum=1 - momentum, dtype=kind
    )

    def call(x: np.ndarray) -> np.ndarray:
        with torch_lib.no_grad():
            return layer(torch_lib.tensor(x, dtype=kind)).to(torch_lib.float64).numpy()

    layer.train()
    for batch in batches:
        y = call(batch)

    def predict(x: np.ndarray) -> np.ndarray:
        layer.eval()
        return call(x)

    return Trained(y, predict)


OURS, FLAX = bn_jax.linen.BatchNorm, flax_linen.BatchNorm
LIBRARIES: dict[str, Library] = {
    "bn_jax linen": Library("bn_jax", linen(OURS), OURS),
    "bn_jax nnx": Library("bn_jax", nnx(bn_jax.nnx.BatchNorm)),
    "Flax linen": Library("flax", linen(FLAX), FLAX),
    "Flax nnx": Library("flax", nnx(flax_nnx.BatchNorm)),
    "Haiku": Library("haiku", haiku),
    "Equinox ema": Library("equinox", equinox("ema")),
    "Equinox batch": Library("equinox", equinox("batch")),
    "Keras": Library("keras", keras),
    "PyTorch": Library("torch", torch),
}


def large_mean(library: Library) -> float:
    """Return |std - 1| of the output for N(10,000, 1), 256 rows, at the first step."""
    x = np.random.default_rng(0).normal(1e4, 1, (1, 256, 8)).astype(np.float32)
    y = library.train(x, 0.9, "float32").y
    return float(np.abs(y.std(axis=0) - 1).max())


def moving_variance(num_steps: int) -> Callable[[Library], float]:
    """Return a check of the moving variance, on data of variance 4.5, momentum .99."""

    def error(library: Library) -> float:
        batch = np.random.default_rng(1).normal(size=(64, 4))
        batch = 3 + math.sqrt(4.5) * (batch - batch.mean(0)) / batch.std(0)
        batches = np.broadcast_to(batch.astype(np.float32), (num_steps, 64, 4))
        trained = library.train(batches, 0.99, "float32")
        at_0, at_1 = trained.predict(np.repeat([[0.0], [1.0]], 4, axis=1))
        variance = 1 / (at_1 - at_0) ** 2 - EPSILON
        # Every convention counts as right: averages that start from 1 or are debiased,
        # of variances over n or n - 1.
        old = 0.99**num_steps
        right = [
            value for v in (4.5, 4.5 * 64 / 63) for value in (v, old + (1 - old) * v)
        ]
        return float(min(np.abs(variance / r - 1).max() for r in right))

    return error


def bfloat16_mean(library: Library) -> float:
    """Return the error of bfloat16 predictions whose mean is between two bfloat16s.

    Rows 1000 and 1004, neighbours in bfloat16, have mean 1002 and variance 4; with
    momentum 0 the predictions are -1 and 1.
    """
    rows = np.array([[1000.0], [1004.0]], np.float32)
    batch = np.repeat(rows, 128, axis=0)
    trained = library.train(batch[None], 0.0, "bfloat16")
    return float(np.abs(trained.predict(rows) - [[-1.0], [1.0]]).max())


def bfloat16_average(library: Library) -> float:
    """Return the error of bfloat16 predictions after 50 batches, momentum .999.

    Rows 4 and 8 have mean 6 and variance 4. A debiased average predicts -1 and 1; one
    that starts from 0 and 1 has mean 6 (1 - .999^n) and variance 4 - 3 * .999^n.
    """
    rows = np.array([[4.0], [8.0]], np.float32)
    batch = np.repeat(rows, 128, axis=0)
    trained = library.train(np.broadcast_to(batch, (50, 256, 1)), 0.999, "bfloat16")
    predicted = trained.predict(rows)
    old = 0.999**50
    from_start = (rows - 6 * (1 - old)) / math.sqrt(4 - 3 * old + EPSILON)
    debiased = np.array([[-1.0], [1.0]])
    return float(min(np.abs(predicted / r - 1).max() for r in (from_start, debiased)))


def one_row(library: Library) -> float:
    """Return |y - beta| for a batch of one row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ours warns that such a batch teaches nothing
        y = library.train(np.full((1, 1, 3), 7.0, np.float32), 0.9, "float32").y
    return float(np.abs(y).max())


def masked_shards(rows_used: Sequence[int]) -> Callable[[Library], float | None]:
    """Return a check of the variance over two shards of 4 rows, some masked.

    Args:
      rows_used: how many rows of each shard are not masked.
    """

    def error(library: Library) -> float | None:
        if library.linen is None:
            return None
        norm = library.linen(
            use_running_average=False, momentum=0.0, axis_name="shards"
        )
        x = np.random.default_rng(2).normal(size=(2, 4, 3)) * [[[1.0]], [[3.0]]]
        x = jnp.asarray(x, jnp.float32)
        variables = norm.init(jax.random.key(0), x[0])

        def step(x: Any, mask: Any) -> Any:
            return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])

        mask = jnp.arange(4)[None, :, None] < jnp.asarray(rows_used)[:, None, None]
        _, updates = jax.vmap(step, axis_name="shards")(x, mask)
        true = np.asarray(x)[np.asarray(mask)[..., 0]].var(0)
        variance = np.asarray(updates["batch_stats"]["var"])[0]
        return float(np.abs(variance / true - 1).max())

    return error


def diverged_averages(library: Library) -> float | None:
    """Return the error of the variance that is merged from 4 devices without sync.

    It is relative. Flax's examples take the mean of the devices' averages.
    """
    if library.linen is None:
        return None
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(4, 500, 3)) + rng.normal(scale=2, size=(4, 1, 3))
    states = bn_jax.BatchNormState(jnp.asarray(rows.mean(1)), jnp.asarray(rows.var(1)))
    is_ours = library.linen is OURS
    var = bn_jax.merge_states(states).var if is_ours else states.var.mean(0)
    return float(np.abs(np.asarray(var) / rows.reshape(-1, 3).var(0) - 1).max())


# From a check's name to its title, and to the error of what it is given.
Checks = Mapping[str, tuple[str, Callable[[Any], float | None]]]
CHECKS: Checks = {
    "large_mean": ("N(10,000, 1): deviation of the output", large_mean),
    "variance_1": ("moving variance after 1 step", moving_variance(1)),
    "variance_10": ("moving variance after 10 steps", moving_variance(10)),
    "variance_100": ("moving variance after 100 steps", moving_variance(100)),
    "bfloat16_mean": ("bfloat16 prediction, finer mean", bfloat16_mean),
    "bfloat16_average": ("bfloat16 prediction, momentum .999", bfloat16_average),
    "one_row": ("batch of one row: y - beta", one_row),
    "unequal_masks": ("variance over shards with 3 and 1 rows", masked_shards([3, 1])),
    "empty_shard": ("variance over shards with 4 and 0 rows", masked_shards([4, 0])),
    "diverged": ("variance merged from unsynced devices", diverged_averages),
}


# (x [N, C], moving mean, moving variance, step) -> the output in training: as batch
# norm until step `START`, then with limits 3 and 5.
Renorm = Callable[[Any, Any, Any, int], Any]
START = 10
RENORM_EPSILON = 1e-3  # the default of SBX, CrossQ, PureJaxQL and Keras


def our_renorm(x: Any, mean: Any, var: Any, step: int) -> Any:
    """Return the output of ours."""
    params, _ = bn_jax.init(x.shape[-1])
    state = CountedState(mean, var, jnp.float32(step))
    y, _ = batch_renorm(
        x, params, state, train=True, start=START, epsilon=RENORM_EPSILON
    )
    return y


def sbx_renorm(x: Any, mean: Any, var: Any, step: int) -> Any:
    r"""Return the output of SBX, CrossQ and PureJaxQL, from its definition.

    The batch is normalised by $(x - m) / \sqrt{v + \epsilon}$, where after the start
    $m = \mu_B - d s_B / r$ and $v = s_B^2 / r^2$; until then they are the batch's. The
    variance is that of Flax by default, E[x^2] - E[x]^2 or 0.
    """
    batch_mean = x.mean(0)
    batch_var = jnp.maximum(0, (x * x).mean(0) - batch_mean**2)
    sigma = jnp.sqrt(var + RENORM_EPSILON)
    r = jnp.clip(jnp.sqrt(batch_var + RENORM_EPSILON) / sigma, 1 / 3, 3)
    d = jnp.clip((batch_mean - mean) / sigma, -5, 5)
    r, d = jax.lax.stop_gradient((r, d))
    on = jnp.float32(step >= START)  # weighs both, and leaves NaN in neither out
    m = on * (batch_mean - d * jnp.sqrt(batch_var) / r) + (1 - on) * batch_mean
    v = on * batch_var / r**2 + (1 - on) * batch_var
    return (x - m) * jax.lax.rsqrt(v + RENORM_EPSILON)


def keras_renorm(x: Any, mean: Any, var: Any, step: int) -> Any:
    """Return the output of Keras, whose users set the limits of the step."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from keras import layers

    on = step >= START
    r_max, d_max = (3, 5) if on else (1, 0)
    layer = layers.BatchNormalization(
        epsilon=RENORM_EPSILON,
        renorm=True,
        renorm_clipping={"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max},
    )
    layer.build(x.shape)
    held = {"renorm_mean": mean, "renorm_stddev": jnp.sqrt(var + RENORM_EPSILON)}
    frozen = [v.value for v in layer.trainable_variables]
    state = [held.get(v.name, v.value) for v in layer.non_trainable_variables]
    y, _ = layer.stateless_call(frozen, state, x, training=True)
    return y


RENORMS: dict[str, tuple[str, Renorm]] = {
    "bn_jax": ("bn_jax", our_renorm),
    "SBX, CrossQ, PureJaxQL (from their definition)": ("jax", sbx_renorm),
    "Keras": ("keras", keras_renorm),
}


def off_the_paper(deviation: float, mean: float = 0.0) -> Callable[[Renorm], float]:
    """Return a check of the output against Ioffe's formula in float64.

    The error is the largest over 256 rows and 8 features, over the largest output. The
    averages are half a deviation and a tenth of the variance off.
    """

    def error(renorm: Renorm) -> float:
        rng = np.random.default_rng(4)
        x = rng.normal(mean, deviation, (256, 8)).astype(np.float32)
        old_mean = np.full(8, mean + deviation / 2, np.float32)
        old_var = np.full(8, 1.1 * deviation**2, np.float32)
        wide = np.float64(x)
        sigma = np.sqrt(np.float64(old_var) + RENORM_EPSILON)
        sigma_batch = np.sqrt(wide.var(0) + RENORM_EPSILON)
        r = np.clip(sigma_batch / sigma, 1 / 3, 3)
        d = np.clip((wide.mean(0) - np.float64(old_mean)) / sigma, -5, 5)
        right = (wide - wide.mean(0)) / sigma_batch * r + d
        y = renorm(jnp.asarray(x), jnp.asarray(old_mean), jnp.asarray(old_var), START)
        return float(np.abs(np.float64(y) - right).max() / np.abs(right).max())

    return error


ACTIVATIONS = (jax.nn.relu, jnp.tanh, jax.nn.silu, jax.nn.elu, jax.nn.gelu)
# Weight and bias of a dead unit: switched off, constant, and far in the negative.
DEAD_UNITS = ((0.0, 0.0), (0.0, 1.0), (1.0, -1e3))


def not_numbers(step: int) -> Callable[[Renorm], int]:
    """Return a count of gradients with a NaN, of 30 layers with one dead unit.

    It is dead in one of three ways, the norm before or after one of five activations.
    """
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    live = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)

    def number(renorm: Renorm) -> int:
        def norm(h: Any) -> Any:
            return renorm(h, jnp.zeros(4), jnp.ones(4), step)

        def has_nan(activation: Callable[[Any], Any], norm_first: bool) -> Any:
            def loss(weights: Any, bias: Any) -> Any:
                h = x @ weights + bias
                y = activation(norm(h)) if norm_first else norm(activation(h))
                return jnp.sin(y).sum()

            def of_unit(weight: Any, bias: Any) -> Any:
                gradients = jax.grad(loss, argnums=(0, 1))(
                    live.at[:, 0].multiply(weight), jnp.zeros(4).at[0].set(bias)
                )
                return jnp.isnan(jnp.concatenate([g.ravel() for g in gradients])).any()

            return [of_unit(*unit) for unit in DEAD_UNITS]

        def all_layers() -> Any:
            return [has_nan(a, first) for a in ACTIVATIONS for first in (True, False)]

        return int(np.sum(jax.jit(all_layers)()))

    return number


RENORM_CHECKS: Checks = {
    "deviation_1": ("N(0, 1): output", off_the_paper(1)),
    "deviation_0.1": ("N(0, .1^2): output", off_the_paper(0.1)),
    "deviation_0.01": ("N(0, .01^2): output", off_the_paper(0.01)),
    "mean_10000": ("N(10,000, 1): output", off_the_paper(1, 1e4)),
    "warm_up_nans": ("NaN gradients of 30, as batch norm", not_numbers(0)),
    "nans": ("NaN gradients of 30, after the start", not_numbers(START)),
}


@launch.errors_in_a_line()
def main(argv: Sequence[str]) -> None:
    launch.check_no_arguments(argv)
    with launch.experiment("conformance", {}) as workdir:
        compare(workdir)


def compare(workdir: Path) -> None:
    """Measure all libraries; print and write their errors."""
    errors = {}
    for name, library in LIBRARIES.items():
        print(f"{name} ...", flush=True)
        errors[name] = measure_all(CHECKS, library.module, library)
    renorm_errors = {
        name: measure_all(RENORM_CHECKS, *renorm) for name, renorm in RENORMS.items()
    }
    table = markdown(errors, CHECKS)
    renorm_table = markdown(renorm_errors, RENORM_CHECKS)
    print(f"\n{table}\n{renorm_table}")
    (workdir / "table.md").write_text(table)
    (workdir / "renorm_table.md").write_text(renorm_table)
    modules = sorted({library.module for library in LIBRARIES.values()})
    summary = {
        "errors": errors,
        "renorm_errors": renorm_errors,
        "versions": timing.versions(modules),
        "environment": provenance.environment(),
    }
    json_files.write_json(workdir / json_files.RESULTS, summary)
    print(f"written to {workdir}: table.md, renorm_table.md, {json_files.RESULTS}")


def measure_all(checks: Checks, module: str, library: Any) -> dict[str, str]:
    """Return a library's error in each check, as text."""
    if importlib.util.find_spec(module) is None:
        return dict.fromkeys(checks, "-")
    return {check: as_text(error, library) for check, (_, error) in checks.items()}


def as_text(error: Callable[[Any], float | None], library: Any) -> str:
    """Return the error in two digits, a number of cases, "-" for none, or "refuses"."""
    try:
        value = error(library)
    except ValueError as refusal:
        print(f"  refuses: {str(refusal)[:100]}", flush=True)
        return "refuses"
    if isinstance(value, int):
        return str(value)
    return "-" if value is None else f"{value:.1e}"


def markdown(errors: Mapping[str, Mapping[str, str]], checks: Checks) -> str:
    """Return the errors as a table, a row a check and a column a library."""
    rows = [["error of", *errors]]
    for check, (title, _) in checks.items():
        rows.append([title, *(of_library[check] for of_library in errors.values())])
    return timing.table(rows)


if __name__ == "__main__":
    app.run(main, flags_parser=launch.flags_parser(launch.define_workdir_flag))
