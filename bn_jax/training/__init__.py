"""Training: a pure step, an epoch in one scan, and what a run writes to disk."""
