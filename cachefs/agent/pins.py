"""Files that stay in the tiers whatever else has to go: `cachefs pin`.

They are kept by object version, in a small file of the cache directory, so they outlive the agent; a name that leads to
another version later is not pinned. The tier that keeps blocks for long (disk, or shm where there is no disk tier) asks
`covers` before it evicts (`cachefs.agent.guidance`).

    <cache dir>/pins    msgpack; replaced by rename, and brought to disk before

INVARIANT: what is pinned takes at most `MOST` of the tier, so that there is always something to evict.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from cachefs import errors
from cachefs.agent.guidance import Guidance
from cachefs.block.holdings import NOBODY
from cachefs.durable import replace_durably
from cachefs.types import ObjectId

log = logging.getLogger(__name__)

MOST = 0.9
"""Of the tier's limit."""
FORMAT = 1
FILE = "pins"
OID_BYTES = 16
SWEEP_S = 10.0


class Pin(msgspec.Struct, frozen=True):
    """One path that was pinned, with the files that were there."""

    volume_id: str
    mountpoint: str
    path: bytes
    until: float | None
    """Seconds since the epoch; None: for ever."""
    files: int
    takes_bytes: int
    oids: bytes

    def describe(self) -> dict[str, Any]:
        """Return what `cachefs pin --list` shows."""
        path = os.path.join(self.mountpoint, self.path.decode("utf-8", "surrogateescape")).rstrip("/")
        return {"path": path, "until": self.until, "files": self.files, "takes_bytes": self.takes_bytes}


class _Kept(msgspec.Struct, frozen=True):
    format: int
    pins: list[Pin]


class Pins:
    """All pins of an agent. Changed in the trio thread; `covers` may be asked in any."""

    def __init__(self, cache_dir: Path, guidance: Guidance, clock: Callable[[], float] = time.time) -> None:
        self._path = cache_dir / FILE
        self._guidance = guidance
        self._clock = clock
        self._pins: list[Pin] = []
        self._numbers = array("Q")
        self._changing = trio.Lock()

    def __len__(self) -> int:
        return len(self._pins)

    def covers(self, oid: ObjectId) -> bool:
        """Whether an object must stay. By the first half of its identity: half a megabyte for 65,000 files."""
        number = int.from_bytes(oid[:8], sys.byteorder)
        numbers = self._numbers
        at = bisect_left(numbers, number)
        return at < len(numbers) and numbers[at] == number

    @property
    def most_bytes(self) -> int:
        """How much may be pinned."""
        keeper = self._guidance.keeper
        return 0 if keeper is None else int(keeper.limit_bytes * MOST)

    def most_of(self, owner: int) -> int:
        """How much of one volume may be pinned, with its quota."""
        keeper = self._guidance.keeper
        quota_bytes = 0 if keeper is None else keeper.limit_of(owner).quota_bytes
        return min(self.most_bytes, int(quota_bytes * MOST)) if quota_bytes else self.most_bytes

    @property
    def takes_bytes(self) -> int:
        """How much is pinned."""
        return sum(pin.takes_bytes for pin in self._living())

    def listed(self) -> list[dict[str, Any]]:
        """Return what is pinned. Any thread."""
        now = self._clock()
        return [pin.describe() for pin in self._pins if pin.until is None or pin.until > now]

    async def load(self) -> None:
        """Take up what the last agent kept. Never raises: pins that cannot be read are said, and begin anew."""
        try:
            raw = await trio.to_thread.run_sync(self._path.read_bytes)
            kept = msgspec.msgpack.decode(raw, type=_Kept)
            if kept.format != FORMAT or any(len(pin.oids) != pin.files * OID_BYTES for pin in kept.pins):
                raise ValueError("of another format")
        except FileNotFoundError:
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("what is pinned cannot be read from %s (%s): nothing is", self._path, error)
            return
        self._pins = kept.pins
        await self._apply()

    async def add(self, pins: Sequence[Pin], owner: int = NOBODY) -> None:
        """Pin paths of a volume; the same path anew takes the place of what it was.

        Raises UsageError when that is too much, StorageUnavailable when it cannot be kept: nothing has changed then.
        """
        async with self._changing:
            places = {(pin.volume_id, pin.path) for pin in pins}
            others = [pin for pin in self._living() if (pin.volume_id, pin.path) not in places]
            takes = sum(pin.takes_bytes for pin in (*others, *pins))
            if takes > self.most_bytes:
                raise errors.UsageError(
                    f"pinned files would take {takes} bytes, and may take {self.most_bytes} at most "
                    f"({MOST:.0%} of the tier that keeps them): unpin others, or give the tier more room"
                )
            volumes = {pin.volume_id for pin in pins}
            own = sum(pin.takes_bytes for pin in (*others, *pins) if pin.volume_id in volumes)
            if own > self.most_of(owner):
                raise errors.UsageError(
                    f"pinned files of this volume would take {own} bytes, and may take {self.most_of(owner)} at most "
                    f"({MOST:.0%} of its quota): unpin others, or mount with a larger one"
                )
            await self._change([*others, *pins])

    async def remove(self, volume_id: str, paths: Sequence[bytes]) -> list[Pin]:
        """Unpin what was pinned at these paths or below them (none: in the whole volume); returns it. Raises
        StorageUnavailable.
        """
        async with self._changing:
            gone = [pin for pin in self._pins if pin.volume_id == volume_id and _is_meant(pin.path, paths)]
            if gone:
                await self._change([pin for pin in self._living() if pin not in gone])
            return gone

    async def watch(self) -> None:
        """Let go, for ever, of what is over."""
        while True:
            await trio.sleep(SWEEP_S)
            if len(self._living()) < len(self._pins):
                try:
                    async with self._changing:
                        await self._change(self._living())
                except errors.StorageUnavailable as error:
                    log.debug("%s", error)

    def _living(self) -> list[Pin]:
        now = self._clock()
        return [pin for pin in self._pins if pin.until is None or pin.until > now]

    async def _change(self, pins: list[Pin]) -> None:
        try:
            await trio.to_thread.run_sync(replace_durably, self._path, msgspec.msgpack.encode(_Kept(FORMAT, pins)))
        except OSError as error:
            raise errors.StorageUnavailable(f"{self._path} cannot be written: {error}", retryable=False) from error
        self._pins = pins
        await self._apply()

    async def _apply(self) -> None:
        living = self._living()
        self._numbers = _sorted_numbers(pin.oids for pin in living)
        if living:
            await self._guidance.keep(self.covers)
        else:
            await self._guidance.let_go(self.covers)


def _is_meant(path: bytes, paths: Sequence[bytes]) -> bool:
    return not paths or any(not meant or path == meant or path.startswith(meant + b"/") for meant in paths)


def _sorted_numbers(oids: Iterable[bytes]) -> array[int]:
    numbers = array("Q")
    for each in oids:
        halves = array("Q", each)
        numbers.extend(halves[::2])
    return array("Q", sorted(numbers))
