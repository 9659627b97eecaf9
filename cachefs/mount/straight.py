"""Reads that pass the tiers by: of mounts with --no-cache, and of files that were opened with O_DIRECT.

    channel thread --range--> agent --GET, If-Match--> the bytes --> kernel
                   \\--a sequence: pieces ahead of it, in memory of this process, for moments--/

Nothing of them is stored in a tier, and what the tiers or other nodes have is not asked for. A reader in sequence would
wait for the store at every step, so pieces of `PIECE` bytes are read ahead of it; a piece goes when it was read to its
end, or is `KEPT_S` old.

INVARIANTS
* A reader gets bytes that were asked of the store for itself, or ahead of it in the last `KEPT_S`, in the version that
  its inode names.
* Pieces, with those on their way, are `MOST_BYTES` at the most.
* A piece that fails is nobody's error: the ranges that it was for are asked for by themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from cachefs import errors
from cachefs.prefetch.window import ReadWindow
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.reading import FileView

log = logging.getLogger(__name__)

PIECE = 2 << 20
MOST_BYTES = 32 << 20
INITIAL, MAXIMUM = 2 * PIECE, 4 * PIECE
"""How far ahead of one reader."""
FEW_STEPS = 4
KEPT_S = 10.0
MAX_FILES = 256
"""Files whose readers are followed."""

Use = Callable[[list[memoryview]], None]


class _Piece:
    """`body` is there, or who waits for it is called when it is (or has failed: `body` stays None)."""

    __slots__ = ("begun_at", "body", "over", "waiting")

    def __init__(self) -> None:
        self.begun_at = time.monotonic()
        self.body: bytes | None = None
        self.over = False
        self.waiting: list[Callable[[], None]] = []


class _Follower:
    """The readers of one file."""

    __slots__ = ("pieces", "view", "window")

    def __init__(self, view: FileView) -> None:
        self.view = view
        self.window = ReadWindow(INITIAL, MAXIMUM)
        self.pieces: dict[int, _Piece] = {}


class Straight:
    """Pieces ahead of readers of one mount. Any thread; nothing here waits."""

    def __init__(self, filesystem: FileSystem) -> None:
        self._filesystem = filesystem
        self._lock = threading.Lock()
        self._followers: OrderedDict[int, _Follower] = OrderedDict()
        self._held = 0

    @property
    def held_bytes(self) -> int:
        """What pieces take, with those on their way."""
        return self._held

    def read(self, view: FileView, start: int, end: int, use: Use, otherwise: Callable[[], None]) -> None:
        """Call `use` with the bytes, at once or when they come, or `otherwise`: they have to be asked for."""
        ask: list[tuple[int, _Piece]] = []
        with self._lock:
            self._forget_old()
            follower = self._follow(view)
            pieces = [follower.pieces.get(number) for number in range(start // PIECE, (end - 1) // PIECE + 1)]
            wish = follower.window.note(start, end - start, view.size)
            for span in () if wish is None else (wish, *follower.window.more()):
                ask += self._promise(follower, span, end - start)
            there = [piece for piece in pieces if piece is not None]
            waits = [piece for piece in there if not piece.over]
            again = _Countdown(len(waits), lambda: self._answer(follower, there, start, end, use, otherwise))
            if len(there) == len(pieces):
                for piece in waits:
                    piece.waiting.append(again.one_less)
        for number, piece in ask:
            self._fetch(view, follower, number, piece)
        if len(there) < len(pieces):
            otherwise()
        elif not waits:
            self._answer(follower, there, start, end, use, otherwise)

    def _follow(self, view: FileView) -> _Follower:
        follower = self._followers.pop(view.ino, None) or _Follower(view)
        self._followers[view.ino] = follower
        while len(self._followers) > MAX_FILES:
            _, oldest = self._followers.popitem(last=False)
            for number in list(oldest.pieces):
                self._drop(oldest, number)
        return follower

    def _promise(self, follower: _Follower, span: tuple[int, int], step: int) -> list[tuple[int, _Piece]]:
        """Return pieces to fetch, as many as there is room for.

        The one in which the reader is, only if he would have to ask for the rest of it in many steps.
        """
        start, end = span[0], min(span[1], follower.view.size)
        promised = []
        for number in range(start // PIECE, (end - 1) // PIECE + 1):
            is_worth_it = number * PIECE >= start or (number + 1) * PIECE - start > FEW_STEPS * step
            if number not in follower.pieces and is_worth_it and self._held + PIECE <= MOST_BYTES:
                piece = follower.pieces[number] = _Piece()
                self._held += PIECE
                promised.append((number, piece))
        return promised

    def _fetch(self, view: FileView, follower: _Follower, number: int, piece: _Piece) -> None:
        def landed(body: bytes | None) -> None:
            with self._lock:
                piece.body, piece.over = body, True
                waiting, piece.waiting = piece.waiting, []
                if body is None and follower.pieces.get(number) is piece:
                    self._drop(follower, number)
            for tell in waiting:
                tell()

        def fail(error: errors.CachefsError | None) -> None:
            if error is not None:
                log.debug("reading ahead: %s", error)
            landed(None)

        start, end = number * PIECE, min((number + 1) * PIECE, view.size)
        ranges = self._filesystem.ranges
        if not ranges.request(view, start, end, lambda slices: landed(bytes(slices[0])), fail, fresh=True):
            landed(None)

    def _answer(
        self,
        follower: _Follower,
        pieces: list[_Piece],
        start: int,
        end: int,
        use: Use,
        otherwise: Callable[[], None],
    ) -> None:
        slices, at = [], start
        for piece in pieces:
            limit = min(end, (at // PIECE + 1) * PIECE)
            if piece.body is None or len(piece.body) < (limit - 1) % PIECE + 1:
                otherwise()
                return
            slices.append(memoryview(piece.body)[at % PIECE : at % PIECE + limit - at])
            at = limit
        use(slices)
        with self._lock:
            for number in range(start // PIECE, (end - 1) // PIECE + 1):
                if end >= min((number + 1) * PIECE, follower.view.size):
                    self._drop(follower, number)

    def _drop(self, follower: _Follower, number: int) -> None:
        if follower.pieces.pop(number, None) is not None:
            self._held -= PIECE

    def _forget_old(self) -> None:
        """Pieces that nobody came for; the files that were read longest ago are the first."""
        limit = time.monotonic() - KEPT_S
        for follower in list(self._followers.values()):
            for number, piece in list(follower.pieces.items()):
                if piece.over and piece.begun_at < limit:
                    self._drop(follower, number)
            if follower.pieces:
                break


class _Countdown:
    """Calls something when so many others are over."""

    __slots__ = ("_call", "_left", "_lock")

    def __init__(self, count: int, call: Callable[[], None]) -> None:
        self._left = count
        self._call = call
        self._lock = threading.Lock()

    def one_less(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._call()
