"""cachefs: an S3 bucket as a directory of plain paths, cached on the node, for training jobs."""

__version__ = "0.1.0"
