"""The contract of `cachefs.store.port.ObjectStore`: one body, every implementation, the real S3 server included."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import BadBody, BucketNotFound, CachefsError, NotFound, StaleObject, StorageUnavailable
from cachefs.store.faults import FaultStore
from cachefs.store.local import LocalStore
from cachefs.store.memory import MemoryStore
from cachefs.store.open import open_store
from cachefs.store.port import ListPage, ObjectInfo, ObjectStore
from cachefs.store.retry import RetryingStore
from cachefs.store.s3 import S3Store
from cachefs.types import ObjectVersion


@dataclass
class Subject:
    """A store, and the outside world that changes what is in it."""

    store: ObjectStore
    put: Callable[[str, bytes], object]
    delete: Callable[[str], object]
    bodies_make_etags: bool = True
    backslash: bool = True
    any_key: bool = True
    """Also keys that cannot be a path."""
    ordered: bool = True
    """Lists in the order of the keys' bytes over all pages; SeaweedFS puts the directory a/ before the object a-b."""

    def listed(self, prefix: str = "", delimiter: str = "/", limit: int = 1000) -> tuple[list[ObjectInfo], list[str]]:
        """Read all pages."""
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        for page in self.pages(prefix, delimiter, limit):
            objects.extend(page.objects)
            prefixes.extend(page.prefixes)
        return objects, prefixes

    def pages(self, prefix: str = "", delimiter: str = "/", limit: int = 1000) -> Iterator[ListPage]:
        token = None
        while True:
            page = self.store.list_page(prefix, delimiter=delimiter, token=token, limit=limit)
            yield page
            token = page.next_token
            if token is None:
                return

    def version(self, key: str) -> ObjectVersion:
        return self.store.head(key).version


def _in_memory(wrap: Callable[[MemoryStore], ObjectStore]) -> Subject:
    memory = MemoryStore()
    return Subject(wrap(memory), memory.put, memory.delete)


def _local(directory: Path) -> Subject:
    def put(key: str, body: bytes) -> None:
        path = directory / key
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(".fresh")
        fresh.write_bytes(body)
        fresh.replace(path)

    def delete(key: str) -> None:
        (directory / key).unlink(missing_ok=True)

    return Subject(LocalStore(str(directory)), put, delete, bodies_make_etags=False, any_key=False)


def _s3(server: S3Server, bucket: str) -> Subject:
    config = S3Config(source=f"s3://{bucket}", endpoint_url=server.endpoint_url)
    return Subject(
        open_store(config, server.environment),
        lambda key, body: server.client().put_object(Bucket=bucket, Key=key, Body=body),
        lambda key: server.client().delete_object(Bucket=bucket, Key=key),
        backslash=False,  # SeaweedFS stores it as a slash
        any_key=False,  # and keeps its objects in directories
        ordered=False,
    )


