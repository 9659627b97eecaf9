"""Background jobs against the real server: copies and deletions, stopped, killed, asked again."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import AlreadyExists, CredentialsError, StaleObject, StorageUnavailable, UsageError
from cachefs.store.admin import BucketAdmin
from cachefs.store.manifest import Header
from csi import transfers
from csi.copying import Jobs, OpenAdmin, Progress
from csi.records import FileRecords
from csi.snapshots import write_pinned
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.programs import REPOSITORY
from tests.support.spare_bucket import emptied, spare_bucket

LONG_S = 30.0


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[str]:
    with spare_bucket(s3_server, "copying") as name:
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
def jobs(records: FileRecords) -> Iterator[Jobs]:
    made = Jobs(records)
    yield made
    made.close()


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy.before(s3_server.endpoint_url) as made:
        yield made


@pytest.fixture
def config(proxy: FaultProxy, s3_bucket: str) -> S3Config:
    return S3Config(source=f"s3://{s3_bucket}", endpoint_url=proxy.endpoint_url, io_timeout_s=5.0)


@pytest.fixture
def open_admin(config: S3Config, s3_server: S3Server) -> OpenAdmin:
    return lambda: BucketAdmin(config, s3_server.environment)


@pytest.fixture
def admin(open_admin: OpenAdmin) -> Iterator[BucketAdmin]:
    with open_admin() as made:
        yield made


@pytest.fixture
def fill(s3_server: S3Server, s3_bucket: str) -> Callable[[int], None]:
    def filled(count: int) -> None:
        objects = ((f"src/{number // 50}/{number:05d}", b"%d" % number) for number in range(count))
        s3_server.put_many(s3_bucket, objects, threads=4)

    return filled


def never() -> BucketAdmin:
    raise AssertionError("nothing may be opened")


def below(admin: BucketAdmin, prefix: str) -> dict[str, tuple[str, int]]:
    return {found.key.removeprefix(prefix): (found.etag, found.size) for found in admin.objects(prefix)}


def copy(jobs: Jobs, open_admin: OpenAdmin, *, wait_s: float = LONG_S, target: str = "dst/") -> Progress:
    return jobs.copy("pvc-1", open_admin, source_prefix="src/", target_prefix=target, wait_s=wait_s)


def slow(proxy: FaultProxy, seconds: float) -> None:
    proxy.add(Fault(key=lambda key: key.startswith("dst/"), delay_s=seconds))


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_small_copy_is_over_within_the_call(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy
) -> None:
    fill(300)
    admin.put("src/odd\x01 %/+é", b"odd")
    admin.put("src/", b"")
    admin.put("dst/", b"")  # the marker of the new volume
    found = copy(jobs, open_admin)
    assert found.ready
    assert (found.done, found.total) == (302, 302)
    assert below(admin, "dst/") == below(admin, "src/")
    assert [each.key for each in admin.objects(".cachefs/")] == []
    proxy.forget()
    assert copy(jobs, open_admin) == found == jobs.progress("pvc-1")
    assert proxy.count() == 0


def test_an_empty_one(jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin) -> None:
    assert copy(jobs, open_admin) == Progress("copying", 0, 0, ready=True)


def test_a_long_copy_says_how_far_it_is(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfers, "COPIES", 10)
    fill(100)
    slow(proxy, 0.05)
    assert not copy(jobs, open_admin, wait_s=0.01).ready
    wait_until(lambda: 0 < getattr(jobs.progress("pvc-1"), "done", 0) < 100, 10, "it is under way")
    found = copy(jobs, open_admin, wait_s=0.0)
    assert found.text == f"copying {found.done:,} of 100 objects"
    with pytest.raises(UsageError, match="at work on something else"):
        copy(jobs, open_admin, target="elsewhere/")
    assert copy(jobs, open_admin).ready
    assert below(admin, "dst/") == below(admin, "src/")


def test_the_source_is_of_one_moment(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An object that changes is no mixture: the call that hears of it fails, the next one copies what is there now."""
    monkeypatch.setattr(transfers, "COPIES", 10)
    fill(60)
    slow(proxy, 0.05)
    copy(jobs, open_admin, wait_s=0.0)
    wait_until(lambda: getattr(jobs.progress("pvc-1"), "done", 0) > 0, 10, "it is under way")
    admin.put("src/1/00059", b"another")
    admin.put("src/1/00099", b"new")
    with pytest.raises(StaleObject, match="src/1/00059"):
        copy(jobs, open_admin)
    known = jobs.progress("pvc-1")
    assert known is not None
    assert not known.ready
    assert "has changed" in known.text
    proxy.clear()
    proxy.forget()
    assert copy(jobs, open_admin) == Progress("copying", 61, 61, ready=True)
    assert below(admin, "dst/") == below(admin, "src/")
    assert proxy.count("put") < 30  # most of it was there already


