"""A tier alone: a model of it, its budget, reopening, and what readers see."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs import errors
from cachefs.block import codec, tier_files
from cachefs.block.ledger import LONGEST_INLINE, value_cost, value_pages
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.tier_reader import TierReader
from cachefs.types import BlockKey, Tier
from tests.support.blocks import BLOCK, KIB, MIB, contents, key, open_tier, payload, put


@pytest.fixture(params=[Tier.SHM, Tier.DISK])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Tier, Path]]:
    """A directory for a tier, the shm tier's on a real tmpfs."""
    if request.param is Tier.DISK:
        yield Tier.DISK, tmp_path / "disk"
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as path:
        yield Tier.SHM, Path(path, "shm")


SIZES = [0, 1, 700, 2010, 2011, 4096, 30000, BLOCK]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.tuples(st.integers(0, 99), st.sampled_from(SIZES)), max_size=12)),
        st.tuples(st.just("read"), st.integers(0, 99)),
        st.tuples(st.just("discard"), st.integers(0, 99)),
        st.tuples(st.just("touch"), st.integers(0, 99)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=25,
)  # fmt: skip


@given(steps, st.sampled_from([Tier.SHM, Tier.DISK]))
@settings(max_examples=40)
def test_model(program: list[tuple[str, object]], kind: Tier) -> None:
    """A read gives the bytes that were put first under the key, or nothing; the last puts are there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as path:
        tier = open_tier(path + "/tier", kind, limit=MIB + 400 * KIB)
        sizes: dict[int, int] = {}
        try:
            for step, what in program:
                if step == "put":
                    assert isinstance(what, list)
                    put(tier, [(key(i), payload(i, size)) for i, size in what])
                    for i, size in what:
                        # What was evicted in between may come back with another size.
                        if i not in sizes or contents(tier, i) == payload(i, size):
                            sizes[i] = size
                    assert all(key(i) in tier for i, _ in what)
                elif step == "reopen":
                    before = tier.stats()
                    tier.close()
                    tier = open_tier(path + "/tier", kind, limit=MIB + 400 * KIB)
                    assert tier.stats() == before
                else:
                    assert isinstance(what, int)
                    if step == "touch":
                        tier.touch([key(what)])
                    elif step == "discard":
                        tier.discard([key(what)])
                        assert key(what) not in tier
                        sizes.pop(what, None)
                    else:
                        found = contents(tier, what)
                        assert found is None or found == payload(what, sizes[what])
                        assert (found is not None) == (key(what) in tier)
            check_invariants(tier)
        finally:
            tier.close()


def check_invariants(tier: TierWriter) -> None:
    """Budget and accounts of a tier."""
    keys = tier.oldest_first()
    used = 0
    for name in keys:
        value = tier.read(name)
        assert value is not None
        used += value_cost(len(value))
    stats = tier.stats()
    assert (stats["used_bytes"], stats["blocks"]) == (used, len(keys))
    taken = sum(entry.stat().st_blocks * 512 for entry in Path(tier.directory).iterdir())
    assert max(used, taken) <= tier.limit_bytes


def test_the_file_never_outgrows_the_limit_with_mixed_sizes(directory: tuple[Tier, Path]) -> None:
    kind, path = directory
    tier, generator = open_tier(path, kind, limit=6 * MIB), random.Random(3)
    for number in range(1500):
        size = generator.choice([100, 3000, 20_000, 40_000, BLOCK])
        put(tier, [(key(number), payload(number % 50, size))])
        assert key(number) in tier
        if number % 100 == 0:
            check_invariants(tier)
    assert tier.stats()["used_bytes"] > 4.5 * MIB
    tier.close()


def test_least_recently_used_goes_first(directory: tuple[Tier, Path]) -> None:
    kind, path = directory
    tier = open_tier(path, kind, limit=2 * MIB)
    for number in range(200):
        put(tier, [(key(number), payload(number))])
        tier.touch([key(0)])
    assert key(0) in tier
    assert key(1) not in tier
    assert key(199) in tier
    tier.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_read_into_the_place_that_is_given(directory: tuple[Tier, Path], size: int) -> None:
    tier = open_tier(directory[1], directory[0])
    put(tier, [(key(1), payload(1, size))])
    stored = tier.read(key(1))
    assert stored is not None
    for room in (0, len(stored) - 1, len(stored), len(stored) + 100):
        place = memoryview(bytearray(room))
        found = tier.read(key(1), size, place)
        assert found is not None
        assert bytes(found) == bytes(stored)
        if room >= len(stored) and value_pages(len(stored)):
            assert isinstance(found, memoryview)
            assert found.obj is place.obj, "no memory of its own"
    assert tier.read(key(2), size, place) is None
    tier.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_lent_where_it_lies(directory: tuple[Tier, Path], size: int) -> None:
    tier = open_tier(directory[1], directory[0])
    put(tier, [(key(1), payload(1, size))])
    with tier.lend(key(1), size) as lent:
        assert lent is not None
        assert bytes(lent) == payload(1, size)
        assert lent.readonly
    for name, length in ((key(1), size + 1), (key(2), size)):
        with tier.lend(name, length) as lent:
            assert lent is None
    tier.close()
    with tier.lend(key(1), size) as lent:
        assert lent is None


def test_bytes_that_are_lent_stay_while_others_are_evicted(directory: tuple[Tier, Path]) -> None:
    kind, path = directory
    tier = open_tier(path, kind, limit=2 * MIB)
    put(tier, [(key(0), payload(0))])
    with tier.lend(key(0), BLOCK) as lent:
        assert lent is not None
        writer = threading.Thread(target=put, args=(tier, [(key(n), payload(n)) for n in range(1, 20)]))
        writer.start()
        writer.join(20)
        assert not writer.is_alive(), "nobody waits for who has borrowed"
        assert bytes(lent) == payload(0)
    tier.close()


def test_demotion_sees_the_bytes_before_they_go(directory: tuple[Tier, Path]) -> None:
    kind, path = directory
    tier, seen = open_tier(path, kind, limit=2 * MIB), {}

    def demote(keys: list[BlockKey]) -> None:
        for name in keys:
            seen[name] = tier.read(name)

    for number in range(60):
        put(tier, [(key(number), payload(number))], demote)  # type: ignore[arg-type]
    gone = [number for number in range(60) if key(number) not in tier]
    assert gone
    assert seen == {key(number): codec.encode(payload(number), key(number)) for number in gone}
    tier.close()


READER = """
import logging
import sys
from cachefs import errors
from cachefs.metrics import Counters
from cachefs.block.tier_reader import TierReader
from cachefs.types import BlockKey
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
lines = []
logging.getLogger("cachefs").addHandler(Lines())
counters = Counters()
reader = TierReader(sys.argv[1], counters=counters)
kept = []
for line in sys.stdin:
    command, _, argument = line.strip().partition(" ")
    if command == "keep":  # as many snapshots as asked for, all open at once
        kept.extend(reader.snapshot() for _ in range(int(argument)))
        print(len(kept), flush=True)
    elif command == "end":
        for snapshot in kept:
            snapshot.__exit__()
        kept.clear()
        print("ended", flush=True)
    elif command == "faults":
        print(int(counters.get("shm_faults")), len(lines), flush=True)
    elif command == "refresh":
        print(reader.refresh(), flush=True)
    elif command == "hold":
        snapshot = reader.snapshot()
        view = snapshot.get(bytes.fromhex(argument))
        print(len(view), flush=True)
    elif command == "held":
        import hashlib
        print(hashlib.sha256(view).hexdigest(), flush=True)
    else:
        found = reader.payload(BlockKey(bytes.fromhex(argument)))
        print(None if found is None else len(found), flush=True)
