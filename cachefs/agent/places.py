"""Where one agent keeps things: below the cache directory, and in the tmpfs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from cachefs.config import CacheConfig
from cachefs.runtime import check_own, own_directory, shm_directory
from metadata.moving import Places
from metadata.room import LEAST

log = logging.getLogger(__name__)

PROBE_BYTES = 2 * LEAST
"""A full disk lets files be made that nothing can be written to. More than the writer of metadata needs to go on."""


@dataclass(frozen=True, slots=True)
class AgentPaths:
    """Where one agent keeps things."""

    cache_dir: Path
    disk: Path
    volumes: Places
    shm: Path

    @classmethod
    def create(cls, config: CacheConfig) -> AgentPaths:
        """Return the places. A cache directory that can't be written moves the metadata to the tmpfs.

        Raises OSError when that cannot be used either.
        """
        cache_dir = Path(config.cache_dir)
        shm = Path(shm_directory(config.shm_dir, config.cache_dir, os.getuid()))
        home, refuge = cache_dir / "volumes", shm / "volumes"
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = home / ".probe"
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cache directory %s cannot be written (%s): metadata goes to %s", cache_dir, error, refuge)
            own_directory(shm)
            refuge.mkdir(mode=0o700, exist_ok=True)
            return cls(cache_dir, cache_dir / "disk", Places(home, refuge, at_home=False), shm)
        return cls(cache_dir, cache_dir / "disk", Places(home, refuge, at_home=True), shm)


def is_own(directory: Path) -> bool:
    """Whether this is a directory of ours. /dev/shm is open to all, and the name can be guessed."""
    try:
        check_own(directory)
    except OSError:
        return False
    return True
