"""Timings, side by side in one call: what is fast, and how cost grows."""
