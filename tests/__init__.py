"""Tests of cachefs; one directory per level."""
