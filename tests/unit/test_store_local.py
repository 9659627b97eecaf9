"""What is special about a directory as an origin: links, races, odd files, huge directories."""

from __future__ import annotations

import os
import subprocess
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.errors import AccessDenied, BadBody, BucketNotFound, NotFound, StaleObject, Unsupported
from cachefs.store import local
from cachefs.store.local import LocalStore
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ObjectStore


def everything(store: ObjectStore, prefix: str = "", delimiter: str = "/", limit: int = 1000) -> list[str]:
    """All keys and prefixes of a listing in sort order of the pages."""
    found: list[str] = []
    token = None
    while True:
        page = store.list_page(prefix, delimiter=delimiter, token=token, limit=limit)
        found += sorted([entry.key for entry in page.objects] + list(page.prefixes), key=os.fsencode)
        token = page.next_token
        if token is None:
            return found


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "dir").mkdir(parents=True)
    (root / "dir" / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (root / "to-file").symlink_to("dir/file")
    (root / "to-dir").symlink_to("dir")
    (root / "out").symlink_to("../secret")
    (root / "out-absolute").symlink_to(tmp_path / "secret")
    (root / "out-dir").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    (root / "dir" / "up").symlink_to("..")
    store = LocalStore(str(root))
    assert everything(store) == ["dir/", "to-file"]
    assert everything(store, delimiter="") == ["dir/file", "to-file"]
    assert bytes(store.get_range(store.head("to-file").version, 0, 6)) == b"inside"
    for key in ("out", "out-absolute", "out-dir/secret", "to-dir/file", "dir/up/to-file", "loop", "dangling"):
        with pytest.raises(NotFound):
            store.head(key)
    for prefix in ("out-dir/", "to-dir/", "dir/up/"):
        assert everything(store, prefix) == []


@pytest.mark.parametrize("key", ["../secret", "dir/../../secret", "/etc/passwd", "dir//file", "./dir/file", "a\0b", ""])
def test_keys_cannot_lead_out(key: str, tmp_path: Path) -> None:
    (tmp_path / "root" / "dir").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"x")
    store = LocalStore(str(tmp_path / "root"))
    with pytest.raises(NotFound):
        store.head(key)
    assert everything(store, key.rpartition("/")[0] + "/") == []


def test_only_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    store = LocalStore(str(tmp_path))
    assert everything(store) == ["dir/"]
    started = time.monotonic()
    for key in ("fifo", "dir", "dir/"):
        with pytest.raises(NotFound):
            store.head(key)
    assert time.monotonic() - started < 1  # opening a FIFO did not wait for a writer


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9\xff"
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"body")
    store = LocalStore(str(tmp_path))
    (key,) = everything(store)
    assert os.fsencode(key) == name
    assert bytes(store.get_range(store.head(key).version, 0, 4)) == b"body"


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a" * 100)
    store = LocalStore(str(tmp_path))
    version = store.head("file").version

    def preadv(descriptor: int, buffers: list[memoryview], start: int) -> int:
        file.write_bytes(b"b" * 50)
        buffers[0][:] = b"b" * len(buffers[0])
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StaleObject):
        store.get_range(version, 0, 10)


def test_a_file_that_ends_early_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"a" * 100)
    store = LocalStore(str(tmp_path))
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, start: min(3, max(0, 6 - start)))
    with pytest.raises(BadBody):
        store.get_range(store.head("file").version, 0, 100)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0)
    with pytest.raises(AccessDenied):
        LocalStore(str(tmp_path)).head("file")


def test_a_directory_that_is_gone_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(BucketNotFound, match="does not exist"):
            LocalStore(str(path)).check("")
    with pytest.raises(Unsupported):
        LocalStore(str(tmp_path)).list_page("", delimiter="-")


def test_a_deep_tree(tmp_path: Path) -> None:
    depth = 1200  # Python gives up at 1000 calls in each other, the kernel at paths of 4096 bytes
    deep = "/".join(["d"] * depth)
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        assert everything(LocalStore(str(tmp_path)), delimiter="") == [f"{deep}/leaf"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil, and so pytest, cannot


NAMES = st.text(st.sampled_from("ab-.0/ "), min_size=1, max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(NAMES, max_size=12), limit=st.integers(1, 5), prefix=st.sampled_from(["", "a", "a/", "b-"]))
def test_lists_as_the_model_does(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], limit: int, prefix: str
) -> None:
    root, model = tmp_path_factory.mktemp("tree"), MemoryStore()
    for name in sorted(names):
        parts = name.split("/")
        path = root / name
        if any(part in ("", ".", "..") for part in parts) or path.exists():
            continue
        if any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        model.put(name, b"x")
    store = LocalStore(str(root))
    for delimiter in ("/", ""):
        assert everything(store, prefix, delimiter, limit) == everything(model, prefix, delimiter, limit)


def test_runs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_RUN", 7)
    names = [f"{number * 7919 % 1000:04d}" for number in range(200)]
    for name in names:
        (tmp_path / name).touch()
    assert everything(LocalStore(str(tmp_path)), limit=13) == sorted(names)


def test_a_page_in_the_middle_needs_no_cursor(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}").touch()
    token = LocalStore(str(tmp_path)).list_page("", limit=10).next_token
    fresh = LocalStore(str(tmp_path))
    assert [entry.key for entry in fresh.list_page("", token=token, limit=3).objects] == ["10", "11", "12"]


def test_abandoned_listings_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}").touch()
    store = LocalStore(str(tmp_path))
    for limit in range(1, 9):
        store.list_page("", limit=limit)
    assert len(store._cursors) <= local._CURSORS


def test_threads_share_a_listing(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}").touch()
    store = LocalStore(str(tmp_path))
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(everything(store, limit=3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[f"{number:02d}" for number in range(50)]] * 8


def test_memory_of_a_big_directory(tmp_path: Path) -> None:
    """20 bytes a name, not the 80 that a list of them would take."""
    count = 20_000
    here = os.open(tmp_path, os.O_RDONLY)
    for number in range(count):
        os.close(os.open(f"name-{number:015d}", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    store = LocalStore(str(tmp_path))
    tracemalloc.start()
    store.list_page("", limit=10)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < count * 25 + 100_000
    store.close()
