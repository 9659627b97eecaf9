"""How much may be brought ahead: grows while it helps, shrinks when the store or the tiers show that it is too much.

* `window`: pieces that may be under way at once. Additive increase with every one that came, halved by a failure (a
  store that throttles); one cut for each round, as in TCP (RFC 5681).
* `trust`: which share of the room may be filled with what nobody has read yet. Each piece that was evicted unread takes
  a tenth of it away, each piece that was read gives a hundredth back: with one wasted in ten it stays where it is.

INVARIANTS: LEAST_WINDOW <= window <= MOST_WINDOW; LEAST_TRUST <= trust <= 1.
"""

from __future__ import annotations

LEAST_WINDOW, FIRST_WINDOW, MOST_WINDOW = 8, 128, 512
PER_ROUND = 32
LEAST_TRUST = 1 / 64
LOST, GAINED = 0.9, 0.01


class Allowance:
    """The limits of one volume."""

    __slots__ = ("_round", "trust", "window")

    def __init__(self) -> None:
        self.window = float(FIRST_WINDOW)
        self.trust = 1.0
        self._round = 0
        """Pieces that have to be over before the window may be cut again."""

    def came(self) -> None:
        """A piece came."""
        self._round = max(0, self._round - 1)
        self.window = min(float(MOST_WINDOW), self.window + PER_ROUND / self.window)

    def failed(self, under_way: int) -> None:
        """The store refused a piece, or there was no room for it."""
        if self._round:
            self._round -= 1
            return
        self.window = max(float(LEAST_WINDOW), self.window / 2)
        self._round = under_way

    def used(self) -> None:
        """A piece was read by somebody."""
        self.trust = min(1.0, self.trust + GAINED)

    def wasted(self) -> None:
        """A piece was evicted, or given up, before anybody read it."""
        self.trust = max(LEAST_TRUST, self.trust * LOST)