"""


class OtherProcess:
    """A TierReader in a process of its own (LMDB allows one environment per process)."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, name: BlockKey | int | None = None) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        argument = name.hex() if isinstance(name, bytes) else "" if name is None else str(name)
        self._process.stdin.write(f"{command} {argument}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def shm_tier() -> Iterator[tuple[TierWriter, OtherProcess]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as path:
        tier = open_tier(path + "/tier", Tier.SHM, limit=3 * MIB)
        reader = OtherProcess(Path(path, "tier"))
        yield tier, reader
        reader.kill()
        tier.close()


def test_readers_in_another_process_see_commits_and_keep_what_they_hold(
    shm_tier: tuple[TierWriter, OtherProcess],
) -> None:
    import hashlib

    tier, reader = shm_tier
    assert reader.ask("get", key(0)) == "None"
    put(tier, [(key(0), payload(0))])
    assert reader.ask("get", key(0)) == str(BLOCK)
    assert reader.ask("hold", key(0)) == str(BLOCK + codec.HEADER_SIZE)
    for number in range(1, 25):
        put(tier, [(key(number), payload(number))])
    tier.discard([key(0)])
    for number in range(25, 31):
        put(tier, [(key(number), payload(number))])
    assert reader.ask("held") == hashlib.sha256(codec.encode(payload(0), key(0))).hexdigest()


@pytest.mark.expect_warnings("not usable now")
def test_a_killed_reader_pins_nothing_after_a_reader_check(shm_tier: tuple[TierWriter, OtherProcess]) -> None:
    tier, reader = shm_tier
    put(tier, [(key(0), payload(0))])
    assert reader.ask("hold", key(0))
    failures = 0
    for number in range(1, 120):
        try:
            put(tier, [(key(number), payload(number))])
        except errors.TierUnavailable:
            failures += 1
    assert failures, "an open snapshot pins all pages that were freed since"
    check_invariants(tier)
    reader.kill()
    tier.maintain()
    for number in range(200, 260):
        put(tier, [(key(number), payload(number))])
    check_invariants(tier)


@pytest.mark.expect_warnings("cannot be used")
def test_a_reader_follows_a_new_environment(shm_tier: tuple[TierWriter, OtherProcess]) -> None:
    tier, reader = shm_tier
    put(tier, [(key(0), payload(0))])
    assert reader.ask("refresh") == "False"
    tier.close()
    successor = open_tier(tier.directory, Tier.SHM, limit=4 * MIB, block=128 * KIB)
    put(successor, [(key(1), payload(1))])
    assert reader.ask("get", key(1)) == "None"
    assert reader.ask("refresh") == "True"
    assert reader.ask("get", key(1)) == str(BLOCK)
    successor.close()


def test_readers_beyond_the_last_slot_find_nothing(shm_tier: tuple[TierWriter, OtherProcess]) -> None:
    tier, reader = shm_tier
    put(tier, [(key(0), payload(0))])
    slots = tier_files.LOCK_BYTES // 64
    assert reader.ask("keep", slots + 10) == str(slots + 10)
    faults, warnings = map(int, reader.ask("faults").split())
    assert 10 <= faults <= 20
    assert warnings == 1
    assert reader.ask("get", key(0)) == "None", "a miss, as for any block that is not there"
    assert reader.ask("end") == "ended"
    assert reader.ask("get", key(0)) == str(BLOCK)


def test_a_reader_whose_slot_was_cleared_finds_nothing_and_goes_on(shm_tier: tuple[TierWriter, OtherProcess]) -> None:
    """What somebody does who cannot see that the reader is alive (another name space of processes)."""
    tier, reader = shm_tier
    put(tier, [(key(0), payload(0))])
    assert reader.ask("get", key(0)) == str(BLOCK)
    lock_file = Path(tier.directory, tier_files.LOCK_FILE)
    with lock_file.open("r+b") as file:
        position = file.read().index(reader.pid.to_bytes(4, sys.byteorder))
        file.seek(position)
        file.write(bytes(4))
    assert reader.ask("get", key(0)) == "None"
    assert reader.ask("faults") == "1 1"
    assert reader.ask("get", key(0)) == str(BLOCK)


def test_a_reader_without_a_tier(tmp_path: Path) -> None:
    with pytest.raises(errors.TierUnavailable):
        TierReader(str(tmp_path))


def test_costs() -> None:
    assert value_pages(LONGEST_INLINE) == 0
    assert value_pages(LONGEST_INLINE + 1) == 1
    assert value_cost(MIB + 32) >= 257 * 4096


def test_a_limit_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.TierUnavailable, match="too small"):
        open_tier(tmp_path / "t", limit=MIB, block=MIB)