def test_a_prefix_with_objects_is_never_written_to(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], records: FileRecords
) -> None:
    fill(3)
    admin.put("dst/of somebody", b"precious")
    with pytest.raises(AlreadyExists, match="'dst/of somebody'"):
        copy(jobs, open_admin)
    assert below(admin, "dst/").keys() == {"of somebody"}
    assert records.get("jobs", "pvc-1") is None


@pytest.mark.parametrize(
    ("source", "target"),
    [("src", "dst/"), ("src/", "dst"), ("src/", ""), ("src/", "/"), ("src/", "src/dst/"), ("a/src/", "a/"),
     ("", "dst/"), ("src/", ".cachefs/x/"), ("src/", "a//b/"), ("src/", "../x/"), ("src/", "src/")],
)  # fmt: skip
def test_prefixes_that_cannot_be(jobs: Jobs, source: str, target: str) -> None:
    with pytest.raises(UsageError):
        jobs.copy("pvc-1", never, source_prefix=source, target_prefix=target)


@pytest.mark.expect_warnings("broke")
def test_a_store_that_refuses_is_told_and_the_job_goes_on_later(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, config: S3Config, s3_server: S3Server,
    fill: Callable[[int], None],
) -> None:  # fmt: skip
    fill(20)
    wrong = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    with pytest.raises(CredentialsError):
        copy(jobs, lambda: BucketAdmin(config, wrong))
    away = dataclasses.replace(config, endpoint_url="http://127.0.0.1:9", io_timeout_s=0.1)
    with pytest.raises(StorageUnavailable):
        copy(jobs, lambda: BucketAdmin(away, s3_server.environment))

    def broken() -> BucketAdmin:
        raise RuntimeError("secret words")

    with pytest.raises(StorageUnavailable, match=r"^copying failed: RuntimeError$"):
        copy(jobs, broken)
    assert copy(jobs, open_admin).ready


