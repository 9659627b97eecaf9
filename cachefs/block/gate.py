"""A gate that many pass at once and one can close: short reads inside, rare changes of the whole with nobody inside.

The tier's readers hold views of a memory map; resizing or closing that map must wait until they are gone, and new
ones must wait meanwhile. Changes are rare and short, so a waiting one stops newcomers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """INVARIANT: `_closed` is only true while `_inside` is 0 or falling to 0. Not re-entrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._closed = False

    def __enter__(self) -> None:
        """Pass; waits while the gate is closed."""
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._inside -= 1
            if self._closed and not self._inside:
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Be alone: nobody is inside while the block runs."""
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._closed = True
            while self._inside:
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
