"""Entry points: each file is one experiment, run with `python -m experiments.NAME`."""
