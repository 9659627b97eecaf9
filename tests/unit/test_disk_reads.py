"""The disk tier as workers read it, and which of their reads go there."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import errors
from cachefs.block import codec
from cachefs.block.disk_reader import DiskReader
from cachefs.metrics import Counters
from cachefs.mount.disk_reads import LARGEST_BLOCK, DiskReads, Request
from cachefs.types import BlockKey, Ino, ObjectId
from cachefs.vfs.reading import BlocksAhead, FileView, ReadPath
from tests.support.blocks import BLOCK, OID, key, open_tier, payload, put

BLOCKS = 12
SHORT = 500
"""The last block."""
SIZE = (BLOCKS - 1) * BLOCK + SHORT
BODY = b"".join(payload(index) for index in range(BLOCKS - 1)) + payload(BLOCKS - 1, SHORT)


def fill(directory: Path, indexes: range = range(BLOCKS)) -> None:
    """Make a disk tier with some of the blocks."""
    tier = open_tier(directory)
    put(tier, [(key(index), BODY[index * BLOCK : (index + 1) * BLOCK]) for index in indexes])
    tier.close()


@pytest.fixture
def memory() -> memoryview:
    return memoryview(bytearray(codec.HEADER_SIZE + BLOCK))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def tier(directory: Path, counters: Counters) -> Iterator[DiskReader]:
    fill(directory)
    reader = DiskReader(str(directory), BLOCK, counters)
    yield reader
    reader.close()


def read(tier: DiskReader, index: int, memory: memoryview, wanted: int = BLOCK) -> bytes | None:
    """Return the bytes of a block of the tier."""
    block = tier.read(key(index), wanted, memory)
    return None if block is None else bytes(block)


def open_files() -> list[str]:
    """Return what the descriptors of this process lead to."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def length(index: int) -> int:
    return min(BLOCK, SIZE - index * BLOCK)


# -- the tier ---------------------------------------------------------------------------------------------------------


def test_every_block_comes_back_checked(tier: DiskReader, memory: memoryview) -> None:
    for index in range(BLOCKS):
        assert read(tier, index, memory, length(index)) == BODY[index * BLOCK : index * BLOCK + length(index)]
    assert read(tier, BLOCKS, memory) is None
    assert read(tier, 0, memory, BLOCK - 1) is None, "a block of another length is another block"
    assert tier.expect([key(0), key(99), key(BLOCKS - 1)]) == [True, False, True]


def test_memory_that_is_too_short_is_not_overrun(tier: DiskReader) -> None:
    assert tier.read(key(0), BLOCK, memoryview(bytearray(BLOCK))) is None


def test_a_changed_byte_is_a_miss(directory: Path, tier: DiskReader, memory: memoryview) -> None:
    data = directory / "data.mdb"
    at = data.read_bytes().index(payload(3)[:64]) + 1000
    with data.open("r+b") as file:
        file.seek(at)
        file.write(bytes([payload(3)[1000] ^ 1]))
    assert read(tier, 3, memory) is None
    assert read(tier, 4, memory) == payload(4)


@pytest.mark.expect_warnings("the data file was cut")
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_file_that_is_cut_is_a_miss(
    directory: Path, tier: DiskReader, memory: memoryview, counters: Counters, keep: float
) -> None:
    data = directory / "data.mdb"
    os.truncate(data, int(data.stat().st_size * keep))
    assert read(tier, 3, memory) is None
    assert tier.expect([key(3)]) == [False]
    assert counters.get("disk_faults") == 2


def test_it_follows_to_a_tier_that_begins_anew(directory: Path, tier: DiskReader, memory: memoryview) -> None:
    shutil.rmtree(directory)
    assert read(tier, 3, memory) == payload(3), "the file that it has open is good for what it held"
    tier.follow()
    assert read(tier, 3, memory) is None, "its room is wanted by others"
    assert not [path for path in open_files() if path.startswith(str(directory))]
    fill(directory, range(6, 8))
    tier.follow()
    assert tier.expect([key(3), key(6)]) == [False, True]
    assert read(tier, 6, memory) == payload(6)


def test_it_comes_back_after_its_successor_could_not_be_opened(
    directory: Path, tier: DiskReader, memory: memoryview
) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "data.mdb").write_text("a shopping list")
    tier.follow()
    assert read(tier, 3, memory) is None
    shutil.rmtree(directory)
    fill(directory)
    tier.follow()
    assert read(tier, 3, memory) == payload(3)


