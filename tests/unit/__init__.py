"""Tests without a mount."""
