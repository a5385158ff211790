"""What is asked of a model, ours or the user's: statistics, gaps, uncertainty."""
