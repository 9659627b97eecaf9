"""The id of this node: 16 hexadecimal digits in the file `node-id` of its cache directory.

It lives as long as the cache does, because ranking goes by it: a node that restarts finds that the blocks it holds are
the ones it is asked for. A copy of a cache directory on another machine copies the id too; `peer.membership` notices,
and one of the two draws another (`redraw`).

A cache directory that cannot be written is no reason to stop: the id is good for this life then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from pathlib import Path

log = logging.getLogger(__name__)

FILE_NAME = "node-id"
NODE_ID = re.compile(r"[0-9a-f]{16}")
_READ_BYTES = 64


class NodeIdentity:
    """The id that a cache directory holds. Its methods BLOCK (a small file); used by one thread at a time."""

    def __init__(self, cache_dir: Path) -> None:
        self._file = cache_dir / FILE_NAME

    def node_id(self) -> str:
        """Return the id that is kept, or draw and keep one."""
        try:
            with self._file.open("rb") as stream:
                found = stream.read(_READ_BYTES).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return self.redraw()
        except OSError as error:
            log.warning("the id of this node cannot be read (%s), it gets another for now", error)
            return _drawn()
        if NODE_ID.fullmatch(found):
            return found
        log.info("%s holds no id, drawing another", self._file)
        return self.redraw()

    def redraw(self) -> str:
        """Draw another id, keep it, and return it."""
        drawn = _drawn()
        fresh = self._file.with_name(f"{FILE_NAME}.{os.getpid()}")
        try:
            with fresh.open("wb") as stream:
                stream.write(f"{drawn}\n".encode())
                stream.flush()
                os.fsync(stream.fileno())
            fresh.replace(self._file)
        except OSError as error:
            log.warning("the id of this node cannot be kept (%s): after a restart it will be another", error)
            with contextlib.suppress(OSError):
                fresh.unlink()
        return drawn


def _drawn() -> str:
    return secrets.token_hex(8)
