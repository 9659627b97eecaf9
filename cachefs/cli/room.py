"""How large the tiers are when nobody says so: as large as their defaults, or what this machine can spare of it.

Containers have 64 MiB of /dev/shm and a limit of memory, small nodes have small disks; a default that does not fit
there would make `cachefs mount` fail, or fill what others need. So a size that NOBODY gave is

    shm tier     the default, half of the tmpfs, or a quarter of the memory (of the container's limit)
    disk tier    the default, or 80 % of what is free, what the tier has taken already being free

whichever is least; and the tier is off where that is too little to be of use. Every size that is not the default is
said.

INVARIANT: what a person wrote is never changed. `cachefs.cli.load.validate` refuses it if it cannot work.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cachefs.cli.options import render_size
from cachefs.config import MIB, CacheConfig

MIN_TIER_BYTES, MIN_TIER_BLOCKS = 16 * MIB, 16
_SHM_OF_TMPFS, _SHM_OF_MEMORY = 0.5, 0.25
_DISK_OF_FREE = 0.8


def least_tier_bytes(block_size_bytes: int) -> int:
    """Return the smallest tier that works."""
    return max(MIN_TIER_BLOCKS * block_size_bytes, MIN_TIER_BYTES)


def fit(cache: CacheConfig, given: Collection[str]) -> tuple[CacheConfig, tuple[str, ...]]:
    """Return the cache with sizes that fit, and a line for each that is not the default; `given`: fields that somebody
    wrote.
    """
    sizes: dict[str, Any] = {}
    notices: list[str] = []
    for name, option, tier, offers_of in (
        ("shm_size_bytes", "--shm-size", "shm", functools.partial(_shm_offers, cache, given)),
        ("cache_size_bytes", "--cache-size", "disk", functools.partial(_disk_offers, cache)),
    ):
        if name in given:
            continue
        bytes_, why = min(offers_of(), default=(1 << 62, ""))
        bytes_ = bytes_ // MIB * MIB
        if bytes_ >= getattr(cache, name):
            continue
        least = least_tier_bytes(cache.block_size_bytes)
        sizes[name] = bytes_ if bytes_ >= least else 0
        notices.append(
            f"{option} is {render_size(bytes_)} here: {why}"
            if sizes[name]
            else f"the {tier} tier is off: {why} is {render_size(bytes_)}, and it needs {render_size(least)} ({option})"
        )
    return dataclasses.replace(cache, **sizes), tuple(notices)


def _shm_offers(cache: CacheConfig, given: Collection[str]) -> list[tuple[int, str]]:
    offers = []
    try:
        tmpfs = tmpfs_bytes(cache.shm_dir)
    except OSError:
        tmpfs = None if "shm_dir" in given else 0  # one that was named and is not there is refused later
    if tmpfs is not None:
        offers.append((int(tmpfs * _SHM_OF_TMPFS), f"half of {cache.shm_dir}"))
    memory, whose = memory_bytes()
    offers.append((int(memory * _SHM_OF_MEMORY), f"a quarter of the memory of {whose}"))
    return offers


def _disk_offers(cache: CacheConfig) -> list[tuple[int, str]]:
    try:
        free = disk_room_bytes(Path(cache.cache_dir))
    except OSError:
        return []  # the agent will find out, and serve without it
    return [(int(free * _DISK_OF_FREE), f"{_DISK_OF_FREE:.0%} of what is free for {cache.cache_dir}")]


# -- what there is -------------------------------------------------------------------------------------


def tmpfs_bytes(directory: str) -> int | None:
    """Return the size of a tmpfs, None when it has no limit. Raises OSError."""
    stat = os.statvfs(directory)
    return stat.f_blocks * stat.f_frsize or None


def memory_bytes() -> tuple[int, str]:
    """Return how much memory we may use, and whose it is."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit()
    return (limit, "this container") if limit is not None and limit < total else (total, "this machine")


def nearest_existing(directory: Path) -> Path:
    """Return the directory, or the nearest one above it that is there."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def disk_room_bytes(directory: Path) -> int:
    """Return how much a tier below `directory` can take, what it has taken already included. Raises OSError."""
    stat = os.statvfs(nearest_existing(directory))
    return stat.f_bavail * stat.f_frsize + used_bytes(directory / "disk")


def used_bytes(directory: Path) -> int:
    """Return what a tier has taken already: it does not need that much again."""
    used = 0
    for path in directory.rglob("*"):
        try:
            used += path.lstat().st_blocks * 512
        except OSError:
            continue  # removed meanwhile
    return used


def cgroup_limit(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int | None:
    """Return the memory limit of this process's control group (v2 or v1), or None without one."""
    try:
        lines = Path(membership).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = Path(root) if not controllers else Path(root, "memory")
        if controllers and "memory" not in controllers.split(","):
            continue
        # a parent's limit holds as well; inside a container only the root of the hierarchy may be visible
        for directory in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
            for name in ("memory.max", "memory.limit_in_bytes"):
                try:
                    limits.append(int((directory / name).read_text(encoding="ascii")))
                except (OSError, ValueError):
                    continue  # not there, or "max"
            if directory == base:
                break
    return min(limits, default=None)
