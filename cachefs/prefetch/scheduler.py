"""When and how much is brought ahead: wishes of the detectors become batches of pieces, within what is allowed.

    files begun --> Planner --wishes--> pump --batches of pieces--> Fetches (behind all readers)
                       ^                  ^ |
                       +-- listings       | +--> Outstanding: used, wasted, late --> Allowance
                                          +-- room in the tiers, divided among the volumes that want it

What readers who go in order will want may take a share of the tier, whatever is in it; the rest of a shuffled epoch
only what is free: it must not evict what may be as near. Both count what was brought and not read yet. When nothing
is free in the nearest tier any more, the rest goes straight to the one behind it, as far as that has free room.

INVARIANT: never more pieces under way than the window, and never more bytes outstanding than the room (but for one
file). Everything happens in one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cachefs.metrics import Counters
from cachefs.prefetch.allowance import Allowance
from cachefs.prefetch.outstanding import Outstanding
from cachefs.prefetch.planner import LARGE_BYTES, Planner, Wish, is_large
from cachefs.prefetch.ports import Fetches, Outcome, Piece, Tree
from cachefs.types import Ino, ObjectId, ObjectVersion, Tier, block_count

LEAST_BATCH = 16
"""Fewer pieces are not worth a batch while others are under way."""
LOOKED_AT = 4096
"""Wishes that are looked at in one go, most of which may be in a tier already."""
TAIL_BYTES = 256 << 10
"""What is read first of a file that is read from its end: footers, and the directory of a zip file (64 KiB at most).
The end of a file may lie in two blocks.
"""
MAX_BEGUN = 4096


@dataclass(frozen=True, slots=True)
class Room:
    """How many bytes may be outstanding."""

    ordered_bytes: int
    """While what is wanted has an order that is known."""
    rest_bytes: int
    """When what has no order is added."""
    far_bytes: int = 0
    """Of what has no order, in the tier behind the nearest one, beside that."""


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """What the tiers have for what is brought ahead."""

    ordered_bytes: int
    """For what has an order, whatever else is in them."""
    free_bytes: int
    """Not used by anybody at this moment."""
    far_bytes: int = 0
    """The same of the tier behind the nearest one; 0 when there is none."""


class VolumePrefetch:
    """What is brought ahead for one volume."""

    def __init__(self, tree: Tree, fetches: Fetches, block_size: int, counters: Counters) -> None:
        self.tree = tree
        self.planner = Planner(tree)
        self.allowance = Allowance()
        self.outstanding = Outstanding(counters, self.allowance)
        self._fetches = fetches
        self._block_size = block_size
        self._extra: list[tuple[Ino, Piece, int]] = []
        self._tailed: OrderedDict[Ino, None] = OrderedDict()
        """Files that were begun at their end, and not yet at their beginning."""
        self.landed_before = 0
        """Bytes that had come and were not read when somebody looked into the tiers last."""
        self.far_landed_before = 0
        """The same of the tier behind the nearest one."""
        self.own_space: Callable[[], Space | None] = lambda: None
        """What the volume has for itself, if it has less than the tiers have."""
        self.on_over: Callable[[], None] = lambda: None
        """Called when pieces came: there may be room for others."""
        self.on_gone: Callable[[Ino], None] = lambda ino: None
        """Called with a file whose version is not in the store any more."""

    def note(self, begun: Sequence[tuple[int, int]]) -> None:
        """Readers began these files: (inode number, block of the first read)."""
        for number, block in begun[:MAX_BEGUN]:
            ino = Ino(number)
            proposed = self.outstanding.begun(ino)
            at_tail = block > 0 and self._note_tail(ino, block)
            if at_tail:
                self._tailed[ino] = None
                if len(self._tailed) > MAX_BEGUN:
                    self._tailed.popitem(last=False)
            elif block == 0 and self._tailed.pop(ino, self) is None:
                continue  # its beginning follows on its end: the same reader
            if block == 0 or at_tail:
                self.planner.note(ino, at_tail=at_tail, proposed=proposed)

    def _note_tail(self, ino: Ino, block: int) -> bool:
        """Whether a file was begun at its end; then its head comes next."""
        version = self.tree.version(ino)
        if version is None:
            return False
        at_tail = self._tail(version[1].size) <= block < block_count(version[1].size, self._block_size)
        if at_tail and not self._fetches.holds(version[0], 0):
            self._extra.append((ino, Piece(*version, 0, 1), self._block_size))
            del self._extra[:-LEAST_BATCH]
        return at_tail

    def _tail(self, size: int) -> int:
        """Return the first block of a file's end."""
        return max(0, size - TAIL_BYTES) // self._block_size

    # -- asking --------------------------------------------------------------------------------------------------------

    def pump(self, now_s: float, room: Room) -> bool:
        """Ask for what is wanted, as far as it is allowed; returns whether there may be more at once."""
        self.outstanding.look(now_s, self._fetches.holds)
        free = int(self.allowance.window) - self.outstanding.under_way
        if free < min(LEAST_BATCH, self.allowance.window / 4) and self.outstanding.under_way:
            return False
        pieces: list[Piece] = []
        for ino, piece, length in self._extra:
            self._issue(pieces, ino, piece, length, now_s)
        self._extra.clear()
        trust = self.allowance.trust
        held = self.outstanding

        def ordered_left() -> bool:
            return held.held_bytes - held.rest_bytes < int(room.ordered_bytes * trust)

        def rest_left() -> bool:
            return held.held_bytes < int(room.rest_bytes * trust)

        def far_left() -> bool:
            return held.far_bytes < int(room.far_bytes * trust)

        looked = self._take(self.planner.ordered(), pieces, free, ordered_left, now_s)
        if looked < LOOKED_AT:
            looked += self._take(self.planner.rest(), pieces, free, rest_left, now_s)
        if looked < LOOKED_AT and room.far_bytes:
            looked += self._take(self.planner.rest(), pieces, free, far_left, now_s, to=Tier.DISK)
        if pieces:
            self._fetches.prefetch(pieces, self._done)
        return looked >= LOOKED_AT

    def _take(
        self,
        wishes: Iterator[Wish],
        pieces: list[Piece],
        free: int,
        has_room: Callable[[], bool],
        now_s: float,
        to: Tier | None = None,
    ) -> int:
        """Turn wishes into pieces for a tier (see `Piece`); returns how many were looked at."""
        looked = 0
        while len(pieces) < free and looked < LOOKED_AT and has_room():
            wish = next(wishes, None)
            if wish is None:
                break
            looked += 1
            version = None if wish.ino in self.outstanding else self.tree.version(wish.ino)
            if version is not None:
                for piece in self._pieces(version, from_tail=wish.from_tail, to=to):
                    length = min(piece.count * self._block_size, version[1].size - piece.first * self._block_size)
                    self._issue(pieces, wish.ino, piece, length, now_s, rest=wish.rest)
        return looked

    def _pieces(self, version: tuple[ObjectId, ObjectVersion], *, from_tail: bool, to: Tier | None) -> Iterator[Piece]:
        """Give what is wanted of a file: all of it, or head or tail of a large one, as far as it is in no tier."""
        blocks = block_count(version[1].size, self._block_size)
        parts = [(0, blocks)]
        if is_large(version[1].size):
            tail = self._tail(version[1].size)
            parts = [(tail, blocks - tail), (0, 1)] if from_tail else [(0, max(1, LARGE_BYTES // self._block_size))]
        for first, count in parts:
            if count and not self._fetches.holds(version[0], first):
                yield Piece(*version, first, count, to)

    def _issue(
        self, pieces: list[Piece], ino: Ino, piece: Piece, length: int, now_s: float, *, rest: bool = False
    ) -> None:
        if self.outstanding.issue(ino, piece, length, now_s, rest=rest):
            pieces.append(piece)

    def _done(self, results: Sequence[tuple[Piece, Outcome]]) -> None:
        for piece, outcome in results:
            ino = self.outstanding.over(piece, outcome)
            if outcome is Outcome.GONE and ino is not None:
                self.on_gone(ino)
        self.on_over()


class Scheduler:
    """All volumes of the agent, which take turns."""

    def __init__(self, space: Callable[[], Space]) -> None:
        """`space` may give the same object for a while: what came since then counts against it."""
        self._space = space
        self._known: Space | None = None
        self.volumes: list[VolumePrefetch] = []

    def pump(self, now_s: float) -> bool:
        """Let every volume ask for what it may; returns whether there may be more at once."""
        space = self._space()
        if space is not self._known:
            self._known = space
            for volume in self.volumes:
                volume.landed_before = volume.outstanding.landed_bytes
                volume.far_landed_before = volume.outstanding.far_landed_bytes
        again = False
        self.volumes = [*self.volumes[1:], *self.volumes[:1]]
        active = sum(volume.outstanding.held_bytes > 0 for volume in self.volumes)
        for volume in self.volumes:
            sharing = max(1, active + (volume.outstanding.held_bytes == 0))
            own = volume.own_space() or space
            rest_bytes = volume.landed_before + min(space.free_bytes // sharing, own.free_bytes)
            far_bytes = volume.far_landed_before + min(space.far_bytes // sharing, own.far_bytes)
            ordered_bytes = min(space.ordered_bytes // sharing, own.ordered_bytes)
            again |= volume.pump(now_s, Room(ordered_bytes, rest_bytes, far_bytes))
        return again
