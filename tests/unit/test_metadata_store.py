"""The environment on disk: what survives, what is set aside, what a full disk and kill -9 do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from cachefs.errors import ConfigError, StaleObject, StorageUnavailable
from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO, Ino
from metadata import custody
from metadata.facts import Finding, head_facts
from metadata.store import PREFIXES_KEPT, MetadataReader, MetadataWriter
from metadata.volume import VolumeIdentity
from tests.support.tree import IDENTITY, Clock, check_invariants, list_everything, list_whole, scan_all, writer_at

pytestmark = pytest.mark.filterwarnings("error")


def filled(path: Path, files: int = 20, **options: str) -> list[Ino]:
    """Make an environment with some files, close it, and return their inodes."""
    store = MemoryStore()
    for i in range(files):
        store.put(f"v/{i:05}", b"x")
    with writer_at(path, **options) as writer:
        list_whole(writer, store, ROOT_INO, Clock())
        return [entry.ino for entry in scan_all(writer, ROOT_INO, 1000)]


def inos(writer: MetadataWriter) -> list[Ino]:
    return [entry.ino for entry in scan_all(writer, ROOT_INO, 1000)]


def test_a_new_volume_has_a_root_and_nothing_else(tmp_path: Path):
    with writer_at(tmp_path / "volume") as writer:
        root = writer.reader.inode(ROOT_INO)
        assert root is not None
        assert abs(root.mtime_ns - time.time_ns()) < 60 * 10**9
        assert writer.reader.directory(ROOT_INO) is None
        assert writer.reader.scan(ROOT_INO, None, 10) == []
        assert writer.reader.counts() == (0, 0)
        assert writer.reader.key_of(ROOT_INO) == "v/"
        assert writer.reader.dentry(ROOT_INO, b"x" * 300) is None
        assert writer.reader.dentry(ROOT_INO, b"") is None
        assert (tmp_path / "volume" / "data.mdb").stat().st_mode & 0o777 == 0o600


def test_inodes_survive(tmp_path: Path):
    before = filled(tmp_path / "volume")
    for _ in range(2):
        with writer_at(tmp_path / "volume") as writer:
            assert writer.set_aside is None
            assert inos(writer) == before


def test_new_environments_begin_at_other_numbers(tmp_path: Path):
    one, two = filled(tmp_path / "1"), filled(tmp_path / "2")
    assert not set(one) & set(two)
    assert max(one + two) < 2**49


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def other_format(path: Path) -> None:
    env = lmdb.open(str(path), max_dbs=5)
    with env.begin(env.open_db(b"state"), write=True) as txn:
        txn.put(b"format", b"99")
    env.close()
    (path / custody.STAMP).write_text(json.dumps({"boot": custody.current_boot_id(), "clean": None}))


def foreign_environment(path: Path) -> None:
    shutil.rmtree(path)
    env = lmdb.open(str(path), max_dbs=1)
    with env.begin(env.open_db(b"something"), write=True) as txn:
        txn.put(b"a", b"b")
    env.close()
    (path / custody.STAMP).write_text(json.dumps({"boot": custody.current_boot_id(), "clean": None}))


def unclean(path: Path) -> None:
    """As after kill -9 on this boot."""
    (path / custody.STAMP).write_text(json.dumps({"boot": custody.current_boot_id(), "clean": None}))


def garbage_after_kill(path: Path) -> None:
    overwrite(path / "data.mdb", 3 * 4096, os.urandom(8192))
    unclean(path)


def truncated_after_kill(path: Path) -> None:
    os.truncate(path / "data.mdb", 4 * 4096)
    unclean(path)


def subtly(path: Path) -> None:
    """Bring the keys of a page out of order: nothing that opening would notice."""
    content = (path / "data.mdb").read_bytes()
    place = content.rindex(b"\0\0\0\1" + b"00007") + 4
    overwrite(path / "data.mdb", place, b"99999")


def subtly_after_kill(path: Path) -> None:
    subtly(path)
    unclean(path)


def replaced_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a directory")


def replaced_by_a_dangling_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("/nonexistent/cachefs")


def data_is_a_directory(path: Path) -> None:
    (path / "data.mdb").unlink()
    (path / "data.mdb").mkdir()


DAMAGES: list[Callable[[Path], object]] = [
    lambda path: overwrite(path / "data.mdb", 3 * 4096, b"\xff" * 100),
    lambda path: os.truncate(path / "data.mdb", 4 * 4096),
    lambda path: os.truncate(path / "data.mdb", 0),
    lambda path: overwrite(path / "data.mdb", 0, b"garbage" * 2000),
    lambda path: (path / custody.STAMP).unlink(),
    lambda path: (path / custody.STAMP).write_text("{"),
    lambda path: (path / custody.STAMP).write_text('{"boot": "another", "clean": null}'),
    lambda path: (path / custody.STAMP).write_text('{"boot": "x", "clean": {"txn": 1}}'),
    lambda path: (path / "data.mdb").unlink(),
    subtly,
    subtly_after_kill,
    other_format,
    foreign_environment,
    garbage_after_kill,
    truncated_after_kill,
    replaced_by_a_file,
    replaced_by_a_dangling_link,
    data_is_a_directory,
]


@pytest.mark.expect_warnings("is not used")
@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_what_cannot_be_trusted_is_set_aside(tmp_path: Path, damage: Callable[[Path], object], caplog):
    before = filled(tmp_path / "volume")
    damage(tmp_path / "volume")
    with writer_at(tmp_path / "volume") as writer:
        assert writer.set_aside
        assert inos(writer) == []
        after = filled_into(writer)
    assert not set(before) & set(after)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.path.lexists(tmp_path / "volume.aside-1")
    with writer_at(tmp_path / "volume") as writer:
        assert writer.set_aside is None
        assert inos(writer) == after


def filled_into(writer: MetadataWriter) -> list[Ino]:
    store = MemoryStore()
    for i in range(20):
        store.put(f"v/{i:05}", b"x")
    list_whole(writer, store, ROOT_INO, Clock())
    return inos(writer)


@pytest.mark.expect_warnings("is not used")
def test_only_the_newest_is_kept_aside(tmp_path: Path):
    for _ in range(3):
        filled(tmp_path / "volume")
        overwrite(tmp_path / "volume" / "data.mdb", 4096, b"\xff" * 100)
    (tmp_path / "volume.aside-notes").write_text("somebody else's")
    with writer_at(tmp_path / "volume"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["volume", "volume.aside-3"]


@pytest.mark.expect_warnings("is not used")
def test_another_volume_is_not_mixed_in(tmp_path: Path):
    filled(tmp_path / "volume")
    writer = MetadataWriter(str(tmp_path / "volume"), VolumeIdentity("memory://", "bucket", "other"))
    assert writer.set_aside == "it describes another volume"
    with pytest.raises(ConfigError):
        writer.identity.expect("v")
    writer.close()


@pytest.mark.expect_warnings("is not used")
def test_a_crash_of_the_machine_is_told_from_a_crash_of_the_agent(tmp_path: Path):
    path = tmp_path / "volume"
    before = filled(path, boot_id="first boot")
    with writer_at(path, boot_id="second boot") as writer:  # synced when closed: good on every boot
        assert inos(writer) == before
        writer.commit_name(ROOT_INO, b"new", finding(), 1, 2)
        shutil.copytree(path, tmp_path / "crash")
        writer.sync_and_mark()
        shutil.copytree(path, tmp_path / "synced", copy_function=shutil.copy2)
    with writer_at(tmp_path / "crash", boot_id="second boot") as writer:
        assert writer.set_aside is None
        assert len(inos(writer)) == len(before) + 1
    with writer_at(tmp_path / "synced", boot_id="third boot") as writer:
        assert writer.set_aside is None
    unclean_copy = tmp_path / "unclean"
    shutil.copytree(tmp_path / "crash", unclean_copy)
    (unclean_copy / custody.STAMP).write_text('{"boot": "second boot", "clean": null}')
    with writer_at(unclean_copy, boot_id="third boot") as writer:
        assert writer.set_aside == "the machine went down while it was in use"


def finding() -> Finding:
    return Finding(head_facts(MemoryStore().put("k", b"x")), directory=False)


def test_the_stamp_is_dirty_before_the_first_write(tmp_path: Path):
    filled(tmp_path / "volume")
    with writer_at(tmp_path / "volume") as writer:
        assert custody.closed_cleanly(writer.path)
        writer.commit_name(ROOT_INO, b"new", finding(), 1, 2)
        assert not custody.closed_cleanly(writer.path)
        writer.sync_and_mark()
        assert custody.closed_cleanly(writer.path)
        writer.purge(1)
        assert not custody.closed_cleanly(writer.path)
    assert custody.closed_cleanly(str(tmp_path / "volume"))


def test_no_place_for_metadata_is_said_clearly(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="no metadata can be kept"):
        MetadataWriter(str(tmp_path / "file" / "volume"), IDENTITY)
    with pytest.raises(StorageUnavailable, match="cannot be read"):
        MetadataReader(str(tmp_path / "nothing"))


# -- readers ----------------------------------------------------------------------------------------------------------

READER = """
import sys
from metadata.store import MetadataReader
from cachefs.types import ROOT_INO
reader = MetadataReader(sys.argv[1])
def show():
    print(*[entry.name.decode() for entry in reader.scan(ROOT_INO, None, 100)], flush=True)
