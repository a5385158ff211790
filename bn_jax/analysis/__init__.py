"""Measurements on trained or training models."""
