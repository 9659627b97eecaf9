"""The edge to the kernel: the FUSE protocol, the channel that answers reads, the pyfuse3 operations, errors to
errno.
"""
