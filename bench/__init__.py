"""Scenarios that measure cachefs beside its peers, and the S3 server they all read from."""