show()
for line in sys.stdin:
    print(reader.refresh(), end=" ")
    show()
"""


def test_a_reader_in_another_process_sees_commits_and_replacement(tmp_path: Path):
    path = tmp_path / "volume"
    filled(path, 2)
    store = MemoryStore()
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "00000 00001\n"
            with writer_at(path) as writer:
                store.put("v/later", b"x")
                list_whole(writer, store, ROOT_INO, Clock())
                print(file=child.stdin, flush=True)
                assert child.stdout.readline() == "False later\n"
            path.rename(tmp_path / "old")
            with writer_at(path) as writer:
                store.put("v/fresh", b"x")
                list_whole(writer, store, ROOT_INO, Clock())
                print(file=child.stdin, flush=True)
                assert child.stdout.readline() == "True fresh later\n"
                # A reader that is killed may leave its slot behind; nothing else.
                child.kill()
                child.wait()
                writer.reader_check()
                list_whole(writer, store, ROOT_INO, Clock())
        finally:
            child.kill()


def test_readers_in_many_threads(tmp_path: Path):
    store = MemoryStore()
    for i in range(300):
        store.put(f"v/d{i % 7}/{i:03}", b"x")
    wrong: list[str] = []
    with writer_at(tmp_path / "volume") as writer:
        clock = Clock()
        list_everything(writer, store, clock)
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                for top in writer.reader.scan(ROOT_INO, None, 100):
                    for entry in writer.reader.scan(top.ino, None, 100):
                        if writer.reader.key_of(entry.ino) != f"v/{top.name.decode()}/{entry.name.decode()}":
                            wrong.append(str(entry))
                        if writer.reader.dentry(top.ino, entry.name) is None:
                            wrong.append(str(entry))

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            list_everything(writer, store, clock)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_keys_of_directories_are_remembered_within_bounds(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("metadata.store.PREFIXES_KEPT", 4)
    store = MemoryStore()
    for i in range(20):
        store.put(f"v/d{i}/f", b"x")
    with writer_at(tmp_path / "volume") as writer:
        list_everything(writer, store, Clock())
        for entry in scan_all(writer, ROOT_INO):
            assert writer.reader.key_of(entry.ino) == f"v/{entry.name.decode()}/"
        assert len(writer.reader._view.prefixes) <= 5
    assert PREFIXES_KEPT > 1000


def test_a_position_of_another_directory_is_refused(tmp_path: Path):
    store = MemoryStore()
    store.put("v/d/f", b"x")
    with writer_at(tmp_path / "volume") as writer:
        list_everything(writer, store, Clock())
        directory = writer.reader.dentry(ROOT_INO, b"d")
        assert directory is not None
        file = writer.reader.dentry(directory.ino, b"f")
        assert file is not None
        with pytest.raises(StaleObject):
            writer.reader.scan(ROOT_INO, file.ino, 5)


# -- faults -----------------------------------------------------------------------------------------------------------

WRITE_FOR_EVER = """
import sys, itertools
from tests.support.tree import Clock, IDENTITY, list_everything
from cachefs.store.memory import MemoryStore
from metadata.store import MetadataWriter
writer = MetadataWriter(sys.argv[1], IDENTITY)
store = MemoryStore()
clock = Clock()
for round in itertools.count():
    for i in range(150):
        key = f"v/d{i % 5}/{i:03}"
        store.put(key, b"x" * (round % 3 + 1)) if (i + round) % 4 else store.delete(key)
    list_everything(writer, store, clock, 40)
    clock.now_ns += 86400 * 10**9
    writer.purge(clock())
    if round == 0:
        print("going", flush=True)
