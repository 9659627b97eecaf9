"""What was asked for ahead and not read yet: on its way, or there and waiting for its reader. Counts what became of it.

    issued --came--> waiting --a reader begins it--> used
       |                 +--evicted, or nobody came for LONGEST_S--> wasted
       +--a reader begins it--> late (and used, when it comes)

INVARIANT: `held_bytes` and `far_bytes` are the sum over all that is known here; each piece is counted once as used or
wasted at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from cachefs import metrics
from cachefs.metrics import Counters
from cachefs.prefetch.allowance import Allowance
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.types import Ino, ObjectId, Tier

LONGEST_S = 600.0
"""After this nobody is expected to come for it."""
LOOKED_AT = 32
"""Pieces that are looked at in one go: are they still there?"""


@dataclass(eq=False, slots=True)
class _Issued:
    piece: Piece
    ino: Ino
    length: int
    issued_at_s: float
    rest: bool
    on_its_way: bool = True
    late: bool = False


class Outstanding:
    """The pieces of one volume."""

    def __init__(self, counters: Counters, allowance: Allowance) -> None:
        self._counters = counters
        self._allowance = allowance
        self._by_ino: OrderedDict[Ino, list[_Issued]] = OrderedDict()
        self._by_piece: dict[tuple[ObjectId, int], _Issued] = {}
        """Those on their way."""
        self._waiting: OrderedDict[tuple[ObjectId, int], _Issued] = OrderedDict()
        """Those that came, in the order in which they came."""
        self.held_bytes = 0
        self.landed_bytes = 0
        """Of those that came."""
        self.rest_bytes = 0
        """Of `held_bytes`: what has no order."""
        self.far_bytes = self.far_landed_bytes = 0
        """The same of what goes to the tier behind the nearest one."""
        self._round: list[tuple[ObjectId, int]] = []
        """Those that are still to be looked at in this round."""

    @property
    def under_way(self) -> int:
        """How many are on their way."""
        return len(self._by_piece)

    def __contains__(self, ino: object) -> bool:
        return ino in self._by_ino

    def issue(self, ino: Ino, piece: Piece, length: int, now_s: float, *, rest: bool = False) -> bool:
        """A piece of a file is asked for: so many bytes. Returns False when it was already. `rest`: see `Wish`."""
        key = (piece.oid, piece.first)
        if key in self._by_piece or key in self._waiting:
            return False
        issued = _Issued(piece, ino, length, now_s, rest)
        self._by_ino.setdefault(ino, []).append(issued)
        self._by_piece[key] = issued
        self._hold(issued, length)
        return True

    def _hold(self, issued: _Issued, length: int) -> None:
        if issued.piece.to is Tier.DISK:
            self.far_bytes += length
        else:
            self.held_bytes += length
            self.rest_bytes += length * issued.rest

    def _land(self, issued: _Issued, length: int) -> None:
        if issued.piece.to is Tier.DISK:
            self.far_landed_bytes += length
        else:
            self.landed_bytes += length

    def begun(self, ino: Ino) -> bool:
        """A reader began a file; returns whether it had been asked for."""
        pieces = self._by_ino.pop(ino, None)
        if pieces is None:
            return False
        for issued in pieces:
            if issued.on_its_way:
                issued.late = True
                self._count(metrics.PREFETCH_LATE, metrics.PREFETCH_LATE_BYTES, issued.length)
            else:
                self._use(issued)
                self._forget(issued)
        return True

    def over(self, piece: Piece, outcome: Outcome) -> Ino | None:
        """A piece is not on its way any more; returns whose it was."""
        issued = self._by_piece.pop((piece.oid, piece.first), None)
        if issued is None:
            return None
        issued.on_its_way = False
        if outcome in (Outcome.FETCHED, Outcome.JOINED, Outcome.FAILED, Outcome.GONE):
            self._count(metrics.PREFETCH_ISSUED, metrics.PREFETCH_ISSUED_BYTES, issued.length)
        if outcome in (Outcome.FAILED, Outcome.DROPPED):
            self._allowance.failed(self.under_way)
        else:
            self._allowance.came()
        if outcome is Outcome.FETCHED and not issued.late:
            self._waiting[piece.oid, piece.first] = issued
            self._land(issued, issued.length)
            return issued.ino
        if outcome is Outcome.JOINED and not issued.late:
            self._count(metrics.PREFETCH_LATE, metrics.PREFETCH_LATE_BYTES, issued.length)
        if outcome in (Outcome.FETCHED, Outcome.JOINED):
            self._use(issued)
        self._forget(issued)
        return issued.ino

    def look(self, now_s: float, holds: Callable[[ObjectId, int], bool]) -> None:
        """Find out whether those that came are still there: some of them each time, in turn, and the oldest."""
        for _ in range(min(LOOKED_AT, len(self._waiting))):
            key, issued = next(iter(self._waiting.items()))
            if now_s - issued.issued_at_s < LONGEST_S and holds(*key):
                break
            self._waste(issued)
        self._round = self._round or list(self._waiting)
        for key in self._round[-LOOKED_AT:]:
            waiting = self._waiting.get(key)
            if waiting is not None and not holds(*key):
                self._waste(waiting)
        del self._round[-LOOKED_AT:]

    def give_up(self) -> None:
        """Nobody will come any more."""
        for issued in list(self._waiting.values()):
            self._waste(issued)

    def _waste(self, issued: _Issued) -> None:
        self._count(metrics.PREFETCH_WASTED, metrics.PREFETCH_WASTED_BYTES, issued.length)
        self._allowance.wasted()
        self._forget(issued)

    def _use(self, issued: _Issued) -> None:
        self._count(metrics.PREFETCH_USED, metrics.PREFETCH_USED_BYTES, issued.length)
        self._allowance.used()

    def _forget(self, issued: _Issued) -> None:
        if self._waiting.pop((issued.piece.oid, issued.piece.first), None) is not None:
            self._land(issued, -issued.length)
        self._hold(issued, -issued.length)
        of_file = self._by_ino.get(issued.ino)
        if of_file is not None and issued in of_file:
            of_file.remove(issued)
            if not of_file:
                del self._by_ino[issued.ino]

    def _count(self, pieces: metrics.Metric, of_bytes: metrics.Metric, length: int) -> None:
        self._counters.add(pieces.name)
        self._counters.add(of_bytes.name, length)
