"""One budget of bytes, divided so that nobody who holds on to a part of it keeps the others out.

Whoever holds something already may have at most `greed` times what is still free (the dynamic threshold of switches
with a shared packet buffer), and leaves the last quarter alone: it is for those who hold nothing yet. So one alone gets
most of the budget, and however many hold on to theirs, whoever comes next is served piece by piece.

INVARIANT: `held_bytes` is the sum of what was taken and not given back. It exceeds the budget only while a single piece
is held that is larger than the whole budget.
"""

from __future__ import annotations


class Shares:
    """Pure bookkeeping, O(1). One thread."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._reserve = budget_bytes // 4
        self.held_bytes = 0
        self._held: dict[object, int] = {}

    def fits(self, who: object, size: int, *, greed: float) -> bool:
        """Whether `who` may take so many bytes now."""
        if not self.held_bytes:
            return True
        free = self.budget_bytes - self.held_bytes
        own = self._held.get(who, 0)
        return own + size <= greed * (free - self._reserve) if own else size <= free

    def take(self, who: object, size: int) -> None:
        """Count bytes as held."""
        self.held_bytes += size
        self._held[who] = self._held.get(who, 0) + size

    def give_back(self, who: object, size: int) -> None:
        """Count bytes as free again."""
        self.held_bytes -= size
        left = self._held.get(who, 0) - size
        if left > 0:
            self._held[who] = left
        else:
            self._held.pop(who, None)
