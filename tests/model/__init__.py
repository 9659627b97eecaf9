"""Random operations against a plain dict as the model."""