@pytest.fixture(params=["memory", "fault", "retrying", "local", "s3"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """Every implementation in turn."""
    match request.param:
        case "memory":
            made = _in_memory(lambda memory: memory)
        case "fault":
            made = _in_memory(FaultStore)
        case "retrying":
            made = _in_memory(RetryingStore)
        case "local":
            made = _local(tmp_path)
        case _:
            made = _s3(request.getfixturevalue("s3_server"), request.getfixturevalue("s3_bucket"))
    yield made
    made.store.close()


ODD_KEYS = [
    "plain.txt",
    "with space",
    "two  spaces ",
    " leading",
    "percent%41%zz%",
    "plus+sign",
    "hash#star*question?",
    "quotes'\"`",
    "amp&less<greater>;=@:,!$()~",
    "brackets[]{}|^",
    "newline\nin it",
    "tab\tcarriage\rreturn",
    "control\x01\x7f",
    "ünïcödé",
    "日本語/ファイル",
    "emoji-\N{PILE OF POO}",
    "combining-e\u0301",
    "zero\u200bwidth",
    ".hidden",
    "..dots",
    "dots...",
    "-dash",
    "x" * 255,
    "y" * 200 + "/" + "z" * 255,
    "deep/" * 40 + "leaf",
]


def test_whole_and_parts_of_an_object(subject: Subject) -> None:
    body = bytes(range(256)) * 4096
    subject.put("dir/object", body)
    version = subject.version("dir/object")
    assert version.size == len(body)
    assert '"' not in version.etag
    for start, length in [(0, len(body)), (0, 1), (len(body) - 1, 1), (4095, 4098), (1 << 19, 1 << 19)]:
        part = subject.store.get_range(version, start, length)
        assert bytes(part) == body[start : start + length]
        assert len(part) == length


@pytest.mark.parametrize("piece", [700_000, 65_536, 3 << 20])
def test_a_range_in_pieces(subject: Subject, piece: int) -> None:
    body = random.Random(piece).randbytes(3 << 20)
    subject.put("dir/object", body)
    version = subject.version("dir/object")
    for start, length in [(0, len(body)), (12_345, 2 << 20), (len(body) - 10, 10)]:
        places = [bytearray(piece), bytearray(piece)]  # the same memory again and again, as the block cache does
        sizes = [piece] * (length // piece) + [length % piece] * (length % piece > 0)
        buffers = [memoryview(places[at % 2])[:size] for at, size in enumerate(sizes)]
        received = b""
        for count in subject.store.read_into(version, start, buffers):
            received += bytes(buffers[count - 1])
        assert received == body[start : start + length]


def test_a_range_in_pieces_that_nobody_reads_to_its_end(subject: Subject) -> None:
    body = bytes(range(256)) * 8192
    subject.put("dir/object", body)
    version = subject.version("dir/object")
    for _ in range(40):  # more than there are connections
        buffers = [memoryview(bytearray(len(body) // 4)) for _ in range(4)]
        pieces = iter(subject.store.read_into(version, 0, buffers))
        assert next(pieces) == 1
        assert bytes(buffers[0]) == body[: len(body) // 4]
        del pieces
    assert bytes(subject.store.get_range(version, 1, 10)) == body[1:11]


@pytest.mark.parametrize(("start", "length"), [(0, 3 << 20), (1 << 20, (1 << 20) + 1), (-1, 2 << 20)])
def test_pieces_outside_of_the_object_are_refused(subject: Subject, start: int, length: int) -> None:
    subject.put("two MiB", bytes(2 << 20))
    with pytest.raises(BadBody) as caught:
        list(subject.store.read_into(subject.version("two MiB"), start, [memoryview(bytearray(length))]))
    assert not caught.value.retryable


def test_pieces_of_a_changed_object_are_stale(subject: Subject) -> None:
    subject.put("file", b"a" * (2 << 20))
    old = subject.version("file")
    subject.put("file", b"b" * (2 << 20))
    with pytest.raises(StaleObject, match="file"):
        list(subject.store.read_into(old, 0, [memoryview(bytearray(1 << 20)), memoryview(bytearray(1 << 20))]))


@pytest.mark.parametrize(("start", "length"), [(0, 11), (10, 1), (9, 2), (-1, 2), (0, 0), (3, -1)])
def test_a_range_outside_of_the_object_is_refused(subject: Subject, start: int, length: int) -> None:
    subject.put("ten", b"0123456789")
    with pytest.raises(BadBody) as caught:
        subject.store.get_range(subject.version("ten"), start, length)
    assert not caught.value.retryable


@pytest.mark.parametrize("key", ODD_KEYS, ids=lambda key: ascii(key)[:24])
def test_odd_keys(subject: Subject, key: str) -> None:
    subject.put(key, b"body of " + key.encode())
    above, _, _ = key.rpartition("/")
    objects, _ = subject.listed(f"{above}/" if above else "")
    assert [found.key for found in objects] == [key]
    found = subject.store.head(key)
    assert found.version == objects[0].version
    assert bytes(subject.store.get_range(found.version, 8, 3)) == key.encode()[:3]


def test_backslashes(subject: Subject) -> None:
    if not subject.backslash:
        pytest.skip("this server takes a backslash for a slash")
    subject.put("back\\slash", b"body")
    assert [found.key for found in subject.listed()[0]] == ["back\\slash"]
    assert bytes(subject.store.get_range(subject.version("back\\slash"), 0, 4)) == b"body"


@pytest.mark.parametrize("key", ["a//b", "/a", "./a", "a/../b", "a/./b"])
def test_keys_that_cannot_be_a_path(subject: Subject, key: str) -> None:
    if not subject.any_key:
        pytest.skip("this store keeps its objects in directories")
    subject.put(key, b"body")
    assert [found.key for found in subject.listed(delimiter="")[0]] == [key]
    assert bytes(subject.store.get_range(subject.version(key), 0, 4)) == b"body"


def test_an_object_beside_a_directory_of_its_name(subject: Subject) -> None:
    if not subject.any_key:
        pytest.skip("this store keeps its objects in directories")
    for key in ("a", "a/b", "a.txt", "a/", "a0"):
        subject.put(key, b"x")
    objects, prefixes = subject.listed()
    assert [found.key for found in objects] == ["a", "a.txt", "a0"]
    assert prefixes == ["a/"]
    objects, prefixes = subject.listed("a/")
    assert [found.key for found in objects] == ["a/", "a/b"]
    assert prefixes == []


def test_an_empty_object(subject: Subject) -> None:
    subject.put("empty", b"")
    assert subject.store.head("empty").size == 0
    assert [found.size for found in subject.listed()[0]] == [0]
    with pytest.raises(BadBody):
        subject.store.get_range(subject.version("empty"), 0, 1)


def test_listing_and_head_agree(subject: Subject) -> None:
    before = time.time_ns() - 2_000_000_000
    subject.put("dir/one", b"1")
    subject.put("dir/two", b"22")
    for listed in subject.listed("dir/")[0]:
        head = subject.store.head(listed.key)
        assert (head.version, head.mtime_ns) == (listed.version, listed.mtime_ns)
        assert before <= head.mtime_ns <= time.time_ns()
        assert listed.metadata == {}


def test_nothing_there(subject: Subject) -> None:
    subject.put("dir/file", b"x")
    for key in ("absent", "dir", "dir/absent", "dir/file/below"):
        with pytest.raises(NotFound, match=key):
            subject.store.head(key)
    for prefix in ("absent/", "fil", "dir/file/"):
        assert subject.listed(prefix) == ([], [])


def test_a_changed_object_is_stale(subject: Subject) -> None:
    subject.put("file", b"a" * 100)
    old = subject.version("file")
    subject.put("file", b"b" * 100)
    with pytest.raises(StaleObject, match="file"):
        subject.store.get_range(old, 0, 10)
    assert bytes(subject.store.get_range(subject.version("file"), 0, 10)) == b"b" * 10


def test_a_shortened_object_is_stale(subject: Subject) -> None:
    subject.put("file", b"a" * 100)
    old = subject.version("file")
    subject.put("file", b"a" * 10)
    for start in (0, 50):
        with pytest.raises(StaleObject, match="file"):
            subject.store.get_range(old, start, 10)


def test_a_deleted_object_is_stale(subject: Subject) -> None:
    subject.put("file", b"a" * 100)
    old = subject.version("file")
    subject.delete("file")
    with pytest.raises(StaleObject, match="file"):
        subject.store.get_range(old, 0, 10)
    assert subject.listed() == ([], [])


def test_the_same_bytes_written_again(subject: Subject) -> None:
    subject.put("file", b"same")
    old = subject.version("file")
    subject.put("file", b"same")
    if subject.bodies_make_etags:
        assert subject.version("file") == old
        assert bytes(subject.store.get_range(old, 0, 4)) == b"same"


TREE = ["a/1", "a/2", "a/sub/3", "a-b", "a.b", "b/x/y/z", "b/x.y", "c", "ä/ö", "zz", "A", "0"]


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
def test_listing_in_pages(subject: Subject, limit: int) -> None:
    for key in TREE:
        subject.put(key, key.encode())
    objects, prefixes = subject.listed(limit=limit)
    assert [found.key for found in objects] == sorted((key for key in TREE if "/" not in key), key=str.encode)
    assert prefixes == ["a/", "b/", "ä/"]
    assert [found.key for found in subject.listed("a/", limit=limit)[0]] == ["a/1", "a/2"]
    assert subject.listed("a/", limit=limit)[1] == ["a/sub/"]
    behind = b""
    for page in subject.pages(limit=limit):
        names = sorted([found.key.encode() for found in page.objects] + [prefix.encode() for prefix in page.prefixes])
        assert 0 < len(names) <= limit
        assert not subject.ordered or behind < names[0]
        behind = names[-1]


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_listing_without_a_delimiter(subject: Subject, limit: int) -> None:
    for key in TREE:
        subject.put(key, b"x")
    for prefix in ("", "b/", "a", "absent/"):
        objects, prefixes = subject.listed(prefix, delimiter="", limit=limit)
        keys = [found.key for found in objects]
        assert prefixes == []
        assert sorted(keys) == sorted(key for key in TREE if key.startswith(prefix))
        assert not subject.ordered or keys == sorted(keys, key=str.encode)


def test_listing_by_the_beginning_of_a_name(subject: Subject) -> None:
    for key in TREE:
        subject.put(key, b"x")
    objects, prefixes = subject.listed("a")
    assert ([found.key for found in objects], prefixes) == (["a-b", "a.b"], ["a/"])
    assert subject.listed("a/su")[1] == ["a/sub/"]


def test_a_page_can_be_asked_for_twice(subject: Subject) -> None:
    for number in range(9):
        subject.put(f"dir/{number}", b"x")
    first = subject.store.list_page("dir/", limit=4)
    second = [subject.store.list_page("dir/", token=first.next_token, limit=4) for _ in range(2)]
    assert second[0].objects == second[1].objects
    assert [found.key for found in second[0].objects] == ["dir/4", "dir/5", "dir/6", "dir/7"]


def test_many_pages(subject: Subject) -> None:
    count = 130 if isinstance(getattr(subject.store, "inner", None), S3Store) else 2500
    names = [f"many/{number:05d}" for number in range(count)]
    for name in names:
        subject.put(name, b"")
    assert [found.key for found in subject.listed("many/", limit=count // 6)[0]] == names


def test_check_of_a_good_store(subject: Subject) -> None:
    subject.store.check("")
    subject.store.check("a prefix/that is not there/")


def test_a_closed_store(subject: Subject) -> None:
    subject.put("file", b"x")
    version = subject.version("file")
    subject.store.close()
    subject.store.close()
    for call in (
        lambda: subject.store.head("file"),
        lambda: subject.store.get_range(version, 0, 1),
        lambda: subject.store.list_page(""),
    ):
        with pytest.raises(StorageUnavailable) as caught:
            call()
        assert not caught.value.retryable


def test_endpoint_and_bucket_are_stable(subject: Subject) -> None:
    assert subject.store.endpoint == subject.store.endpoint
    assert "://" in subject.store.endpoint
    assert subject.store.bucket


@pytest.mark.parametrize("kind", ["memory", "local", "s3"])
def test_a_bucket_that_does_not_exist(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store: ObjectStore
    if kind == "memory":
        memory = MemoryStore()
        memory.drop_bucket()
        store = memory
    elif kind == "local":
        store = LocalStore(str(tmp_path / "absent"))
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        store = S3Store(S3Config(source="s3://absent-bucket", endpoint_url=server.endpoint_url), server.environment)
    for call in (lambda: store.check(""), lambda: store.list_page("")):
        with pytest.raises(BucketNotFound, match="does not exist"):
            call()
    with pytest.raises(CachefsError):
        store.head("key")
    store.close()
