"""Blocks: how they are stored, the two LMDB tiers, eviction, and the cache that fills them."""