def test_a_block_larger_than_the_tier_is_refused(directory: tuple[Tier, Path]) -> None:
    kind, path = directory
    tier = open_tier(path, kind, limit=2 * MIB)
    with pytest.raises(errors.TierUnavailable), expecting_warnings():
        put(tier, [(key(0), bytes(4 * MIB))])
    put(tier, [(key(0), payload(0))])
    tier.close()


class expecting_warnings:
    """Swallow our warnings."""

    def __enter__(self) -> None:
        import logging

        logging.getLogger("cachefs.block").setLevel(logging.CRITICAL)

    def __exit__(self, *exc: object) -> None:
        import logging

        logging.getLogger("cachefs.block").setLevel(logging.NOTSET)


def test_a_larger_limit_keeps_everything_and_a_smaller_one_what_fits(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t", limit=4 * MIB)
    put(tier, [(key(number), payload(number)) for number in range(40)])
    tier.close()
    tier = open_tier(tmp_path / "t", limit=8 * MIB)
    assert tier.stats()["blocks"] == 40
    put(tier, [(key(number), payload(number)) for number in range(40, 80)])
    tier.close()
    tier = open_tier(tmp_path / "t", limit=3 * MIB)
    kept = [number for number in range(80) if key(number) in tier]
    assert 20 < len(kept) < 50
    assert all(contents(tier, number) == payload(number) for number in kept)
    check_invariants(tier)
    assert os.listdir(tmp_path) == ["t"]
    tier.close()
    assert tier_files.Stamp.load(str(tmp_path / "t")) is not None
