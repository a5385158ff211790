"""Measurements on networks that studies make beyond the scores of a sweep."""
