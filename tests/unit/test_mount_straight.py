"""Reads past the tiers: every reader is answered once, with its bytes, and memory is bounded."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs import errors
from cachefs.mount.straight import KEPT_S, MAX_FILES, MOST_BYTES, PIECE, Straight
from cachefs.types import Ino, ObjectId, Tier
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.ports import FilledBlock
from cachefs.vfs.reading import FileView, ReadPath

MIB = 1 << 20


def byte_at(offset: int, length: int) -> bytes:
    """A file whose bytes tell where they are."""
    first = offset // 8
    words = b"".join((first + number).to_bytes(8, "little") for number in range(length // 8 + 2))
    return words[offset % 8 : offset % 8 + length]


class Ranges:
    """An agent that answers when the test says so."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.asked: list[tuple[int, int]] = []
        self.absent = False
        self.failing = False

    def request(self, view: FileView, start: int, end: int, use: Any, otherwise: Any, *, fresh: bool) -> bool:
        assert fresh
        assert 0 <= start < end <= view.size
        if self.absent:
            return False
        self.asked.append((start, end))
        failing = self.failing

        def answer() -> None:
            if failing:
                otherwise(errors.StorageUnavailable("away"))
            else:
                use([memoryview(byte_at(start, end - start))])

        self.open.append(answer)
        return True

    def answer(self, number: int = 0) -> None:
        self.open.pop(number)()


class Rig:
    """Readers of one file, and what they got."""

    def __init__(self, size: int = 64 * MIB) -> None:
        self.ranges = Ranges()
        self.straight = Straight(cast("FileSystem", self))
        self.view = FileView(Ino(5), ObjectId(bytes(16)), size)
        self.outcomes: dict[int, str] = {}
        self.reads = 0

    def read(self, start: int, size: int, view: FileView | None = None) -> int:
        """Read as a kernel does; returns the number of the read. What is not ahead is asked for by itself."""
        view = view or self.view
        end = min(start + size, view.size)
        number = self.reads = self.reads + 1

        def use(slices: list[memoryview]) -> None:
            assert number not in self.outcomes, "answered twice"
            assert b"".join(slices) == byte_at(start, end - start)
            self.outcomes[number] = "ahead"

        def otherwise() -> None:
            assert number not in self.outcomes, "answered twice"
            self.outcomes[number] = "alone"

        self.straight.read(view, start, end, use, otherwise)
        return number

    def answer_all(self) -> None:
        while self.ranges.open:
            self.ranges.answer()


def test_a_sequence_is_read_ahead() -> None:
    rig = Rig()
    for offset in range(0, 32 * MIB, 128 << 10):
        rig.read(offset, 128 << 10)
        rig.answer_all()
    alone = [number for number, outcome in rig.outcomes.items() if outcome == "alone"]
    assert len(rig.outcomes) == 256
    assert len(alone) <= 9
    assert len(rig.ranges.asked) == len(set(rig.ranges.asked)) <= 20
    assert rig.straight.held_bytes <= 4 * PIECE


def test_who_is_faster_than_the_store_waits_for_the_piece() -> None:
    rig = Rig()
    rig.read(0, MIB)
    first = rig.read(2 * MIB - 100, 200)
    assert (0, 2 * MIB) not in rig.ranges.asked or first in rig.outcomes
    waiting = rig.read(2 * MIB, MIB)
    assert waiting not in rig.outcomes
    rig.answer_all()
    assert rig.outcomes[waiting] == "ahead"


def test_random_reads_are_asked_for_alone() -> None:
    rig = Rig()
    order = random.Random(1)
    for _ in range(300):
        rig.read(order.randrange(16, 64 * MIB // 4096) * 4096, 4096)
        rig.answer_all()
    assert set(rig.outcomes.values()) == {"alone"}
    assert sum(end - start for start, end in rig.ranges.asked) <= 2 * PIECE


@pytest.mark.parametrize("absent", [False, True])
def test_a_piece_that_fails_is_nobodys_error(absent: bool) -> None:
    rig = Rig()
    rig.ranges.absent, rig.ranges.failing = absent, not absent
    numbers = [rig.read(offset, MIB) for offset in range(0, 16 * MIB, MIB)]
    rig.answer_all()
    assert [rig.outcomes[number] for number in numbers] == ["alone"] * 16
    assert rig.straight.held_bytes == 0


def test_memory_is_bounded_and_everybody_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    views = [FileView(Ino(100 + number), ObjectId(bytes(16)), 64 * MIB) for number in range(MAX_FILES + 50)]
    for offset in range(0, 4 * MIB, MIB):
        for view in views:
            rig.read(offset, MIB, view)
            assert rig.straight.held_bytes <= MOST_BYTES
            if len(rig.ranges.open) > 8:
                rig.ranges.answer(3)
    rig.answer_all()
    assert len(rig.outcomes) == rig.reads
    now = time.monotonic() + KEPT_S + 1
    monkeypatch.setattr("cachefs.mount.straight.time.monotonic", lambda: now)
    for view in views[-MAX_FILES:]:  # each look forgets what the file read longest ago has
        rig.read(63 * MIB, 4096, view)
    rig.answer_all()
    assert rig.straight.held_bytes <= MOST_BYTES // 2


def test_old_pieces_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.read(0, MIB)
    rig.answer_all()
    now = time.monotonic() + KEPT_S + 1
    monkeypatch.setattr("cachefs.mount.straight.time.monotonic", lambda: now)
    assert rig.outcomes[rig.read(2 * MIB, 4096)] == "alone"


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["next", "jump", "answer", "fail", "mend"]), st.integers(0, 1 << 22)), max_size=60
    ),
    size=st.integers(1, 12 * MIB),
)
def test_everybody_is_answered_once(steps: list[tuple[str, int]], size: int) -> None:
    rig = Rig(size)
    at = 0
    for step, number in steps:
        match step:
            case "next" | "jump":
                at = number % size if step == "jump" else at
                if at < size:
                    length = min(1 + number % MIB, size - at)
                    rig.read(at, length)
                    at += length
            case "answer":
                if rig.ranges.open:
                    rig.ranges.answer(number % len(rig.ranges.open))
            case "fail" | "mend":
                rig.ranges.failing = step == "fail"
        assert rig.straight.held_bytes <= MOST_BYTES
    rig.answer_all()
    assert len(rig.outcomes) == rig.reads


async def test_an_agent_of_an_older_version_answers_from_its_tiers() -> None:
    """It knows of no ranges: the bytes are the same."""

    class OldAgent:
        async def fetch_range(self, ino: Ino, offset: int, length: int, *, fresh: bool = False) -> bytes:
            raise errors.Unsupported("no ranges")

        async def fill(self, ino: Ino, first: int, count: int, *, inline: bool = False) -> list[FilledBlock]:
            return [FilledBlock(first, Tier.DISK, byte_at(0, MIB))]

    reads = ReadPath(cast("Any", None), None, "endpoint", "bucket", MIB)
    filesystem = FileSystem(reads, cast("Any", OldAgent()), cast("Any", None), cast("Any", None))
    got: list[bytes] = []
    view = FileView(Ino(5), ObjectId(bytes(16)), MIB)
    await filesystem.with_fresh(view, 100, 300, lambda slices: got.append(b"".join(slices)))
    assert got == [byte_at(100, 200)]