@pytest.mark.parametrize("damage", ["absent", "empty directory", "noise", "cut"])
def test_what_cannot_be_opened(directory: Path, damage: str) -> None:
    if damage in ("noise", "cut"):
        fill(directory)
        data = directory / "data.mdb"
        data.write_bytes(os.urandom(100_000) if damage == "noise" else data.read_bytes()[:100_000])
    elif damage == "empty directory":
        directory.mkdir()
    with pytest.raises(errors.TierUnavailable):
        DiskReader(str(directory), BLOCK, Counters())


def test_blocks_of_another_size_are_refused(directory: Path) -> None:
    fill(directory)
    with pytest.raises(errors.TierUnavailable, match="block size"):
        DiskReader(str(directory), 2 * BLOCK, Counters())


def test_nothing_is_there_after_close(tier: DiskReader, memory: memoryview) -> None:
    tier.close()
    assert read(tier, 3, memory) is None
    assert tier.expect([key(3)]) == [False]


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 70), st.integers(0, 7)), max_size=20))
def test_what_is_known_of_the_blocks_ahead(looks: list[tuple[int, int, int]]) -> None:
    """It never says that a block is absent that was there when somebody looked last."""
    ahead = BlocksAhead()
    seen: dict[int, bool] = {}
    for first, count, seed in looks:
        indexes = range(first, first + count)
        there = {index for index in indexes if (index * 7 + seed) % 3}
        ahead.note(indexes, there)
        seen.update({index: index in there for index in indexes})
        assert [ahead.lacks(index) for index in indexes] == [not seen[index] for index in indexes]
        assert not [index for index in range(1000) if ahead.lacks(index) and seen.get(index, True)]


# -- which reads go there ---------------------------------------------------------------------------------------------


