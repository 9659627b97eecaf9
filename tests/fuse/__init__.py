"""Tests on real kernel mounts."""
