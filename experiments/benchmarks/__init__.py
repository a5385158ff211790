"""Benchmarks: how fast we are beside other libraries, and how cost grows.

`benchmark` says how one is described and runs it; each other file with a `BENCHMARK` is
a command, `python -m experiments.benchmarks.NAME`.
"""
