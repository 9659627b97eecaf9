"""N5 of docs/SEMANTICS.md: "." and ".." are in listings, with both engines, and readers may stop and go on behind any
entry. Python's own functions hide the two, so the C library is asked.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import run_program

MANY = 300
_DIRENT = struct.Struct("=QqHB")
"""Number, place, length of the record, type; the name follows, ended by a zero byte (glibc, 64 bit)."""
_DT_DIR = 4

Entry = tuple[bytes, int, int]
"""Name, number, type."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
for _function in (_libc.readdir, _libc.telldir, _libc.rewinddir, _libc.closedir):
    _function.argtypes = [ctypes.c_void_p]


class Listing:
    """A directory stream of the C library. Context manager."""

    def __init__(self, path: Path) -> None:
        self._stream = _libc.opendir(os.fsencode(path))
        assert self._stream, os.strerror(ctypes.get_errno())

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._stream)

    def next(self) -> Entry | None:
        """The next entry."""
        ctypes.set_errno(0)
        address = _libc.readdir(self._stream)
        if not address:
            assert ctypes.get_errno() == 0, os.strerror(ctypes.get_errno())
            return None
        ino, _, _, kind = _DIRENT.unpack(ctypes.string_at(address, _DIRENT.size))
        return ctypes.string_at(address + _DIRENT.size), ino, kind

    def rest(self) -> list[Entry]:
        """All that comes."""
        return list(iter(self.next, None))

    def tell(self) -> int:
        """Where it stands."""
        return int(_libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        """Go on from a place."""
        _libc.seekdir(self._stream, place)

    def rewind(self) -> None:
        """Begin anew."""
        _libc.rewinddir(self._stream)


def listed(path: Path) -> list[Entry]:
    """One whole listing."""
    with Listing(path) as listing:
        return listing.rest()


@pytest.fixture(scope="module", params=["channel", "pyfuse3"])
def mount(request: pytest.FixtureRequest, s3_server: S3Server) -> Iterator[Mount]:
    """One mount for each engine."""
    with Bucket.create(s3_server) as bucket, Node(s3_server.environment) as node:
        bucket.fill({f"a/b/{number:04}": b"x" for number in range(MANY)} | {"top": b"x", "marker/": b""})
        yield node.mount(bucket.url, f"--endpoint-url={s3_server.endpoint_url}", f"--engine={request.param}")


@pytest.mark.parametrize("path", ["", "a", "a/b", "marker"])
def test_n5_each_listing_begins_with_the_directory_and_its_parent(mount: Mount, path: str) -> None:
    place = mount.path / path
    above = place.parent if path else place  # what is above the mount is another file system's
    numbers = os.stat(place).st_ino, os.stat(above).st_ino
    for _ in range(3):  # streamed from the store, from the agent's records, from the kernel's copy
        found = listed(place)
        assert found[:2] == [(b".", numbers[0], _DT_DIR), (b"..", numbers[1], _DT_DIR)]
        names = [os.fsdecode(name) for name, _, _ in found[2:]]
        assert sorted(names) == sorted(os.listdir(place))
        assert len(set(names)) == len(names)


def test_n5_a_listing_goes_on_behind_any_entry(mount: Mount) -> None:
    for path in ("a/b", "marker"):
        with Listing(mount.path / path) as listing:
            places, entries = [listing.tell()], []
            while (entry := listing.next()) is not None:
                entries.append(entry)
                places.append(listing.tell())
            for number in (0, 1, 2, len(entries) // 2, len(entries) - 1, len(entries)):
                listing.seek(places[number])
                assert listing.rest() == entries[number:]
            listing.rewind()
            assert listing.rest() == entries


def test_n5_programs_show_them(mount: Mount) -> None:
    shown = run_program(["ls", "-fa", mount.path]).stdout.split()
    assert shown[:2] == [".", ".."]
    assert set(shown[2:]) == {"a", "top", "marker"}
    assert run_program(["find", mount.path / "a", "-maxdepth", "1"]).stdout.split() == [
        str(mount.path / "a"),
        str(mount.path / "a/b"),
    ]


@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_f3_an_empty_directory_is_listed_once(node: Node, bucket: Bucket, proxy: FaultProxy, engine: str) -> None:
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--consistency=strict", f"--engine={engine}")
    before = proxy.count("list")
    assert [name for name, _, _ in listed(mount.path)] == [b".", b".."]
    assert proxy.count("list") == before + 1
