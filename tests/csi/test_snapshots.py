"""Snapshots against the real server: manifests in the bucket, records of them, and what is idempotent."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import AlreadyExists, ConfigError, NotFound, StorageUnavailable, UsageError
from cachefs.store.admin import BucketAdmin
from csi import snapshots
from csi.records import FileRecords
from tests.support.spare_bucket import emptied, spare_bucket

OBJECTS = {f"vol/{number:03d}": b"x" * number for number in range(40)} | {
    "vol/": b"", "volume": b"not of it", "vol-1/a": b"neither", "vol/000-x": b"b", "vol/000/x": b"a"
}  # fmt: skip
"""With keys that the server does not list in their order."""


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[str]:
    with spare_bucket(s3_server, "snapshots") as name:
        yield name


@pytest.fixture
def s3_bucket(s3_server: S3Server, bucket: str) -> Iterator[str]:
    """It is empty."""
    with emptied(s3_server, bucket) as name:
        yield name


@pytest.fixture
def records(tmp_path: Path) -> FileRecords:
    return FileRecords(tmp_path / "records")


@pytest.fixture
def config(s3_server: S3Server, s3_bucket: str) -> S3Config:
    return S3Config(source=f"s3://{s3_bucket}", endpoint_url=s3_server.endpoint_url)


@pytest.fixture
def admin(s3_server: S3Server, config: S3Config) -> Iterator[BucketAdmin]:
    s3_server.put_many(config.source.removeprefix("s3://"), OBJECTS.items(), threads=4)
    with BucketAdmin(config, s3_server.environment) as made:
        yield made


def ours(admin: BucketAdmin) -> list[str]:
    return [found.key for found in admin.objects(".cachefs/")]


def take(
    admin: BucketAdmin, records: FileRecords, name: str = "nightly", volume: str = "pvc-1", prefix: str = "vol/"
) -> snapshots.Snapshot:
    return snapshots.create(admin, records, name=name, source_volume_id=volume, prefix=prefix)


def pinned(admin: BucketAdmin, key: str) -> list[tuple[str, int]]:
    with snapshots.downloaded(admin, key) as manifest:
        return [(found.key, found.size) for found in manifest.objects()]


def test_a_snapshot_is_a_manifest_and_a_record(admin: BucketAdmin, records: FileRecords) -> None:
    made = take(admin, records)
    inside = sorted((key, len(body)) for key, body in OBJECTS.items() if key.startswith("vol/"))
    assert (made.objects, made.size_bytes) == (len(inside), sum(size for _, size in inside))
    assert made.manifest == f".cachefs/snapshots/{made.snapshot_id}"
    assert ours(admin) == [made.manifest]
    assert pinned(admin, made.manifest) == inside
    assert snapshots.find(records, made.snapshot_id) == made
    assert snapshots.describe(admin, made.manifest).objects == made.objects


def test_the_same_call_again_changes_nothing(admin: BucketAdmin, records: FileRecords) -> None:
    made = take(admin, records)
    before = admin.head(made.manifest)
    admin.put("vol/new", b"later")
    assert take(admin, records) == made
    assert admin.head(made.manifest) == before
    with pytest.raises(AlreadyExists, match="'nightly' exists already, of the volume 'pvc-1'"):
        take(admin, records, volume="pvc-2")


def test_a_crash_between_manifest_and_record(admin: BucketAdmin, records: FileRecords, tmp_path: Path) -> None:
    made = take(admin, records)
    records.delete(snapshots.KIND, made.snapshot_id)
    admin.put("vol/new", b"later")
    with pytest.raises(AlreadyExists, match="of the volume 'pvc-1'"):
        take(admin, records, volume="pvc-2")
    assert snapshots.find(records, made.snapshot_id) is None
    assert take(admin, records) == made


def test_many_calls_at_once_make_one(admin: BucketAdmin, records: FileRecords) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: take(admin, records), range(8)))
    assert len(set(made)) == 1
    assert ours(admin) == [made[0].manifest]


def test_deletion(admin: BucketAdmin, records: FileRecords) -> None:
    kept, gone = take(admin, records, "kept"), take(admin, records, "gone")
    assert snapshots.delete(admin, records, gone.snapshot_id)
    assert not snapshots.delete(admin, records, gone.snapshot_id)
    assert not snapshots.delete(admin, records, "snap-of-nobody")
    assert not snapshots.delete(admin, records, "../volumes/x")
    assert ours(admin) == [kept.manifest]
    assert snapshots.listed(records) == ([kept], "")
    assert {found.key for found in admin.objects("vol")} == set(OBJECTS)


def test_a_deletion_that_fails_leaves_the_snapshot(
    admin: BucketAdmin, records: FileRecords, s3_server: S3Server, config: S3Config
) -> None:
    made = take(admin, records)
    away = dataclasses.replace(config, endpoint_url="http://127.0.0.1:9", io_timeout_s=0.1)
    with BucketAdmin(away, s3_server.environment) as other, pytest.raises(StorageUnavailable):
        snapshots.delete(other, records, made.snapshot_id)
    assert snapshots.find(records, made.snapshot_id) == made
    assert snapshots.delete(admin, records, made.snapshot_id)


def test_a_volume_keeps_its_manifest_when_the_snapshot_goes(admin: BucketAdmin, records: FileRecords) -> None:
    made = take(admin, records)
    key = snapshots.pin(admin, made.manifest, "pvc-9")
    assert snapshots.pin(admin, made.manifest, "pvc-9") == key == snapshots.volume_manifest_key("pvc-9")
    snapshots.delete(admin, records, made.snapshot_id)
    assert len(pinned(admin, key)) == made.objects
    with pytest.raises(NotFound):
        snapshots.pin(admin, made.manifest, "pvc-10")
    clone = snapshots.pin(admin, key, "pvc-11")
    snapshots.unpin(admin, "pvc-9")
    snapshots.unpin(admin, "pvc-9")
    assert ours(admin) == [clone]


def test_the_snapshot_of_a_volume_from_a_snapshot_is_of_what_that_shows(
    admin: BucketAdmin, records: FileRecords
) -> None:
    first = take(admin, records)
    key = snapshots.pin(admin, first.manifest, "pvc-9")
    admin.put("vol/new", b"later")
    second = snapshots.create(
        admin, records, name="second", source_volume_id="pvc-9", prefix="vol/", source_manifest=key
    )
    assert (second.objects, second.size_bytes, second.source_volume_id) == (first.objects, first.size_bytes, "pvc-9")
    assert pinned(admin, second.manifest) == pinned(admin, first.manifest)


def test_a_pinned_prefix_is_pinned_once(admin: BucketAdmin) -> None:
    first = snapshots.pin_prefix(admin, "vol/", "pvc-7")
    admin.put("vol/new", b"later")
    assert snapshots.pin_prefix(admin, "vol/", "pvc-7") == first


def test_a_whole_bucket_leaves_out_what_is_ours(admin: BucketAdmin, records: FileRecords) -> None:
    first = take(admin, records, "first", prefix="")
    second = take(admin, records, "second", prefix="")
    assert first.objects == second.objects == len(OBJECTS)
    assert [key for key, _ in pinned(admin, second.manifest)] == sorted(OBJECTS)


def test_lists_by_page_and_by_volume(admin: BucketAdmin, records: FileRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PAGE", 2)
    made = [take(admin, records, f"s{number}", f"pvc-{number % 2}") for number in range(7)]
    ordered = sorted(made, key=lambda each: each.snapshot_id)
    assert snapshots.listed(records) == (ordered, "")
    for volume in ("", "pvc-0", "pvc-1", "pvc-2"):
        wanted = [each for each in ordered if volume in ("", each.source_volume_id)]
        found: list[snapshots.Snapshot] = []
        after = ""
        while True:
            page, after = snapshots.listed(records, after=after, limit=2, source_volume_id=volume)
            assert len(page) <= 2
            found += page
            if not after:
                break
        assert found == wanted


def test_what_is_no_manifest_is_not_taken_for_one(admin: BucketAdmin, records: FileRecords) -> None:
    key = snapshots.manifest_key(snapshots.snapshot_id("nightly"))
    admin.put(key, io.BytesIO(b"cachefs manifest 1 {}"))
    with pytest.raises(ConfigError, match="no whole manifest"):
        take(admin, records)
    assert snapshots.find(records, snapshots.snapshot_id("nightly")) is None


@pytest.mark.parametrize("wrong", ["", "a/b", "..", ".", "a\nb"])
def test_ids_lead_nowhere_else(wrong: str) -> None:
    with pytest.raises(UsageError):
        snapshots.volume_manifest_key(wrong)