"""


@pytest.mark.parametrize("wait_s", [0.01, 0.1, 0.25])
def test_kill_9_of_the_writer_leaves_a_good_environment(tmp_path: Path, wait_s: float):
    path = tmp_path / "volume"
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"going\n"
            time.sleep(wait_s)
            child.send_signal(signal.SIGKILL)
        assert not custody.closed_cleanly(str(path))
        with writer_at(path) as writer:
            assert writer.set_aside is None
            check_invariants(writer)


FULL_DISK = """
import resource, signal, sys
from tests.support.tree import Clock, IDENTITY, list_whole, scan_all, check_invariants
from cachefs.errors import StorageUnavailable
from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO
from metadata.store import MetadataWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = MetadataWriter(sys.argv[1], IDENTITY)
store, clock = MemoryStore(), Clock()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
for i in range(20000):
    store.put(f"v/{i:05}", b"x")
for _ in range(2):
    try:
        list_whole(writer, store, ROOT_INO, clock)
    except StorageUnavailable as error:
        print("full:", error)
    check_invariants(writer)
    writer.reader.scan(ROOT_INO, None, 100000)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
list_whole(writer, store, ROOT_INO, clock)
print(len(writer.reader.scan(ROOT_INO, None, 100000)))
writer.close()
"""


def test_a_full_disk_is_an_error_and_passes(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "volume")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["full:", "full:", "20000"], done.stdout
    assert "cannot be written" in lines[0]
    with writer_at(tmp_path / "volume") as writer:
        assert writer.set_aside is None
        check_invariants(writer)
