"""Which calls may be at work beside which: one lock for each name, held alone or by several who have different parts.

A volume is made, staged, expanded and taken away by one call at a time (`alone`); it is published to many targets at
once (`beside`, the target is the part), as long as none of those is under way. Whoever comes second is not kept
waiting, unless he says for how long: the caller of a plugin tries again by itself, and a thread that waits is one that
nobody else has.

INVARIANT: a name is in `_uses` exactly while somebody holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from csi.status import aborted

ALONE = ""
"""The part of whoever holds a name alone."""


@dataclass(slots=True)
class _Use:
    parts: set[str] = field(default_factory=set)


class CallLocks:
    """Locks by name. Any thread."""

    def __init__(self, what: str = "volume") -> None:
        """`what` is named in the refusal."""
        self._what = what
        self._changed = threading.Condition()
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def alone(self, name: str, *, wait_s: float = 0.0) -> Iterator[None]:
        """Hold a name that nobody else holds. Raises Refused (ABORTED) when somebody does."""
        with self._held(name, ALONE, wait_s):
            yield

    @contextmanager
    def beside(self, name: str, part: str, *, wait_s: float = 0.0) -> Iterator[None]:
        """Hold a name beside others who hold other parts of it. Raises Refused (ABORTED) when somebody holds this part,
        or all of it.
        """
        with self._held(name, part or "/", wait_s):
            yield

    @contextmanager
    def _held(self, name: str, part: str, wait_s: float) -> Iterator[None]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._free(name, part), wait_s):
                raise aborted(f"another call is at work on the {self._what} {name}: try again")
            self._uses.setdefault(name, _Use()).parts.add(part)
        try:
            yield
        finally:
            with self._changed:
                use = self._uses[name]
                use.parts.discard(part)
                if not use.parts:
                    del self._uses[name]
                self._changed.notify_all()

    def _free(self, name: str, part: str) -> bool:
        use = self._uses.get(name)
        if use is None:
            return True
        return part != ALONE and ALONE not in use.parts and part not in use.parts
