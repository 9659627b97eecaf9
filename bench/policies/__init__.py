"""Eviction without a mount: traces of reads, generated or recorded, through the policies of `cachefs.block`."""
