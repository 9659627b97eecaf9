"""Names whose time is over before it ran out: R2 and M7 of docs/SEMANTICS.md."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import fill_up, tmpfs, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name

MIB = 1 << 20
HAS_EPOCHS = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 16)
BEFORE = content("before", 12 * MIB)
AFTER = content("after", 11 * MIB)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def mount_forever(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str, name: str = "mnt") -> Mount:
    """A mount that would never ask for a name again by itself."""
    always = (f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")
    return node.mount(bucket.url, *always, *options, name=name)


def read_until_stale(descriptor: int) -> None:
    """Read what is not cached; it must be ESTALE and nothing else."""
    assert errno_name(lambda: os.pread(descriptor, MIB, 10 * MIB)) == "ESTALE"


@pytest.mark.parametrize("listed", [False, True], ids=["looked up", "listed"])
@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_r2_the_next_open_after_a_stale_read_sees_the_new_version(
    node: Node, bucket: Bucket, proxy: FaultProxy, engine: str, listed: bool
) -> None:
    bucket.fill({"d/over": BEFORE, "d/gone": BEFORE, "d/same": b"same"})
    mount = mount_forever(node, bucket, proxy, f"--engine={engine}")
    over, gone = mount.path / "d/over", mount.path / "d/gone"
    if listed:
        assert sorted(os.listdir(mount.path / "d")) == ["gone", "over", "same"]
    with opened(over) as first, opened(gone) as second:
        assert os.pread(first, 4096, 0) == BEFORE[:4096]
        assert os.pread(second, 4096, 0) == BEFORE[:4096]
        bucket.put("d/over", AFTER)
        bucket.delete("d/gone")
        assert os.stat(over).st_size == len(BEFORE), "nobody has noticed yet"
        same = os.stat(mount.path / "d/same").st_ino
        read_until_stale(first)
        assert over.read_bytes() == AFTER
        assert os.fstat(first).st_size == len(BEFORE), "an open file stays what it was"
        assert os.pread(first, 4096, 0) == BEFORE[:4096]
        read_until_stale(second)
        assert errno_name(lambda: os.open(gone, os.O_RDONLY)) == "ENOENT"
        assert os.stat(mount.path / "d/same").st_ino == same
    assert sorted(os.listdir(mount.path / "d")) == ["over", "same"]
    assert sorted(os.listdir(mount.path / "d")) == ["over", "same"]


def test_r2_many_stale_reads_ask_for_the_name_once(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", BEFORE)
    mount = mount_forever(node, bucket, proxy)
    with opened(mount.path / "file") as descriptor:
        os.pread(descriptor, 4096, 0)
        wait_until(lambda: proxy.requests[-1].status != 0, 5, "readahead has come to rest")
        bucket.put("file", AFTER)
        proxy.forget()
        for offset in (11 * MIB, 10 * MIB, 9 * MIB, 11 * MIB):
            errno_name(lambda offset=offset: os.pread(descriptor, 4096, offset))  # type: ignore[misc]
        assert proxy.count("head") == 1, proxy.requests


def test_r2_an_immutable_name_is_not_asked_for(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", BEFORE)
    options = (f"--endpoint-url={proxy.endpoint_url}", "--consistency=immutable")
    mount = node.mount(bucket.url, *options)
    number = os.stat(mount.path / "file").st_ino
    bucket.put("file", AFTER)
    proxy.forget()
    with opened(mount.path / "file") as descriptor:
        read_until_stale(descriptor)
    assert os.stat(mount.path / "file").st_ino == number
    assert proxy.count("head") == 0


def test_r2_every_mount_of_the_volume_learns_of_it(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", BEFORE)
    mounts = [mount_forever(node, bucket, proxy, name=name) for name in ("one", "two")]
    with opened(mounts[0].path / "file") as one, opened(mounts[1].path / "file") as two:
        bucket.put("file", AFTER)
        proxy.forget()
        for descriptor, mount in ((one, mounts[0]), (two, mounts[1])):
            read_until_stale(descriptor)
            assert (mount.path / "file").read_bytes() == AFTER
    assert proxy.count("head") == 1, "the second one finds that the name leads elsewhere already"


def test_r2_the_store_cannot_say_what_the_name_is_now(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", BEFORE)
    mount = mount_forever(node, bucket, proxy)
    with opened(mount.path / "file") as descriptor:
        bucket.put("file", AFTER)
        refusal = proxy.add(Fault(kind="head", status=403))
        read_until_stale(descriptor)
        assert os.stat(mount.path / "file").st_size == len(BEFORE)
        proxy.remove(refusal)
        read_until_stale(descriptor)
        assert (mount.path / "file").read_bytes() == AFTER


@pytest.mark.timeout(120)
def test_m1_a_worker_that_is_killed_while_a_name_expires(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """The kernel expires a name under its directory's lock, which a look-up that waits for the store holds."""
    bucket.fill({"d/file": BEFORE, "d/other": b"other"})
    mount = mount_forever(node, bucket, proxy)
    with opened(mount.path / "d/file") as descriptor:
        bucket.put("d/file", AFTER)
        stalled = proxy.add(Fault(kind="head", key="d/slow", stall=True))
        lookup = subprocess.Popen(["stat", str(mount.path / "d/slow")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_until(lambda: stalled.hits, 5, "the look-up waits for the store")
        read_until_stale(descriptor)  # although the name cannot expire now
        worker = mount.kill_worker()
        assert mount.wait_for_worker(other_than=worker) != worker
        threading.Timer(0.5, proxy.clear).start()
        assert lookup.wait(30) == 1
        assert b"No such file" in lookup.communicate()[1]
        wait_until(lambda: (mount.path / "d/file").read_bytes() == AFTER, 10, "the name has expired meanwhile")


# -- metadata that begins anew ----------------------------------------------------------------------------------------


def lose_metadata(node: Node) -> None:
    """Kill the agent and damage what it knows of names."""
    found = [path for path in (node.cache_dir / "volumes").rglob("data.mdb") if ".aside" not in str(path)]
    assert found
    node.kill_agent()
    for path in found:
        os.truncate(path.parent / "clean.json", 0)


@pytest.mark.parametrize(
    "worker_too",
    [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_EPOCHS, reason="Linux 6.16 can forget all names"))],
    ids=["agent", "agent and worker"],
)
def test_m7_a_new_walk_works_at_once_when_metadata_begins_anew(
    node: Node, bucket: Bucket, proxy: FaultProxy, worker_too: bool
) -> None:
    objects = {f"d/e/{number}": content(str(number), 3000) for number in range(8)} | {"top": b"top"}
    bucket.fill(objects)
    mount = mount_forever(node, bucket, proxy)
    for name, body in objects.items():
        assert (mount.path / name).read_bytes() == body
    before = {name: os.stat(mount.path / name).st_ino for name in objects}
    agent = node.agent_pid
    if worker_too:
        os.kill(mount.worker_pid, signal.SIGSTOP)  # it must not start another agent in between
    lose_metadata(node)
    if worker_too:
        mount.kill_worker()
    node.wait_for_agent(other_than=agent)
    wait_until(lambda: "look up every name again" in node.full_log(), 10, "the worker has followed it")
    for name, body in objects.items():
        assert (mount.path / name).read_bytes() == body, name
        assert os.stat(mount.path / name).st_ino != before[name]
    assert sorted(os.listdir(mount.path / "d/e")) == sorted(map(str, range(8)))
    assert "ESTALE" not in node.full_log()


