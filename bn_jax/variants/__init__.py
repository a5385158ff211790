"""Other transforms with the contract of `batch_norm`: `(y, state)` back, always."""
