"""The format of manifests: what is written is found again, and what is not whole is refused."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import ConfigError, StorageUnavailable
from cachefs.store import manifest_writer
from cachefs.store.manifest import Header, Manifest
from cachefs.store.manifest_writer import write_manifest
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage, ObjectInfo

SECOND_NS = 1_000_000_000
KEYS = st.text(st.sampled_from(["a", "b", "/", "-", ".", "%", "\t", "\n", "\x01", "é", "\U0001f600", " "]), min_size=1)


def header(prefix: str = "") -> Header:
    return Header(bucket="b", prefix=prefix, source="pvc-1", created_ns=7)


def written(objects: Iterable[ObjectInfo], prefix: str = "") -> bytes:
    file = io.BytesIO()
    write_manifest(file, header(prefix), objects)
    return file.getvalue()


def described(*keys: str) -> list[ObjectInfo]:
    return [ObjectInfo(key, len(key), f"etag-{number}", number * SECOND_NS) for number, key in enumerate(keys)]


@contextlib.contextmanager
def opened(path: Path, raw: bytes) -> Iterator[Manifest]:
    path.write_bytes(raw)
    with contextlib.closing(Manifest(path, "the manifest")) as manifest:
        yield manifest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "manifest"


def pages(store: MemoryStore | Manifest, prefix: str, delimiter: str, limit: int) -> list[ListPage]:
    found: list[ListPage] = []
    token: str | None = None
    while True:
        found.append(store.list_page(prefix, delimiter=delimiter, token=token, limit=limit))
        token = found[-1].next_token
        if token is None:
            return found


def test_the_format_is_this_one() -> None:
    """Changing it means another number in the first line, and reading this one as well."""
    assert written([ObjectInfo("p/a%\tb", 5, "e1", 3 * SECOND_NS), ObjectInfo("p/é", 0, "e2-3", 0)], "p/") == (
        b'cachefs manifest 1 {"bucket":"b","prefix":"p/","source":"pvc-1","created_ns":7}\n'
        b"p/a%25%09b\t5\t3\te1\n"
        b"p/\xc3\xa9\t0\t0\te2-3\n"
        b"end\t2\t5\t8d41bf7a33f939feaffd1b6a7889f907\n"
    )


@given(st.sets(KEYS, max_size=40), st.sampled_from(["", "a", "a/", "b/a/", "zz"]), st.sampled_from(["", "/"]),
       st.integers(1, 7))  # fmt: skip
def test_listings_are_those_of_a_store(
    tmp_path_factory: pytest.TempPathFactory, keys: set[str], prefix: str, delimiter: str, limit: int
) -> None:
    store = MemoryStore()
    for key in keys:
        store.put(key, key.encode(), mtime_s=5)
    raw = written(store.list_page("", delimiter="", limit=1000).objects)
    with opened(tmp_path_factory.getbasetemp() / "same", raw) as manifest:
        assert pages(manifest, prefix, delimiter, limit) == pages(store, prefix, delimiter, limit)
        for key in keys:
            assert manifest.find(key) == store.head(key)
            assert manifest.find(key + "x") is None
        assert [found.key for found in manifest.objects()] == sorted(keys, key=str.encode)
        middle = min(keys, default="a")
        behind = [found.key for found in manifest.objects(prefix, middle)]
        assert behind == sorted((k for k in keys if k > middle and k.startswith(prefix)), key=str.encode)


def test_figures(path: Path) -> None:
    with opened(path, written(described("a", "bc"))) as manifest:
        assert (manifest.summary.objects, manifest.summary.size_bytes) == (2, 3)
        assert manifest.summary.header == header()
    with opened(path, written([])) as manifest:
        assert manifest.summary.objects == 0
        assert manifest.find("a") is None
        assert manifest.list_page("") == ListPage((), (), None)


@pytest.mark.parametrize("prefix", ["", "p/q/"])
def test_what_a_mount_hides_is_left_out(path: Path, prefix: str) -> None:
    keys = [".cachefs", ".cachefs-more", ".cachefs/snapshots/1", "a/.cachefs/b"]
    with opened(path, written(described(*(prefix + key for key in keys)), prefix)) as manifest:
        found = [each.key for each in manifest.objects()]
        assert found == [f"{prefix}.cachefs-more", f"{prefix}a/.cachefs/b"]
        assert manifest.summary.objects == 2


def test_every_tear_is_noticed(path: Path) -> None:
    raw = written(described("a", "b", "end", "z"))
    for length in range(len(raw)):
        with pytest.raises(ConfigError, match="no whole manifest"), opened(path, raw[:length]):
            pass


def test_every_changed_byte_is_noticed(path: Path) -> None:
    raw = written(described("a", "b"))
    body = raw.rindex(b"\n", 0, -1) + 1
    for at in range(body):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        with pytest.raises(ConfigError, match=r"no whole manifest|has the format"), opened(path, changed):
            pass
    with pytest.raises(ConfigError, match="no whole manifest"), opened(path, raw + b"more\n"):
        pass


def test_another_format_is_named(path: Path) -> None:
    raw = written([]).replace(b"manifest 1", b"manifest 2")
    with pytest.raises(ConfigError, match="has the format '2', this version reads 1"), opened(path, raw):
        pass


def test_an_object_without_an_entity_tag_cannot_be_pinned() -> None:
    with pytest.raises(StorageUnavailable, match="entity tag"):
        written([ObjectInfo("a", 1, "", 0)])


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_the_order_of_the_listing_does_not_matter(monkeypatch: pytest.MonkeyPatch, path: Path, chunk: int) -> None:
    """Servers that keep directories list `a/b` before `a-b`."""
    monkeypatch.setattr(manifest_writer, "CHUNK", chunk)
    objects = described(*(f"{a}{sep}{b}" for a in "abc" for sep in ("/", "-", "%", "\t", "") for b in ("", "x", "y")))
    ordered = sorted(objects, key=lambda found: found.key.encode())
    wanted = written(ordered)
    assert written(objects) == wanted
    assert written(reversed(objects)) == wanted
    random.Random(chunk).shuffle(objects)
    assert written(objects) == wanted
    newer = [ObjectInfo(found.key, 9, "newer", 0) for found in objects[:5]]
    with opened(path, written([*objects, *newer])) as manifest:
        assert manifest.summary.objects == len(objects)
        assert manifest.summary.size_bytes == sum(found.size for found in objects[5:]) + 9 * 5
        assert all(manifest.find(found.key) == found for found in [*newer, *objects[5:]])


def test_a_line_that_cannot_be_read_is_an_error_and_no_object(path: Path) -> None:
    """A manifest that somebody made by hand, with the right check sum."""
    import xxhash

    text = b'cachefs manifest 1 {"bucket":"b","prefix":"","source":"","created_ns":1}\nname\tlong\t1\te\n'
    raw = text + b"end\t1\t5\t" + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"
    with opened(path, raw) as manifest:
        for ask in (lambda: manifest.find("name"), lambda: manifest.list_page(""), lambda: list(manifest.objects())):
            with pytest.raises(StorageUnavailable, match="cannot be read"):
                ask()


def test_a_closed_one_says_so(path: Path) -> None:
    with opened(path, written(described("a"))) as manifest:
        pass
    for ask in (lambda: manifest.find("a"), lambda: manifest.list_page(""), lambda: list(manifest.objects())):
        with pytest.raises(StorageUnavailable, match="closed"):
            ask()


def test_memory_does_not_grow_with_the_number_of_objects(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    count = 20_000
    monkeypatch.setattr(manifest_writer, "CHUNK", 1000)
    keys = (f"train/{number // 500:04d}/{number:06d}.jpg" for number in range(count))
    with path.open("wb") as file:
        tracemalloc.start()
        try:
            write_manifest(file, header(), (ObjectInfo(key, 1, "e" * 32, 0) for key in keys))
            file.flush()
            with contextlib.closing(Manifest(path)) as manifest:
                assert sum(len(page.prefixes) for page in pages(manifest, "train/", "/", 1000)) == count // 500
                assert manifest.find("train/0039/019999.jpg") is not None
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()
