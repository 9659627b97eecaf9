"""How new names and bytes are, while the bucket changes from outside: F1 to F4, R1, R2 and N4 of docs/SEMANTICS.md."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs.store.memory import MemoryStore
from tests.fuse.memory_s3 import MemoryS3
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name, evict_pages

MIB = 1 << 20
TTL_S = 2.0


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.fixture
def ttl(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount that trusts names for two seconds (an empty bucket)."""
    options = (f"--metadata-ttl={TTL_S}s", "--negative-ttl=1s")
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", *options)


@pytest.fixture
def forever(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount that trusts names for ever."""
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")


@pytest.fixture
def strict(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount that asks the store for every name."""
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--consistency=strict")


@pytest.fixture
def immutable(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount whose names never change."""
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--consistency=immutable")


# -- ttl --------------------------------------------------------------------------------------------------------------


def test_f1_a_change_shows_after_the_ttl_and_not_before(ttl: Mount, bucket: Bucket) -> None:
    path = ttl.path / "file"
    before = bucket.put("file", content("before", 100_000))
    started = time.monotonic()
    assert path.read_bytes() == before
    after = bucket.put("file", content("after", 50_000))
    found = path.read_bytes()
    if time.monotonic() - started < TTL_S:
        assert found == before
    wait_until(lambda: path.read_bytes() == after, 4 * TTL_S, "the new version shows after the time of the old one")
    assert os.stat(path).st_size == len(after)


def test_f1_a_listing_is_made_again_after_the_ttl(ttl: Mount, bucket: Bucket) -> None:
    bucket.fill({"d/a": b"a", "d/b": b"b"})
    started = time.monotonic()
    assert os.listdir(ttl.path / "d") == ["a", "b"]
    bucket.delete("d/a")
    bucket.put("d/c", b"c")
    if time.monotonic() - started < TTL_S / 2:
        assert os.listdir(ttl.path / "d") == ["a", "b"]
    wait_until(lambda: os.listdir(ttl.path / "d") == ["b", "c"], 4 * TTL_S, "the new listing shows")
    assert not (ttl.path / "d/a").exists()
    assert (ttl.path / "d/c").read_bytes() == b"c"


def test_f1_a_name_that_was_missing_appears_after_its_time(ttl: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    path = ttl.path / "late"
    assert errno_name(lambda: os.stat(path)) == "ENOENT"
    bucket.put("late", b"here")
    wait_until(path.exists, 5, "the name appears after the negative time")
    assert path.read_bytes() == b"here"


def test_f1_a_missing_name_is_asked_for_once(ttl: Mount, proxy: FaultProxy, bucket: Bucket) -> None:
    os.listdir(ttl.path)
    proxy.forget()
    started = time.monotonic()
    for _ in range(50):
        assert errno_name(lambda: os.stat(ttl.path / "missing")) == "ENOENT"
    if time.monotonic() - started < 1:
        assert proxy.count() == 0, "a valid listing proves that a name does not exist"


@pytest.fixture
def orderly(node: Node) -> Iterator[tuple[Mount, MemoryStore]]:
    """A mount (ttl of one second) of a store where directories vanish with their last key; SeaweedFS keeps them."""
    with MemoryS3() as server:
        node.environment.update(server.environment)
        options = ("--metadata-ttl=1s", "--negative-ttl=500ms")
        mount = node.mount(f"s3://{server.bucket}", f"--endpoint-url={server.endpoint_url}", *options)
        yield mount, server.store


def test_f1_a_directory_vanishes_and_comes_back(orderly: tuple[Mount, MemoryStore]) -> None:
    mount, store = orderly
    store.put("d/file", b"1")
    assert os.listdir(mount.path) == ["d"]
    assert os.listdir(mount.path / "d") == ["file"]
    store.delete("d/file")
    wait_until(lambda: os.listdir(mount.path) == [], 5, "a directory without keys is gone")
    assert errno_name(lambda: os.listdir(mount.path / "d")) == "ENOENT"
    store.put("d/other", b"2")
    wait_until(lambda: os.listdir(mount.path) == ["d"], 5, "it is there again")
    wait_until(lambda: os.listdir(mount.path / "d") == ["other"], 5, "with what it holds now")
    assert (mount.path / "d/other").read_bytes() == b"2"


def test_f1_an_empty_directory_fills_up(orderly: tuple[Mount, MemoryStore]) -> None:
    """The kernel keeps an empty listing too, in the page that says "." and "..", and must drop it when told to."""
    mount, store = orderly
    for _ in range(3):
        assert os.listdir(mount.path) == []
    store.put("first", b"1")
    wait_until(lambda: os.listdir(mount.path) == ["first"], 5, "the first name appears")
    store.delete("first")
    wait_until(lambda: os.listdir(mount.path) == [], 5, "it is gone")
    for _ in range(3):
        assert os.listdir(mount.path) == []
    store.put("second", b"2")
    wait_until(lambda: os.listdir(mount.path) == ["second"], 5, "the second name appears")


def test_f1_a_file_becomes_a_directory_and_back(orderly: tuple[Mount, MemoryStore]) -> None:
    mount, store = orderly
    path = mount.path / "x"
    store.put("x", b"file")
    assert path.read_bytes() == b"file"
    store.put("x/inside", b"inside")
    # A name that is known as a file is asked for as a file; its parent's next listing shows what hides it.
    wait_until(lambda: os.listdir(mount.path) and path.is_dir(), 5, "the directory hides the file")
    assert (path / "inside").read_bytes() == b"inside"
    store.delete("x/inside")
    wait_until(path.is_file, 5, "the file is seen again")
    assert path.read_bytes() == b"file"
    store.delete("x")
    wait_until(lambda: not path.exists(), 5, "the file is gone")


def test_f1_forever_never_asks_again(forever: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    before = bucket.put("d/file", content("before", 5000))
    assert os.listdir(forever.path / "d") == ["file"]
    assert (forever.path / "d/file").read_bytes() == before
    bucket.put("d/file", content("after", 6000))
    bucket.put("d/new", b"new")
    proxy.forget()
    time.sleep(1.5)
    assert (forever.path / "d/file").read_bytes() == before
    assert os.listdir(forever.path / "d") == ["file"]
    assert not (forever.path / "d/new").exists()
    assert proxy.count() == 0


# -- immutable --------------------------------------------------------------------------------------------------------


def test_f2_a_changed_object_is_an_error_and_never_other_bytes(
    immutable: Mount, bucket: Bucket, proxy: FaultProxy
) -> None:
    before = bucket.put("file", content("before", 32 * MIB))
    path = immutable.path / "file"
    with opened(path) as descriptor:
        assert os.pread(descriptor, 1000, 0) == before[:1000]
    wait_until(lambda: proxy.requests[-1].status != 0, 5, "readahead has come to rest")
    bucket.put("file", content("after", 32 * MIB))
    evict_pages(path)
    outcomes = set()
    with opened(path) as descriptor:
        for offset in range(0, len(before), MIB):
            try:
                assert os.pread(descriptor, MIB, offset) == before[offset : offset + MIB]
                outcomes.add("cached")
            except OSError as error:
                outcomes.add(os.strerror(error.errno or 0))
    assert "cached" in outcomes
    assert "Stale file handle" in outcomes
    assert len(outcomes) == 2, outcomes
    assert os.stat(path).st_size == len(before)


def test_f2_what_was_listed_is_pinned(immutable: Mount, bucket: Bucket) -> None:
    bucket.fill({"d/a": b"a", "d/b": b"b"})
    assert os.listdir(immutable.path / "d") == ["a", "b"]
    bucket.delete("d/a")
    bucket.put("d/c", b"c")
    time.sleep(0.5)
    assert os.listdir(immutable.path / "d") == ["a", "b"]
    assert errno_name((immutable.path / "d/a").read_bytes) == "ESTALE"
    assert not (immutable.path / "d/c").exists()


def test_f2_the_pin_outlives_the_mount(immutable: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({"d/a": b"a", "d/b": b"b"})
    assert os.listdir(immutable.path / "d") == ["a", "b"]
    immutable.umount()
    bucket.put("d/c", b"c")
    again = immutable.node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--consistency=immutable")
    assert os.listdir(again.path / "d") == ["a", "b"]


# -- strict -----------------------------------------------------------------------------------------------------------


def test_f3_every_open_and_stat_sees_the_store_as_it_is(strict: Mount, bucket: Bucket) -> None:
    path = strict.path / "d/file"
    for number in range(8):
        body = bucket.put("d/file", content(f"version {number}", 1000 + 37 * number))
        assert os.stat(path).st_size == len(body)
        assert path.read_bytes() == body
    bucket.delete("d/file")
    assert errno_name(lambda: os.stat(path)) == "ENOENT"
    bucket.put("d/file", b"back")
    assert path.read_bytes() == b"back"


def test_f3_every_opendir_sees_the_store_as_it_is(strict: Mount, bucket: Bucket) -> None:
    bucket.put("d/0", b"")
    for number in range(1, 6):
        bucket.put(f"d/{number}", b"")
        assert os.listdir(strict.path / "d") == [str(n) for n in range(number + 1)]
    for number in range(5):
        bucket.delete(f"d/{number}")
        assert os.listdir(strict.path / "d") == [str(n) for n in range(number + 1, 6)]


def test_f3_an_empty_directory_fills_up_at_once(strict: Mount, bucket: Bucket) -> None:
    for number in range(3):
        assert os.listdir(strict.path) == [str(n) for n in range(number)]
        assert os.listdir(strict.path) == [str(n) for n in range(number)]
        bucket.put(str(number), b"")


def test_f3_a_missing_name_is_asked_for_each_time(strict: Mount, bucket: Bucket) -> None:
    assert errno_name(lambda: os.stat(strict.path / "file")) == "ENOENT"
    bucket.put("file", b"now")
    assert (strict.path / "file").read_bytes() == b"now"


# -- inodes and versions ----------------------------------------------------------------------------------------------


def test_f4_a_changed_object_is_another_inode(strict: Mount, bucket: Bucket) -> None:
    bucket.put("file", b"one")
    bucket.put("same", b"same")
    first, same = os.stat(strict.path / "file").st_ino, os.stat(strict.path / "same").st_ino
    bucket.put("file", b"two")
    second = os.stat(strict.path / "file").st_ino
    assert first != second
    assert os.stat(strict.path / "same").st_ino == same
    bucket.put("same", b"same")  # the same bytes have the same etag: nothing changed
    assert os.stat(strict.path / "same").st_ino == same


@pytest.mark.parametrize("change", ["overwritten", "shortened", "deleted"])
def test_r2_an_open_file_stays_what_it_was(strict: Mount, bucket: Bucket, proxy: FaultProxy, change: str) -> None:
    before = bucket.put("file", content("before", 24 * MIB))
    with opened(strict.path / "file") as descriptor:
        assert os.pread(descriptor, 4096, 0) == before[:4096]
        if change == "overwritten":
            after = bucket.put("file", content("after", 24 * MIB))
        elif change == "shortened":
            after = bucket.put("file", content("after", 10))
        else:
            after = b""
            bucket.delete("file")
        assert os.pread(descriptor, 4096, 0) == before[:4096]
        assert os.fstat(descriptor).st_size == len(before)
        seen = {errno_of_piece(descriptor, before, offset) for offset in range(0, len(before), MIB)}
        assert seen in ({"", "ESTALE"}, {"ESTALE"}), seen
        if change == "deleted":
            assert errno_name(lambda: os.stat(strict.path / "file")) == "ENOENT"
        else:
            assert (strict.path / "file").read_bytes() == after
        assert os.pread(descriptor, 4096, 0) == before[:4096]
    stale = [line for line in strict.node.full_log().splitlines() if "file" in line and "ESTALE" in line]
    assert stale or "stale" in strict.node.full_log().lower(), "the log names the key"


def errno_of_piece(descriptor: int, body: bytes, offset: int) -> str:
    """Read one MiB and compare it; return the errno's name if it cannot be read."""

    def compare() -> None:
        assert os.pread(descriptor, MIB, offset) == body[offset : offset + MIB]

    return errno_name(compare)


def test_r1_a_reader_between_two_versions_never_mixes_them(strict: Mount, bucket: Bucket) -> None:
    """Both versions are overwritten again and again while a reader opens and reads the whole file."""
    versions = [content(f"version {number}", 5 * MIB + number) for number in range(2)]
    bucket.put("file", versions[0])
    outcomes: list[str] = []
    for turn in range(12):
        with opened(strict.path / "file") as descriptor:
            size = os.fstat(descriptor).st_size
            wanted = versions[size - 5 * MIB]
            position = 0
            bucket.put("file", versions[(turn + 1) % 2])
            try:
                while piece := os.pread(descriptor, 300_000, position):
                    assert piece == wanted[position : position + len(piece)]
                    position += len(piece)
                outcomes.append("whole")
                assert position == size
            except OSError as error:
                outcomes.append(os.strerror(error.errno or 0))
    assert set(outcomes) <= {"whole", "Stale file handle"}, outcomes


# -- what costs no request --------------------------------------------------------------------------------------------


def test_n4_the_second_listing_makes_no_request(forever: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({f"d/{number:04}": b"x" for number in range(1200)} | {"d/sub/x": b"x"})
    first = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(forever.path / "d"))
    assert len(first) == 1201
    proxy.forget()
    for _ in range(2):
        again = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(forever.path / "d"))
        assert again == first
    assert proxy.count() == 0, proxy.requests


def test_n4_stat_and_open_of_listed_names_make_no_request(forever: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    names = [f"d/{number}" for number in range(50)]
    bucket.fill(dict.fromkeys(names, b"12345"))
    os.listdir(forever.path / "d")
    proxy.forget()
    for name in names:
        assert os.stat(forever.path / name).st_size == 5
        os.close(os.open(forever.path / name, os.O_RDONLY))
    assert proxy.count() == 0, proxy.requests
    assert (forever.path / "d/7").read_bytes() == b"12345"
    assert proxy.counts() == {"get": 1}


def test_n4_the_listing_outlives_the_mount(forever: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({f"d/{number}": b"x" for number in range(30)})
    first = os.listdir(forever.path / "d")
    forever.umount()
    again = forever.node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")
    proxy.forget()
    assert os.listdir(again.path / "d") == first
    assert proxy.count() == 0


def test_names_asked_one_by_one_become_one_listing(forever: Mount, bucket: Bucket, proxy: FaultProxy) -> None:
    """Two hundred names of one directory must not cost two hundred requests."""
    bucket.fill({f"d/{number:03}": b"x" for number in range(200)})
    proxy.forget()
    for number in range(200):
        os.stat(forever.path / f"d/{number:03}")
    assert proxy.count() < 40, proxy.counts()
