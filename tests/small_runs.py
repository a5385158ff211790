"""Runs and sweeps that are trained to the end."""

from bn_jax.training import loop
from bn_jax.training.sweep import Sweep


def trained(config, data, **options):
    """The trainer at the end of a run; `options` are those of `loop.Trainer`."""
    trainer = loop.Trainer(config, data, **options)
    for _ in trainer.train():
        pass
    return trainer


def step_losses(config, data, **options):
    """The loss of each step of a run."""
    return trained(config, data, **options).progress().step_losses


def swept(configs, data, **options):
    """The sweep at its end; `options` are those of `Sweep`."""
    sweep = Sweep(configs, data, **options)
    for _ in sweep.train():
        pass
    return sweep