class Shm:
    """A shm tier that holds some blocks, as far as wishes look into it."""

    def __init__(self, held: set[int]) -> None:
        self._held = {key(index) for index in held}

    def snapshot(self) -> Shm:
        return self

    def __enter__(self) -> Shm:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is open."""

    def get(self, name: BlockKey) -> bytes | None:
        return b"there" if name in self._held else None

    def used_bytes(self) -> int:
        return 0


class Rig:
    """The threads of a worker on a disk tier, and what they do with requests."""

    def __init__(self, disk: DiskReader | None, shm: Shm | None = None) -> None:
        self.reads = ReadPath(None, shm, "", "", BLOCK)  # type: ignore[arg-type]
        self.reads.disk = disk
        self.asked: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.disk_reads = DiskReads(self.reads, lambda view, first, count: self.asked.put((first, count)))
        self.disk_reads.start()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disk_reads.close()

    def view(self, oid: ObjectId = OID) -> FileView:
        """A file that is read in sequence."""
        view = FileView(Ino(7), oid, SIZE)
        view.window.note(0, 1 << 20, 1 << 30)
        return view

    def read(self, view: FileView, start: int, end: int) -> bytes | None:
        """Return what a READ is answered with; None: it goes on to the agent."""
        self.disk_reads.read(
            Request(
                view, start, end,
                lambda slices: self.answers.put(b"".join(slices)),
                lambda: self.answers.put(None),
            )
        )  # fmt: skip
        return self.answers.get(timeout=10)


def test_reads_of_any_shape_give_the_bytes_of_the_file(tier: DiskReader) -> None:
    with Rig(tier) as rig:
        view = rig.view()
        for start, end in [(0, SIZE), (1, 2), (BLOCK - 1, BLOCK + 1), (3 * BLOCK + 5, 8 * BLOCK + 9), (SIZE - 1, SIZE)]:
            assert rig.read(view, start, end) == BODY[start:end], (start, end)
        for start in range(0, SIZE, 10_000):
            end = min(start + 10_000, SIZE)
            assert rig.read(view, start, end) == BODY[start:end]


def test_small_reads_of_one_block_read_it_once(tier: DiskReader) -> None:
    with Rig(tier) as rig:
        view = rig.view()
        for start in range(0, BLOCK, BLOCK // 16):
            assert rig.read(view, start, start + BLOCK // 16) == BODY[start : start + BLOCK // 16]
        hits, hit_bytes, touched = rig.disk_reads.take_counts()
        assert (hits, hit_bytes, touched) == (1, BLOCK, {key(0)})
        assert rig.disk_reads.take_counts() == (0, 0, set())


def test_what_is_not_on_the_disk_goes_on_to_the_agent(directory: Path) -> None:
    fill(directory, range(4))
    disk = DiskReader(str(directory), BLOCK, Counters())
    with Rig(disk) as rig:
        assert rig.read(rig.view(), 3 * BLOCK, 5 * BLOCK) is None, "half of it is not there"
        assert rig.read(rig.view(), 3 * BLOCK, 4 * BLOCK) == payload(3)
        rig.reads.disk = None
        assert rig.read(rig.view(), 2 * BLOCK, 3 * BLOCK) is None, "the tier was switched off"
        disk.close()


def test_what_is_read_again_goes_to_the_agent_while_the_shm_tier_has_room(tier: DiskReader) -> None:
    with Rig(tier, Shm(set())) as rig:
        view = rig.view()
        rig.reads.shm_limit_bytes = 20 * BLOCK
        for index in range(8):
            assert rig.read(view, index * BLOCK, (index + 1) * BLOCK) == payload(index)
        assert rig.read(view, 2 * BLOCK, 3 * BLOCK) is None
        assert rig.read(view, 2 * BLOCK, 3 * BLOCK) == payload(2), "the agent did not keep it: once more"
        rig.disk_reads.wish(view, 0, 10)
        assert rig.asked.get(timeout=10) == (0, 8)
        assert [view.on_disk.lacks(index) for index in (0, 7, 8, 9)] == [True, True, False, False]


def test_no_more_is_brought_into_the_shm_tier_than_fits(tier: DiskReader, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig(tier, Shm(set())) as rig:
        rig.reads.shm_limit_bytes = 11 * BLOCK
        view = rig.view()
        assert rig.read(view, 0, 10 * BLOCK) == BODY[: 10 * BLOCK]
        rig.disk_reads.wish(view, 0, 10)
        assert rig.asked.get(timeout=10) == (0, 5), "they are not there yet, and yet they count"
        assert rig.read(view, 8 * BLOCK, 9 * BLOCK) == payload(8)
        monkeypatch.setattr("cachefs.mount.disk_reads.ON_ITS_WAY_S", 0.0)
        assert rig.read(view, 7 * BLOCK, 8 * BLOCK) is None, "they did not come"


def test_an_answer_that_fails_is_not_lost(tier: DiskReader) -> None:
    with Rig(tier) as rig:
        passed_on = threading.Event()

        def fail(slices: list[memoryview]) -> None:
            raise RuntimeError("no answer")

        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("cachefs.mount.disk_reads.log.exception", lambda text, *_: said.append(text))
            rig.disk_reads.read(Request(rig.view(), 0, BLOCK, fail, passed_on.set))
            assert passed_on.wait(10)
            assert said
        assert rig.read(rig.view(), 0, BLOCK) == payload(0), "and the thread goes on"


def test_wishes_are_sorted_by_where_the_blocks_are(directory: Path) -> None:
    fill(directory, range(2, 6))
    disk = DiskReader(str(directory), BLOCK, Counters())
    with Rig(disk, Shm({0, 1, 9})) as rig:
        view = rig.view()
        rig.disk_reads.wish(view, 0, 99)
        assert [rig.asked.get(timeout=10) for _ in range(2)] == [(6, 3), (10, 2)]
        assert [view.on_disk.lacks(index) for index in (1, 2, 5, 6, 11, 12)] == [True, False, False, True, True, False]
        other = rig.view(ObjectId(b"object version 1"))
        rig.disk_reads.wish(other, 0, 3)
        assert rig.asked.get(timeout=10) == (0, 3)
        assert other.on_disk.lacks(2)
        rig.disk_reads.wish(other, 0, 0)
        rig.reads.disk = None
        rig.disk_reads.wish(view, 0, 3)
        assert rig.asked.get(timeout=10) == (2, 1), "who has no disk tier leaves it to the agent"
        disk.close()


def test_only_sequences_of_files_that_may_be_on_the_disk_go_there(tier: DiskReader) -> None:
    with Rig(tier) as rig:
        view = rig.view()
        assert rig.disk_reads.takes(view, 3 * BLOCK + 1)
        view.on_disk.note(range(2, 5), {2, 4})
        assert [rig.disk_reads.takes(view, index * BLOCK) for index in range(6)] == [
            True,
            True,
            True,
            False,
            True,
            True,
        ]
        assert not rig.disk_reads.takes(FileView(Ino(8), OID, SIZE), 0), "nobody reads it in sequence"
        rig.reads.block_size = 2 * LARGEST_BLOCK
        assert not rig.disk_reads.takes(view, 0), "the threads have no memory for that"
        rig.disk_reads.wish(view, 0, 1)
        assert rig.asked.get(timeout=10) == (0, 1), "so the agent has to read ahead"
        rig.reads.block_size = BLOCK
        rig.reads.disk = None
        assert not rig.disk_reads.takes(view, 0)
