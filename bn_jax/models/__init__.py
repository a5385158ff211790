"""Models that receive their normalisation as an argument, and the table of those."""
