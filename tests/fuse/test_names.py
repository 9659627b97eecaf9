"""Which keys become names, in which order, and sizes that no test can store: N1 to N4 of docs/SEMANTICS.md.

Keys that real small servers refuse come from `memory_s3`; whatever a real one takes is asked of the real one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.fuse.memory_s3 import MemoryS3
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import errno_name, run_program, tree_from_keys, tree_of

GIB = 1 << 30
ODD_NAMES = [
    "plain",
    "with space",
    " leading and trailing ",
    "line\nfeed",
    "carriage\rreturn",
    "tab\there",
    "escape\x1b[31m",
    "\x7f",
    "ünïcödé",
    "日本語/ファイル",
    "e\u0301 decomposed",
    "\u00e9 composed",
    "\U0001f600",
    "right-to-left \u202e mark",
    "%41 percent",
    "%2F",
    "plus+plus",
    "question?mark=1&and",
    "hash#tag",
    "quote'double\"",
    "a&b<c>",
    "star*[brackets]",
    "semicolon;$HOME`x`",
    "-rf",
    "~",
    "...",
    "..hidden",
    ".dotfile",
    "back\\slash",
    "n" * 255,
    "ä" * 127,
    "deep/" * 40 + "leaf",
]


@pytest.fixture(scope="module")
def odd(s3_server: S3Server) -> Iterator[Mount]:
    """A mount of the odd names, each a file that holds its own key."""
    with Bucket.create(s3_server) as bucket, Node(s3_server.environment) as node:
        for name in ODD_NAMES:
            if "\\" not in name:  # the real server makes a slash of it
                bucket.put(name, name.encode())
        yield node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")


@pytest.fixture
def memory_s3() -> Iterator[MemoryS3]:
    """An S3 endpoint that takes every key."""
    with MemoryS3(page_size=100) as made:
        yield made


def mount_memory(node: Node, memory_s3: MemoryS3, *options: str) -> Mount:
    """Mount the bucket of `memory_s3`."""
    node.environment.update(memory_s3.environment)
    return node.mount(f"s3://{memory_s3.bucket}", f"--endpoint-url={memory_s3.endpoint_url}", *options)


# -- odd but visible --------------------------------------------------------------------------------------------------


def test_odd_names_are_listed_byte_for_byte(odd: Mount) -> None:
    wanted = tree_from_keys({name: name.encode() for name in ODD_NAMES if "\\" not in name})
    assert tree_of(odd.path) == wanted


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if "\\" not in name])
def test_odd_names_are_found_by_themselves(s3_server: S3Server, odd: Mount, name: str) -> None:
    """Without a listing before, a name goes through HEAD and LIST with the key as prefix."""
    assert (odd.path / name).read_bytes() == name.encode()
    assert os.getxattr(odd.path / name, "user.cachefs.key") == name.encode()


def test_odd_names_without_any_listing(s3_server: S3Server, node: Node) -> None:
    names = [name for name in ODD_NAMES if "\\" not in name][:7]  # more would make cachefs list the directory
    with Bucket.create(s3_server) as bucket:
        for name in names:
            bucket.put(name, name.encode())
        mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")
        assert {name: (mount.path / name).read_bytes().decode() for name in names} == {name: name for name in names}


def test_every_odd_name_through_the_memory_endpoint(node: Node, memory_s3: MemoryS3) -> None:
    for name in ODD_NAMES:
        memory_s3.store.put(name, name.encode())
    mount = mount_memory(node, memory_s3)
    assert (mount.path / "back\\slash").read_bytes() == b"back\\slash"
    assert tree_of(mount.path) == tree_from_keys({name: name.encode() for name in ODD_NAMES})


def test_names_that_are_not_utf8(node: Node, tmp_path: Path) -> None:
    raw = [b"latin-\xe9", b"\xff\xfe", b"half-\xc3", b"dir-\x80/file-\x81"]
    for name in raw:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(name)
    mount = node.mount(f"file://{tmp_path}")
    for name in raw:
        assert Path(mount.path, os.fsdecode(name)).read_bytes() == name
    assert sorted(os.listdir(os.fsencode(mount.path))) == sorted(
        [b"latin-\xe9", b"\xff\xfe", b"half-\xc3", b"dir-\x80"]
    )


# -- hidden -----------------------------------------------------------------------------------------------------------


def test_n3_hidden_keys_are_hidden_and_counted(node: Node, memory_s3: MemoryS3) -> None:
    hidden = [
        "double//slash",
        "/leading",
        "//two",
        "./dot",
        "../up",
        "sub/../climb",
        "sub/./stay",
        "sub/..",
        "long/" + "n" * 256,
        "wide/" + "ä" * 128,
        "x" * 300 + "/inside",
        "zero\x00byte",
    ]
    visible = ["double/ok", "sub/ok", "long/" + "n" * 255, "wide/" + "ä" * 127, "ok"]
    for key in (*hidden, *visible):
        memory_s3.store.put(key, key.encode())
    mount = mount_memory(node, memory_s3)
    assert tree_of(mount.path) == tree_from_keys({key: key.encode() for key in visible})
    volumes = node.status()["agents"][0]["volumes"]
    # what is below a hidden directory is never listed: ".", "..", "" and the long one at the top, then those inside
    assert [volume["hidden_keys"] for volume in volumes.values()] == [11], volumes
    for path in ("sub/../ok", "sub/./ok", "double//ok"):
        assert Path(f"{mount.path}/{path}").exists()  # the kernel itself understands these


def test_n2_conflicts_of_files_and_directories(node: Node, memory_s3: MemoryS3) -> None:
    keys = ["a", "a/b", "a/b/c", "a/b/", "a-x", "a!x", "a.txt", "a0", "z/", "z"]
    for key in keys:
        memory_s3.store.put(key, key.encode())
    mount = mount_memory(node, memory_s3)
    assert tree_of(mount.path) == {
        "a": None,
        "a/b": None,
        "a/b/c": b"a/b/c",
        "a-x": b"a-x",
        "a!x": b"a!x",
        "a.txt": b"a.txt",
        "a0": b"a0",
        "z": None,
    }


def test_n2_conflicts_when_names_are_asked_one_by_one(node: Node, memory_s3: MemoryS3) -> None:
    memory_s3.store.put("both", b"file")
    memory_s3.store.put("both/inside", b"inside")
    memory_s3.store.put("bothx", b"x")
    mount = mount_memory(node, memory_s3)
    assert (mount.path / "both").is_dir()
    assert (mount.path / "both/inside").read_bytes() == b"inside"
    assert errno_name(lambda: (mount.path / "both").read_bytes()) == "EISDIR"


# -- order and pages --------------------------------------------------------------------------------------------------


def between_names(count: int) -> list[str]:
    """Keys around directories whose names sort before and behind them, on every page border."""
    keys = []
    for number in range(count):
        keys += [f"d{number:04}/x", f"d{number:04}!", f"d{number:04}-", f"d{number:04}0", f"d{number:04}"]
    return keys


def test_n4_a_listing_is_in_the_stores_order(node: Node, memory_s3: MemoryS3) -> None:
    keys = between_names(60)
    for key in keys:
        memory_s3.store.put(key, key.encode())
    mount = mount_memory(node, memory_s3)
    in_order = sorted({key.split("/")[0] + "/" if "/" in key else key for key in keys})
    hidden = {f"d{number:04}" for number in range(60)}
    wanted = [name.rstrip("/") for name in in_order if name not in hidden]
    assert os.listdir(mount.path) == wanted
    assert os.listdir(mount.path) == wanted


@pytest.mark.parametrize("page_size", [1, 2, 3, 7])
def test_pages_of_any_size_give_every_name_once(node: Node, page_size: int) -> None:
    keys = between_names(6)
    with MemoryS3(page_size=page_size) as memory_s3:
        for key in keys:
            memory_s3.store.put(key, key.encode())
        mount = mount_memory(node, memory_s3)
        first = os.listdir(mount.path)
        assert sorted(first) == sorted(tree for tree in tree_from_keys(dict.fromkeys(keys, b"")) if "/" not in tree)
        assert os.listdir(mount.path) == first


def test_the_real_server_lists_in_another_order_and_nothing_is_lost(
    node: Node, bucket: Bucket, s3_server: S3Server
) -> None:
    """SeaweedFS sorts directories without their slash, so an entry can come after the place where S3 would have it."""
    keys = between_names(420)
    bucket.fill({key: key.encode() for key in keys})
    mount = node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}")
    wanted = sorted(name for name in tree_from_keys(dict.fromkeys(keys, b"")) if "/" not in name)
    assert sorted(os.listdir(mount.path)) == wanted
    assert sorted(os.listdir(mount.path)) == wanted


def test_n4_a_first_listing_streams(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """The first names can be seen while a later page still waits."""
    bucket.fill({f"{number:05}": b"" for number in range(2500)})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    rule = proxy.add(Fault(kind="list", skip=1, stall=True))
    seen = threading.Event()
    names: list[str] = []

    def list_directory() -> None:
        with os.scandir(mount.path) as entries:
            for entry in entries:
                names.append(entry.name)
                seen.set()

    reader = threading.Thread(target=list_directory)
    reader.start()
    try:
        assert seen.wait(10), "nothing was shown while the second page waited"
        assert rule.hits
    finally:
        proxy.clear()
        reader.join(60)
    assert not reader.is_alive()
    assert names == [f"{number:05}" for number in range(2500)]


def test_reading_a_directory_in_pieces_and_again(node: Node, memory_s3: MemoryS3) -> None:
    names = [f"{number:04}" for number in range(1500)]
    for name in names:
        memory_s3.store.put(name, b"")
    mount = mount_memory(node, memory_s3)
    program = (
        "import ctypes, os, sys\n"
        "c = ctypes.CDLL(None); c.opendir.restype = c.readdir.restype = ctypes.c_void_p\n"
        "c.telldir.restype = ctypes.c_long\n"
        "d = ctypes.c_void_p(c.opendir(os.fsencode(sys.argv[1])))\n"
        "name = lambda p: ctypes.string_at(p + 19).decode()\n"
        "first = []; marks = {}\n"
        "while True:\n"
        "    mark = c.telldir(d); p = c.readdir(d)\n"
        "    if not p: break\n"
        "    first.append(name(p)); marks[first[-1]] = mark\n"
        "for wanted in (first[0], first[700], first[-1], first[1]):\n"
        "    c.seekdir(d, ctypes.c_long(marks[wanted])); assert name(c.readdir(d)) == wanted, wanted\n"
        "c.rewinddir(d); again = []\n"
        "while p := c.readdir(d): again.append(name(p))\n"
        "assert again == first\n"
        "first = [name for name in first if name not in ('.', '..')]\n"
        "print(len(first), len(set(first)))\n"
    )
    done = run_program(["python3", "-c", program, mount.path])
    assert done.stdout.split() == ["1500", "1500"]


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_beyond_four_gib(node: Node, tmp_path: Path) -> None:
    size = 5 * GIB + 12_345
    marks = {0: b"first", 4 * GIB - 3: b"across 4 GiB", 5 * GIB: b"fifth", size - 4: b"last"}
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.truncate(size)
        for offset, mark in marks.items():
            file.seek(offset)
            file.write(mark)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/small").write_bytes(b"small")
    mount = node.mount(f"file://{tmp_path}")
    path = mount.path / "sparse.bin"
    assert os.stat(path).st_size == size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, mark in marks.items():
            assert os.pread(descriptor, len(mark), offset) == mark
        assert os.pread(descriptor, 4096, 4 * GIB - 2048) == bytes(2045) + b"across 4 GiB" + bytes(2039)
        assert os.pread(descriptor, 4096, 3 * GIB) == bytes(4096)
        assert os.pread(descriptor, 4096, size) == b""
        assert os.pread(descriptor, 4096, size - 2) == b"st"
    finally:
        os.close(descriptor)
    assert (mount.path / "sub/small").read_bytes() == b"small"


def test_empty_objects(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({f"empty/{number}": b"" for number in range(20)})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    for entry in os.scandir(mount.path / "empty"):
        assert Path(entry.path).read_bytes() == b""
    assert proxy.count("get") == 0
