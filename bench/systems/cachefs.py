"""cachefs as installed: its own defaults, with tiers that hold the data set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cachefs
from bench.cachefs_cli import CachefsMount, MountOptions
from bench.memory import Roles
from bench.systems.port import Absent, Site, Warmth


class Cachefs:
    """`cachefs mount` of the bucket."""

    name = "cachefs"
    label = "cachefs"
    warmth: tuple[Warmth, ...] = (Warmth.DISK, Warmth.SHM)

    def __init__(self, site: Site) -> None:
        mebibytes = site.dataset.total_bytes * 3 // 2 // (1 << 20) + 256
        self.mounted = CachefsMount(
            MountOptions(
                source=f"s3://{site.bucket}",
                endpoint_url=site.endpoint_url,
                mountpoint=site.place("mnt", self.name),
                cache_dir=site.work / "cachefs-cache",
                runtime_dir=site.work / "cachefs-run",
                environment=site.clean_environment(),
                more=("--shm-size", f"{mebibytes}MiB", "--log-level", "warning"),
            )
        )
        self._bucket = site.bucket

    def version(self) -> str:
        """The package's version."""
        return cachefs.__version__

    def prepare(self) -> str | None:
        """It reads the bucket as it is; one mount shows whether it works here. Raises Absent."""
        try:
            self.mount()
        except RuntimeError as error:
            raise Absent(str(error)) from error
        finally:
            self.umount()
            self.reset()
        return self._bucket

    def mount(self) -> Path:
        """Mount."""
        return self.mounted.mount()

    @contextmanager
    def with_more(self, *more: str) -> Iterator[None]:
        """Mounts in this block have more options."""
        before = self.mounted.options
        self.mounted.options = replace(before, more=(*before.more, *more))
        try:
            yield
        finally:
            self.mounted.options = before

    def umount(self) -> None:
        """Unmount, end the agent, remove the shm tier."""
        self.mounted.umount()

    def reset(self) -> None:
        """Remove the disk tier and all metadata."""
        shutil.rmtree(self.mounted.options.cache_dir, ignore_errors=True)

    def roles(self) -> Roles:
        """Supervisor, worker and agent."""
        return self.mounted.roles()

    def has_in_memory(self, name: str) -> bool:
        """Whether the shm tier has every block of a file."""
        held = os.getxattr(self.mounted.options.mountpoint / name, "user.cachefs.cached").decode()
        counts = dict(word.split("=") for word in held.split())
        return counts["shm"] == counts["blocks"]

    def origin_requests(self) -> int | None:
        """Requests that the agent sent to the store."""
        return int(self.mounted.counters().agent.get("origin_requests", 0))