def test_m7_what_is_cached_of_an_open_file_stays_readable(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", BEFORE)
    mount = mount_forever(node, bucket, proxy)
    with opened(mount.path / "file") as descriptor:
        assert os.pread(descriptor, 12 * MIB, 0) == BEFORE
        lose_metadata(node)
        wait_until(lambda: "look up every name again" in node.full_log(), 10, "the worker has followed")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, 12 * MIB, 0) == BEFORE


# -- metadata that moves ----------------------------------------------------------------------------------------------


@pytest.fixture
def narrow_disk_node(make_node: Callable[..., Node], needs_root: None, tmp_path: Path) -> Iterator[Node]:
    """A node whose cache directory is on a file system of 48 MiB."""
    with tmpfs(tmp_path / "narrow", "48m") as place:
        node = make_node(cache_dir=place / "cache", cache_size="0", shm_size="32MiB")  # nothing that gives room back
        yield node
        node.close()


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_m7_names_and_open_files_survive_a_move_to_the_tmpfs_and_back(
    narrow_disk_node: Node, bucket: Bucket, proxy: FaultProxy
) -> None:
    node = narrow_disk_node
    objects = {f"d/e/{number}": content(str(number), 3000) for number in range(20)} | {"big": BEFORE}
    bucket.fill(objects)
    mount = mount_forever(node, bucket, proxy)
    os.listdir(mount.path / "d/e")
    before = {name: os.stat(mount.path / name).st_ino for name in objects}
    with opened(mount.path / "big") as descriptor, opened(mount.path / "d/e/0") as small:
        assert os.pread(descriptor, 4096, 0) == BEFORE[:4096]
        hog = fill_up(node.cache_dir.parent)
        for number, where in ((1, node.shm_directory / "volumes"), (2, node.cache_dir / "volumes")):
            if number == 2:
                hog.unlink()
            agent = node.kill_agent()
            node.wait_for_agent(other_than=agent)
            assert os.pread(descriptor, MIB, 4 * number * MIB) == BEFORE[4 * number * MIB :][:MIB]
            assert os.pread(small, 3000, 0) == objects["d/e/0"]
            assert [path.parent.parent for path in where.rglob("data.mdb") if ".aside" not in str(path)] == [where]
            for name, ino in before.items():
                assert os.stat(mount.path / name).st_ino == ino
                assert (mount.path / name).read_bytes() == objects[name]
            bucket.put(f"d/later{number}", b"later")
            assert (mount.path / f"d/later{number}").read_bytes() == b"later"
            before[f"d/later{number}"] = os.stat(mount.path / f"d/later{number}").st_ino
            objects[f"d/later{number}"] = b"later"
    assert not list((node.shm_directory / "volumes").iterdir())
    assert len(set(before.values())) == len(before)
    assert "ESTALE" not in node.full_log()
    assert "look up every name again" not in node.full_log()
