"""Races and cancellation, on the trio thread."""
