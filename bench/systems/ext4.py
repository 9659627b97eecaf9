"""The local file system itself: the same files on the same disk, no mount, no process. The ceiling of the table."""

from __future__ import annotations

from pathlib import Path

from bench import machine
from bench.memory import Roles
from bench.systems.port import Site, Warmth


class LocalFiles:
    """The data set where it was generated."""

    name = "ext4"
    warmth: tuple[Warmth, ...] = ()

    def __init__(self, site: Site) -> None:
        self._root = site.dataset.root
        self.label = machine.filesystem_of(self._root)

    def version(self) -> str:
        """The kernel's."""
        return f"{self.label} on {self._device()}"

    def _device(self) -> str:
        device = self._root.stat().st_dev
        block = Path(f"/sys/dev/block/{device >> 8}:{device & 0xFF}")
        return block.resolve().name if block.exists() else "an unnamed device"

    def prepare(self) -> str | None:
        """The files are there."""
        return None

    def mount(self) -> Path:
        """Return where the files are."""
        return self._root

    def umount(self) -> None:
        """Nothing is mounted."""

    def reset(self) -> None:
        """There is no cache but the page cache."""

    def roles(self) -> Roles:
        """No processes."""
        return {}

    def origin_requests(self) -> int | None:
        """No store behind it."""
        return None
