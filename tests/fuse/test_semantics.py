"""The numbered promises of docs/SEMANTICS.md, on a real mount. What needs more than a mount has a file of its own:

    N3, N4 (order, streaming)   test_names.py          R3          test_cache_faults.py
    N4 (no request), F1 to F4   test_freshness.py      R4, R5      test_faults.py
    R1, R2                      test_freshness.py      M1 to M4, M6 test_survival.py
    M5                          test_commands.py       many mounts test_shared_agent.py
    N5                          test_dots.py           R2 (next open), M7  test_changed_names.py
    M12                         test_versions.py       M13         test_full_disk.py
    M14, M15                    test_successors.py     M16         test_isolation.py
    M17                         test_memory_limit.py   P1 to P8    tests/peer, tests/cluster

The core (names, bytes, attributes) is tested with both engines.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name, evict_pages, run_program, tree_from_keys, tree_of

MIB = 1 << 20
OBJECTS = {
    "top.txt": b"top",
    "empty": b"",
    "photos/one.jpg": content("one", 110_000),
    "photos/two.jpg": content("two", 65_536),
    "photos/deep/er/still/three.jpg": content("three", 1),
    "shards/large.bin": content("large", 9 * MIB + 12_345),
    "shards/exact.bin": content("exact", 2 * MIB),
    "both/inside": b"inside",
    "both": b"hidden by the directory",
    "markeronly/": b"",
    "marked/": b"",
    "marked/file": b"beside its marker",
}


@pytest.fixture(scope="module", params=["channel", "pyfuse3"])
def mount(request: pytest.FixtureRequest, s3_server: S3Server) -> Iterator[Mount]:
    """One mount of a small tree for each engine."""
    with Bucket.create(s3_server) as bucket, Node(s3_server.environment) as node:
        bucket.fill(OBJECTS)
        bucket.put(
            "with-meta", b"#!/bin/sh\n", {"mode": "33261", "uid": "1234", "gid": "4321", "mtime": "1000000000.5"}
        )
        yield node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}", f"--engine={request.param}")


# -- names ------------------------------------------------------------------------------------------------------------


def test_n1_keys_are_paths(mount: Mount) -> None:
    wanted = tree_from_keys(OBJECTS) | {"with-meta": b"#!/bin/sh\n"}
    found = tree_of(mount.path)
    assert sorted(found) == sorted(wanted)
    assert found == wanted


def test_n1_a_key_that_ends_with_a_slash_is_only_a_directory(mount: Mount) -> None:
    assert os.listdir(mount.path / "markeronly") == []
    assert os.listdir(mount.path / "marked") == ["file"]


def test_n2_the_directory_hides_the_file(mount: Mount) -> None:
    assert (mount.path / "both").is_dir()
    assert os.listdir(mount.path).count("both") == 1
    assert (mount.path / "both/inside").read_bytes() == b"inside"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nothing", "ENOENT"),
        ("photos/nothing", "ENOENT"),
        ("photos/nothing/deeper", "ENOENT"),
        ("top.txt/below", "ENOTDIR"),
        ("photos/one", "ENOENT"),
        ("photos/one.jpgx", "ENOENT"),
        ("n" * 256, "ENAMETOOLONG"),
        ("n" * 255, "ENOENT"),
    ],
)
def test_names_that_do_not_exist(mount: Mount, path: str, code: str) -> None:
    assert errno_name(lambda: os.stat(mount.path / path)) == code
    assert errno_name(lambda: os.open(mount.path / path, os.O_RDONLY)) == code


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 17, 4096, 65_537, MIB, 3 * MIB + 1])
def test_reads_of_any_size_give_the_objects_bytes(mount: Mount, size: int) -> None:
    path, body = mount.path / "shards/large.bin", OBJECTS["shards/large.bin"]
    evict_pages(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in (
            0,
            1,
            4095,
            MIB - 1,
            MIB,
            5 * MIB + 77,
            len(body) - size,
            len(body) - 1,
            len(body),
            len(body) + 9,
        ):
            assert os.pread(descriptor, size, offset) == body[offset : offset + size], offset
    finally:
        os.close(descriptor)


def test_the_end_of_a_file_is_its_end(mount: Mount) -> None:
    for key in ("empty", "top.txt", "shards/exact.bin", "shards/large.bin"):
        path = mount.path / key
        with path.open("rb") as file:
            assert file.seek(0, os.SEEK_END) == len(OBJECTS[key])
            assert file.read(1) == b""
            file.seek(len(OBJECTS[key]) + 5 * MIB)
            assert file.read(100) == b""


def test_r1_whole_files_again_and_again(mount: Mount) -> None:
    for key in ("shards/large.bin", "photos/one.jpg", "empty", "shards/exact.bin"):
        for _ in range(3):
            evict_pages(mount.path / key)
            assert (mount.path / key).read_bytes() == OBJECTS[key]


def test_one_file_through_many_descriptors(mount: Mount) -> None:
    path, body = mount.path / "shards/large.bin", OBJECTS["shards/large.bin"]
    descriptors = [os.open(path, os.O_RDONLY) for _ in range(50)]
    try:
        for number, descriptor in enumerate(descriptors):
            offset = number * 180_000
            assert os.pread(descriptor, 1000, offset) == body[offset : offset + 1000]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# -- attributes -------------------------------------------------------------------------------------------------------


def test_a1_size_and_time_are_the_stores(mount: Mount, s3_server: S3Server) -> None:
    bucket = str(mount.state()["source"]).removeprefix("s3://")
    for key in ("photos/one.jpg", "shards/large.bin", "empty"):
        said = s3_server.client().head_object(Bucket=bucket, Key=key)
        found = os.stat(mount.path / key)
        assert found.st_size == said["ContentLength"] == len(OBJECTS[key])
        assert int(found.st_mtime) == int(said["LastModified"].timestamp())
        assert found.st_blocks == -(-found.st_size // 512)


def test_a1_user_metadata_of_a_name_that_was_found_by_itself(s3_server: S3Server) -> None:
    with Bucket.create(s3_server) as bucket, Node(s3_server.environment) as node:
        bucket.put("script", b"#!/bin/sh\n", {"mode": "33261", "uid": "1234", "gid": "4321", "mtime": "1000000000"})
        bucket.put("odd", b"x", {"mode": "everything", "uid": "-7", "gid": "root", "mtime": "yesterday"})
        mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")
        found = os.stat(mount.path / "script")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o755, 1234, 4321)
        assert found.st_mtime == 1_000_000_000
        odd = os.stat(mount.path / "odd")  # what makes no sense is as if it were not there
        assert (stat.S_IMODE(odd.st_mode), odd.st_uid, odd.st_gid) == (0o444, os.getuid(), os.getgid())
        assert abs(odd.st_mtime - time.time()) < 600


def test_a1_names_of_a_listing_have_the_rules_of_the_mount(node: Node, bucket: Bucket, s3_server: S3Server) -> None:
    """A listing does not say what a HEAD would, and asking for each name would cost a request."""
    bucket.put("script", b"#!/bin/sh\n", {"mode": "33261", "uid": "1234", "gid": "4321"})
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")
    assert os.listdir(mount.path) == ["script"]
    found = os.stat(mount.path / "script")
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o444, os.getuid(), os.getgid())


@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_a1_a_listing_says_what_a_look_up_has_said(
    node: Node, bucket: Bucket, s3_server: S3Server, engine: str
) -> None:
    bucket.put("d/script", b"#!/bin/sh\n", {"mode": "33261", "uid": "1234", "gid": "4321", "mtime": "1000000000"})
    bucket.put("d/plain", b"x")
    options = (f"--endpoint-url={s3_server.endpoint_url}", f"--engine={engine}")
    mount = node.mount(bucket.url, *options)
    looked_up = os.stat(mount.path / "d/script")
    assert (stat.S_IMODE(looked_up.st_mode), looked_up.st_uid, looked_up.st_gid) == (0o755, 1234, 4321)
    os.listdir(mount.path / "d")
    mount.umount()
    again = node.mount(bucket.url, *options)  # of another kernel's knowledge: the listing is all that it hears
    with os.scandir(again.path / "d") as entries:
        found = {entry.name: entry.stat() for entry in entries}
    for name in ("st_mode", "st_uid", "st_gid", "st_mtime", "st_size", "st_ino"):
        assert getattr(found["script"], name) == getattr(looked_up, name), name
    assert found["plain"].st_uid == os.getuid()


def test_a1_the_time_of_a_directory_moves_when_it_is_found_changed(
    node: Node, bucket: Bucket, s3_server: S3Server
) -> None:
    """And not with its first listing: tar ends with an error when a directory changes while it is read."""
    bucket.put("d/a", b"a")
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}", "--consistency=strict")
    first = os.stat(mount.path / "d").st_mtime_ns
    for _ in range(2):
        assert os.listdir(mount.path / "d") == ["a"]
        assert os.stat(mount.path / "d").st_mtime_ns == first
    for change in (lambda: bucket.put("d/b", b"b"), lambda: bucket.delete("d/b")):
        before = time.time_ns()
        change()
        os.listdir(mount.path / "d")
        assert os.stat(mount.path / "d").st_mtime_ns > before


def test_a2_owner_and_permissions(mount: Mount) -> None:
    file, directory = os.stat(mount.path / "top.txt"), os.stat(mount.path / "photos")
    assert stat.S_IMODE(file.st_mode) == 0o444
    assert stat.S_IMODE(directory.st_mode) == 0o555
    for found in (file, directory, os.stat(mount.path)):
        assert (found.st_uid, found.st_gid, found.st_nlink) == (os.getuid(), os.getgid(), 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a2_the_kernel_checks_access(node: Node, bucket: Bucket, s3_server: S3Server) -> None:
    bucket.fill({"file": b"secret", "dir/file": b"x"})
    node.base.chmod(0o755)
    options = ("--uid=4711", "--gid=4712", "--file-mode=0440", "--dir-mode=0750")
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}", *options)
    found = os.stat(mount.path / "dir/file")
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o440, 4711, 4712)

    def as_user(uid: int, gid: int) -> int:
        reader: list[str | Path] = [
            "setpriv",
            f"--reuid={uid}",
            f"--regid={gid}",
            "--clear-groups",
            "cat",
            mount.path / "file",
        ]
        return run_program(reader, check=False).returncode

    assert as_user(4711, 1) == 0
    assert as_user(1, 4712) == 0
    assert as_user(1, 1) != 0


def test_a3_extended_attributes(mount: Mount, s3_server: S3Server) -> None:
    bucket = str(mount.state()["source"]).removeprefix("s3://")
    path = mount.path / "shards/large.bin"
    path.read_bytes()
    etag = s3_server.client().head_object(Bucket=bucket, Key="shards/large.bin")["ETag"].strip('"')
    assert os.getxattr(path, "user.cachefs.etag") == etag.encode()
    assert os.getxattr(path, "user.cachefs.key") == b"shards/large.bin"
    assert os.getxattr(path, "user.cachefs.cached").startswith(b"shm=10 ")
    assert sorted(os.listxattr(path)) == ["user.cachefs.cached", "user.cachefs.etag", "user.cachefs.key"]
    assert errno_name(lambda: os.getxattr(path, "user.other")) == "ENODATA"
    assert errno_name(lambda: os.getxattr(path, "security.capability")) in ("ENODATA", "EOPNOTSUPP")
    assert os.getxattr(mount.path / "photos", "user.cachefs.key") == b"photos/"
    assert errno_name(lambda: os.getxattr(mount.path / "photos", "user.cachefs.etag")) == "ENODATA"


def test_a4_statfs(mount: Mount) -> None:
    tree_of(mount.path)
    found = os.statvfs(mount.path)
    known = sum(len(body) for body in OBJECTS.values())
    assert found.f_frsize * found.f_blocks == 1 << 50
    assert found.f_namemax == 255
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    assert known - MIB < used < known + MIB
    assert 8 <= found.f_files - found.f_ffree < 100


# -- what is not there ------------------------------------------------------------------------------------------------


def test_every_change_is_erofs(mount: Mount) -> None:
    file, directory = mount.path / "top.txt", mount.path / "photos"
    attempts = {
        "write": lambda: os.open(file, os.O_WRONLY),
        "append": lambda: os.open(file, os.O_RDWR | os.O_APPEND),
        "create": lambda: os.open(mount.path / "new", os.O_CREAT | os.O_WRONLY),
        "truncate": lambda: os.truncate(file, 0),
        "unlink": lambda: os.unlink(file),
        "mkdir": lambda: os.mkdir(mount.path / "new"),
        "rmdir": lambda: os.rmdir(mount.path / "markeronly"),
        "rename": lambda: os.rename(file, mount.path / "new"),
        "symlink": lambda: os.symlink("target", mount.path / "new"),
        "link": lambda: os.link(file, mount.path / "new"),
        "mkfifo": lambda: os.mkfifo(mount.path / "new"),
        "chmod": lambda: os.chmod(file, 0o777),
        "utime": lambda: os.utime(file),
        "setxattr": lambda: os.setxattr(file, "user.x", b"y"),
        "removexattr": lambda: os.removexattr(file, "user.cachefs.etag"),
        "chmod directory": lambda: os.chmod(directory, 0o777),
    }
    assert {name: errno_name(attempt) for name, attempt in attempts.items()} == dict.fromkeys(attempts, "EROFS")
    assert file.read_bytes() == b"top"


def test_directories_and_files_are_not_mixed_up(mount: Mount) -> None:
    assert errno_name(lambda: os.open(mount.path / "photos", os.O_WRONLY)) in ("EISDIR", "EROFS")
    assert errno_name(lambda: Path(mount.path / "photos").read_bytes()) == "EISDIR"
    assert errno_name(lambda: os.listdir(mount.path / "top.txt")) == "ENOTDIR"
    assert errno_name(lambda: os.open(mount.path / "top.txt", os.O_RDONLY | os.O_DIRECTORY)) == "ENOTDIR"
    assert errno_name(lambda: os.readlink(mount.path / "top.txt")) == "EINVAL"


def test_a_prefix_is_a_mount_of_its_own(node: Node, bucket: Bucket, s3_server: S3Server) -> None:
    bucket.fill({"a/b/c": b"c", "a/b/d/e": b"e", "a/bb": b"not below", "other": b"not below"})
    endpoint = f"--endpoint-url={s3_server.endpoint_url}"
    for number, source in enumerate((f"{bucket.url}/a/b", f"{bucket.url}/a/b/")):
        mount = node.mount(source, endpoint, name=f"prefix{number}")
        assert tree_of(mount.path) == {"c": b"c", "d": None, "d/e": b"e"}
        assert os.getxattr(mount.path / "c", "user.cachefs.key") == b"a/b/c"


def test_an_empty_bucket_is_an_empty_directory(node: Node, bucket: Bucket, s3_server: S3Server) -> None:
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")
    assert os.listdir(mount.path) == []
    assert errno_name(lambda: os.stat(mount.path / "x")) == "ENOENT"
