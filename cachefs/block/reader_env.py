"""A tier's LMDB environment, opened for reading by a process that does not own it."""

from __future__ import annotations

from typing import NamedTuple

import lmdb

from cachefs.block.lmdb_env import FORMAT, INDEX, PINNED, file_identity

READER_MAP_BYTES = 1 << 40
"""LMDB's own map is far larger than the file, so that it never has to follow when the writer's map grows."""


class ReaderEnvironment(NamedTuple):
    """An environment and the two databases of a tier in it."""

    env: lmdb.Environment
    blocks: lmdb._Database
    """Block keys to stored values."""
    places: lmdb._Database
    """Block keys to (first page, length) of the stored value."""
    identity: tuple[int, int]
    """Of the data file (`file_identity`)."""


def open_environment(directory: str, block_size: int | None) -> ReaderEnvironment:
    """Open the environment in `directory`. Raises lmdb.Error, OSError, or ValueError for one of another format or
    (with `block_size`) of blocks of another size: block 1 of it would be other bytes of the object.
    """
    identity = file_identity(directory)
    env = lmdb.Environment(
        directory, map_size=READER_MAP_BYTES, readonly=True, create=False, max_dbs=2, max_spare_txns=8, **PINNED
    )
    try:
        _check(env, block_size)
        return ReaderEnvironment(env, env.open_db(create=False), env.open_db(INDEX, create=False), identity)
    except BaseException:
        env.close()
        raise


def _check(env: lmdb.Environment, block_size: int | None) -> None:
    state = env.open_db(b"state", create=False)
    with env.begin(db=state) as txn:
        found = txn.get(b"format"), txn.get(b"block_size")
    wanted = found[1] if block_size is None else b"%d" % block_size
    if found != (FORMAT, wanted):
        raise ValueError(f"it has format and block size {found}, not {FORMAT!r} and {wanted!r}")