def test_a_copy_that_was_killed_goes_on_where_it_was(
    admin: BucketAdmin, open_admin: OpenAdmin, config: S3Config, s3_server: S3Server, fill: Callable[[int], None],
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfers, "COPIES", 20)
    fill(400)
    slow(proxy, 0.02)
    records = FileRecords(tmp_path / "records")
    program = f"""
import sys
from pathlib import Path
from cachefs.config import S3Config
from cachefs.store.admin import BucketAdmin
from csi import transfers
from csi.copying import Jobs
from csi.records import FileRecords
transfers.COPIES = 20
config = S3Config(source={config.source!r}, endpoint_url={config.endpoint_url!r})
jobs = Jobs(FileRecords(Path({str(tmp_path / "records")!r})))
jobs.copy("pvc-1", lambda: BucketAdmin(config, {s3_server.environment!r}), source_prefix="src/",
          target_prefix="dst/", wait_s=60.0)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY)
    try:
        wait_until(lambda: (records.get("jobs", "pvc-1") or {}).get("done", 0) >= 100, 30, "a part is copied")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    proxy.clear()
    proxy.forget()
    time.sleep(0.2)  # requests that were on their way
    left = Jobs(records)
    try:
        before = left.progress("pvc-1")
        assert before is not None
        assert (before.total, before.ready) == (400, False)
        admin.put("src/0/later", b"not of the listing")
        assert copy(left, open_admin).ready
    finally:
        left.close()
    copied = below(admin, "dst/")
    assert "0/later" not in copied
    assert copied == {key: found for key, found in below(admin, "src/").items() if key != "0/later"}
    assert proxy.count("put") <= 400 - before.done + 5


def test_closing_stops_and_another_controller_goes_on(
    records: FileRecords, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfers, "COPIES", 10)
    fill(80)
    slow(proxy, 0.05)
    first = Jobs(records)
    copy(first, open_admin, wait_s=0.0)
    wait_until(lambda: getattr(first.progress("pvc-1"), "done", 0) > 0, 10, "it is under way")
    first.close()
    with pytest.raises(StorageUnavailable, match="about to end"):
        copy(first, open_admin)
    done = getattr(first.progress("pvc-1"), "done", 80)
    assert done < 80
    proxy.clear()
    second = Jobs(records)
    try:
        assert copy(second, open_admin).ready
    finally:
        second.close()
    assert below(admin, "dst/") == below(admin, "src/")


def test_jobs_wait_for_their_turn(
    records: FileRecords, open_admin: OpenAdmin, fill: Callable[[int], None], admin: BucketAdmin
) -> None:
    fill(5)
    at_work, most = set[int](), 0
    lock = threading.Lock()

    def counted() -> BucketAdmin:
        nonlocal most
        made = open_admin()
        with lock:
            at_work.add(id(made))
            most = max(most, len(at_work))
        close = made.close

        def closed() -> None:
            with lock:
                at_work.discard(id(made))
            close()

        made.close = closed  # type: ignore[method-assign]
        return made

    jobs = Jobs(records, threads=2)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(
                    lambda number: jobs.copy(
                        f"pvc-{number}", counted, source_prefix="src/", target_prefix=f"dst-{number}/", wait_s=LONG_S
                    ),
                    range(8),
                )
            )
    finally:
        jobs.close()
    assert all(each.ready for each in found)
    assert most <= 2
    assert not at_work


# -- deletions ---------------------------------------------------------------------------------------------------------


def test_a_prefix_is_deleted_and_nothing_else(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, s3_server: S3Server, s3_bucket: str, records: FileRecords,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfers, "DELETE_KEYS", 20)
    inside = [f"a/v/{number:05d}" for number in range(230)] + ["a/v/", "a/v/x/y\x01", "a/v/.cachefs/own"]
    outside = ["a", "a/", "a/v", "a/v-", "a/v0", "a/w/1", ".cachefs/snapshots/s"]
    s3_server.put_many(s3_bucket, ((key, b"x") for key in [*inside, *outside] if key != "a/"), threads=4)
    kept = {found.key for found in admin.objects("")} - set(inside)
    found = jobs.delete("pvc-1", open_admin, prefix="a/v/", wait_s=LONG_S)
    assert found == Progress("deleting", len(inside) - 1, None, ready=True)
    assert {each.key for each in admin.objects("")} == kept
    assert records.get("jobs", "pvc-1") is None
    assert jobs.delete("pvc-1", open_admin, prefix="a/v/", wait_s=LONG_S).ready


def test_a_deletion_that_was_stopped_goes_on(
    records: FileRecords, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfers, "DELETE_KEYS", 10)
    monkeypatch.setattr(transfers, "DELETIONS", 1)
    fill(300)
    admin.put("src/", b"")
    proxy.add(Fault(kind="other", delay_s=0.1))
    proxy.add(Fault(kind="post", delay_s=0.1))
    first = Jobs(records)
    assert not first.delete("pvc-1", open_admin, prefix="src/", wait_s=0.0).ready
    wait_until(lambda: getattr(first.progress("pvc-1"), "done", 0) > 0, 10, "it is under way")
    first.close()
    left = len(below(admin, "src/"))
    assert left > 0
    assert "" in below(admin, "src/")  # the marker goes last
    proxy.clear()
    second = Jobs(records)
    try:
        assert second.delete("pvc-1", open_admin, prefix="src/", wait_s=LONG_S).ready
    finally:
        second.close()
    assert not below(admin, "src/")


def test_a_deletion_ends_the_copy_of_its_volume(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfers, "COPIES", 10)
    fill(100)
    slow(proxy, 0.05)
    copy(jobs, open_admin, wait_s=0.0)
    wait_until(lambda: getattr(jobs.progress("pvc-1"), "done", 0) > 0, 10, "it is under way")
    assert jobs.delete("pvc-1", open_admin, prefix="dst/", wait_s=LONG_S).ready
    assert {found.key.partition("/")[0] for found in admin.objects("")} == {"src"}
    assert jobs.progress("pvc-1") is None
    proxy.clear()
    assert copy(jobs, open_admin).ready


def test_a_job_that_is_forgotten_leaves_no_record(
    jobs: Jobs, open_admin: OpenAdmin, fill: Callable[[int], None], proxy: FaultProxy, records: FileRecords
) -> None:
    fill(30)
    slow(proxy, 0.1)
    copy(jobs, open_admin, wait_s=0.0)
    wait_until(lambda: records.get("jobs", "pvc-1") is not None, 10, "it has begun")
    jobs.forget("pvc-1")
    assert jobs.progress("pvc-1") is None
    jobs.close()
    assert records.get("jobs", "pvc-1") is None


def test_a_new_job_begins_with_a_listing_of_its_own(
    jobs: Jobs, admin: BucketAdmin, open_admin: OpenAdmin, fill: Callable[[int], None]
) -> None:
    fill(3)
    old = Header(bucket=admin.bucket, prefix="src/", created_ns=1)
    write_pinned(admin, ".cachefs/jobs/pvc-1", old, admin.objects("src/"))
    admin.put("src/later", b"x")
    assert copy(jobs, open_admin) == Progress("copying", 4, 4, ready=True)
    assert below(admin, "dst/") == below(admin, "src/")


@pytest.mark.parametrize("prefix", ["", "/", "a", "/a/", ".cachefs/", ".cachefs/snapshots/", "a/../b/", "a//"])
def test_prefixes_that_are_no_volume_are_never_deleted(jobs: Jobs, prefix: str) -> None:
    with pytest.raises(UsageError, match="not the prefix of a volume"):
        jobs.delete("pvc-1", never, prefix=prefix)
