"""The store of a mount with a manifest: names from the file, bytes from the bucket, pinned."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.errors import CachefsError, NotFound, StaleObject
from cachefs.store.faults import FaultStore, Operation
from cachefs.store.manifest import Header, Manifest
from cachefs.store.manifest_store import ManifestStore
from cachefs.store.manifest_writer import write_manifest
from cachefs.store.memory import MemoryStore
from cachefs.types import ObjectVersion, Tier


class Orders:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.bodies: dict[int, bytes] = {}
        self.errors: dict[int, CachefsError] = {}

    def begin(self, number: int) -> bool:
        return True

    def postponed(self, number: int) -> bool:
        return True

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        self.bodies[number] = bytes(body)

    def failed(self, number: int, error: CachefsError) -> None:
        self.errors[number] = error


@pytest.fixture
def bucket() -> MemoryStore:
    store = MemoryStore("b")
    for key in ("a", "d/b", "d/c"):
        store.put(key, key.encode() * 3)
    return store


@pytest.fixture
def pinned(bucket: MemoryStore, tmp_path: Path) -> Iterator[tuple[ManifestStore, FaultStore]]:
    raw = io.BytesIO()
    listing = bucket.list_page("", delimiter="").objects
    write_manifest(raw, Header(bucket="b", prefix="", created_ns=1), listing)
    path = tmp_path / "manifest"
    path.write_bytes(raw.getvalue())
    counted = FaultStore(bucket)
    store = ManifestStore(counted, Manifest(path), ObjectVersion("m", "e", len(raw.getvalue())))
    yield store, counted
    store.close()


def test_names_ask_nobody(pinned: tuple[ManifestStore, FaultStore], bucket: MemoryStore) -> None:
    store, counted = pinned
    before = bucket.head("d/b")
    bucket.put("d/b", b"another")
    bucket.put("new", b"new")
    bucket.delete("a")
    assert [found.key for found in store.list_page("", delimiter="").objects] == ["a", "d/b", "d/c"]
    assert store.list_page("").prefixes == ("d/",)
    assert store.head("d/b") == before
    with pytest.raises(NotFound, match="'new' in the manifest 'm'"):
        store.head("new")
    assert not counted.plan.calls
    assert store.counters.snapshot()["origin_requests"] == 0


def test_bytes_are_those_that_were_pinned(pinned: tuple[ManifestStore, FaultStore], bucket: MemoryStore) -> None:
    store, counted = pinned
    versions = [store.head(key).version for key in ("a", "d/b", "d/c")]
    bucket.put("d/b", b"another")
    assert bytes(store.get_range(versions[0], 0, 3)) == b"aaa"
    with pytest.raises(StaleObject):
        store.get_range(versions[1], 0, 3)
    orders = Orders()
    store.get_many(versions, orders)
    assert orders.bodies == {0: b"aaa", 2: b"d/c" * 3}
    assert isinstance(orders.errors.pop(1), StaleObject)
    assert not orders.errors
    buffer = memoryview(bytearray(9))
    assert list(store.read_into(versions[2], 0, [buffer[:4], buffer[4:]])) == [1, 2]
    assert bytes(buffer) == b"d/c" * 3
    assert counted.plan.calls[Operation.GET] == 6


def test_a_view_is_of_one_version_of_one_manifest(
    pinned: tuple[ManifestStore, FaultStore], bucket: MemoryStore
) -> None:
    store, _ = pinned
    assert "m" in store.view
    assert "e" in store.view
    assert store.endpoint == bucket.endpoint  # so blocks are those of the bucket itself


def test_the_check_looks_for_the_manifest(pinned: tuple[ManifestStore, FaultStore], bucket: MemoryStore) -> None:
    store, _ = pinned
    with pytest.raises(NotFound):
        store.check("")
    bucket.put("m", b"the manifest")
    store.check("")
