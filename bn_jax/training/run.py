"""A run on disk: train a config into a working directory, and read it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from tqdm import tqdm

from bn_jax import data as data_lib
from bn_jax import plots, results
from bn_jax.training import checkpoint, loop
from bn_jax.training.config import TrainConfig
from bn_jax.training.state import init_variables, make_model


class Run(NamedTuple):
    """A finished run."""

    config: TrainConfig
    model: nn.Module
    variables: Any
    metrics: list[dict[str, Any]]  # one row per epoch, as `loop.EpochReport`
    results: dict[str, Any]  # as results.json


def train_into(
    workdir: str | Path, config: TrainConfig, data: data_lib.ImageData
) -> Run:
    """Train, evaluate, and write everything to `workdir`.

    Shows a progress bar on a terminal, and prints a line per epoch.

    Raises:
      RunError: if `workdir` cannot take this run; nothing is overwritten.
      ConfigError: if the config does not fit the data.
      FloatingPointError: if the loss is not finite.
    """
    loop.check_fits(config, data)
    workdir = results.start_run(workdir, config.to_dict())
    with tqdm(total=config.epochs, unit="epoch", disable=None, leave=False) as bar:

        def on_epoch(report: loop.EpochReport) -> None:
            results.append_metrics(workdir, report._asdict())
            bar.write(_line(report, config.epochs))
            bar.set_postfix_str(
                f"loss {report.loss:.3f}, {report.examples_per_second:,.0f} examples/s"
            )
            bar.update()

        bar.set_postfix_str("compiling")
        fitted = loop.fit(config, data, on_epoch=on_epoch)
        bar.set_postfix_str("statistics of the whole training set")
        score = loop.score(fitted.model, fitted.state.variables, data)

    last = fitted.history[-1]
    seconds = sum(report.seconds for report in fitted.history)
    examples = last.step * config.batch_size
    summary = {
        "train_loss": last.loss,
        "train_accuracy": last.train_accuracy,
        **score._asdict(),
        "examples_per_second": examples / seconds,
        "compile_seconds": fitted.compile_seconds,
        "data_source": data.source,
        "first_step_losses": [float(loss) for loss in fitted.step_losses[:20]],
        "gamma_beta": gamma_beta(fitted.state.variables),
    }
    checkpoint.save_variables(workdir, fitted.state.variables)
    run = Run(
        config,
        fitted.model,
        fitted.state.variables,
        results.read_metrics(workdir),
        summary,
    )
    plots.curves(run.metrics, summary, workdir / "curves.png")
    if summary["gamma_beta"]:
        plots.gamma_beta(summary["gamma_beta"], workdir / "gamma_beta.png")
    results.write_json(workdir / results.RESULTS, summary)
    return run


def load(
    workdir: str | Path,
    *,
    num_classes: int = 10,
    images_shape: tuple[int, ...] = (28, 28, 1),
) -> Run:
    """Read a finished run.

    Args:
      workdir: the directory that `train_into` wrote.
      num_classes: of the data set; 10 in all those of `bn_jax.data`.
      images_shape: `[H, W, C]` of the data set, likewise.

    Raises:
      RunError: if the directory does not hold a finished run, or files are damaged.
      ConfigError: if its config is of another version of the program.
    """
    workdir = Path(workdir)
    config = TrainConfig.from_dict(results.read_json(workdir / results.CONFIG))
    summary = results.read_json(workdir / results.RESULTS)
    model = make_model(config, num_classes=num_classes)
    like = init_variables(model, jax.random.key(0), images_shape)
    variables = checkpoint.load_variables(workdir, like)
    return Run(config, model, variables, results.read_metrics(workdir), summary)


def gamma_beta(variables: Any) -> dict[str, dict[str, list[float]]]:
    """Return gamma and beta of each normalisation layer, by the layer's name."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    layers = {
        path.rpartition("/")[0]
        for path in traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    }
    return {
        layer: {
            greek: np.asarray(params[f"{layer}/{name}"]).astype(float).tolist()
            for greek, name in (("gamma", "scale"), ("beta", "bias"))
            if f"{layer}/{name}" in params
        }
        for layer in sorted(layers)
    }


def _line(report: loop.EpochReport, epochs: int) -> str:
    return (
        f"epoch {report.epoch:{len(str(epochs))}}/{epochs}  loss {report.loss:.3f}  "
        f"train accuracy {report.train_accuracy:.3f}  "
        f"test accuracy {report.test_accuracy:.3f}  "
        f"{report.examples_per_second:,.0f} examples/s"
    )
