"""Manifests on their way from the real server into the cache directory, and what is in the way."""

from __future__ import annotations

import dataclasses
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import AccessDenied, ConfigError, CredentialsError, StorageUnavailable, UsageError
from cachefs.store import manifest_store
from cachefs.store.admin import BucketAdmin
from cachefs.store.manifest import Header
from cachefs.store.manifest_store import ManifestStore, open_pinned
from cachefs.store.manifest_writer import write_manifest
from cachefs.store.port import Wired
from tests.support.fault_proxy import Fault, FaultProxy

Open = Callable[..., ManifestStore]


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy.before(s3_server.endpoint_url) as made:
        yield made


@pytest.fixture
def config(proxy: FaultProxy, s3_bucket: str) -> S3Config:
    return S3Config(source=f"s3://{s3_bucket}", endpoint_url=proxy.endpoint_url, manifest="m", io_timeout_s=2.0)


@pytest.fixture
def pin(s3_server: S3Server, config: S3Config) -> Iterator[Callable[[], None]]:
    with BucketAdmin(config, s3_server.environment) as admin:
        for number in range(30):
            admin.put(f"k/{number:02d}", b"%d" % number)

        def write() -> None:
            raw = io.BytesIO()
            write_manifest(raw, Header(bucket=admin.bucket, prefix="", created_ns=1), admin.objects("k/"))
            admin.put("m", raw.getvalue())

        write()
        yield write


@pytest.fixture
def opened(config: S3Config, s3_server: S3Server, tmp_path: Path, pin: object) -> Iterator[Open]:
    stores: list[ManifestStore] = []

    def make(*, ask: bool = True, environment: dict[str, str] | None = None) -> ManifestStore:
        stores.append(open_pinned(config, environment or s3_server.environment, tmp_path / "manifests", ask=ask))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def test_it_is_brought_once(opened: Open, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.forget()
    assert opened().head("k/07").size == 1
    assert (proxy.count("head", "m"), proxy.count("get", "m")) == (1, 1)
    opened()
    assert (proxy.count("head", "m"), proxy.count("get", "m")) == (2, 1)
    opened(ask=False)
    assert (proxy.count("head", "m"), proxy.count("get", "m")) == (2, 1)
    assert len(os.listdir(tmp_path / "manifests")) == 1


def test_without_asking_the_one_that_was_used_last_will_do(
    opened: Open, pin: Callable[[], None], proxy: FaultProxy, s3_server: S3Server, config: S3Config
) -> None:
    first = opened()
    with BucketAdmin(config, s3_server.environment) as admin:
        admin.put("k/new", b"new")
    pin()
    second = opened()
    assert first.view != second.view
    proxy.down = True
    again = opened(ask=False)
    assert again.view == second.view
    assert again.head("k/new").size == 3
    with pytest.raises(StorageUnavailable):
        opened()


def test_many_at_once(opened: Open, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: opened(), range(16)))
    assert len({store.view for store in stores}) == 1
    assert all(len(store.list_page("k/").objects) == 30 for store in stores)
    assert len(os.listdir(tmp_path / "manifests")) == 1


def test_a_copy_that_was_damaged_is_brought_anew(opened: Open, tmp_path: Path, proxy: FaultProxy) -> None:
    opened().close()
    file = next((tmp_path / "manifests").iterdir())
    whole = file.read_bytes()
    for damage in (b"", whole[:-10], whole.replace(b"k/07", b"k/08")):
        for ask in (True, False):
            file.write_bytes(damage)
            assert opened(ask=ask).head("k/07").size == 1
            assert file.read_bytes() == whole
    proxy.forget()
    opened(ask=False)
    assert proxy.count() == 0


@pytest.mark.expect_warnings("GET 'm' of")
def test_a_transfer_that_breaks_off_leaves_nothing(opened: Open, tmp_path: Path, proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="get", key="m", truncate_after=100))
    with pytest.raises(StorageUnavailable):
        opened()
    assert os.listdir(tmp_path / "manifests") == []
    proxy.clear()
    assert opened().head("k/07").size == 1


def test_a_directory_that_cannot_be_used(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "manifests").write_text("a file")
    with pytest.raises(StorageUnavailable, match=r"cannot be kept in .*manifests"):
        opened()


def test_old_copies_go(opened: Open, tmp_path: Path, pin: Callable[[], None]) -> None:
    opened()
    directory = tmp_path / "manifests"
    old, left, coming = (directory / name for name in ("a.b", ".left.coming", ".now.coming"))
    for path, age_s in ((old, manifest_store.KEPT_S + 9), (left, 7200.0), (coming, 60.0)):
        path.write_text("")
        os.utime(path, (time.time() - age_s,) * 2)
    next(path for path in directory.iterdir() if path.stat().st_size).unlink()
    opened()
    names = set(os.listdir(directory))
    assert coming.name in names
    assert names.isdisjoint({old.name, left.name})


def test_refusals(opened: Open, config: S3Config, s3_server: S3Server, tmp_path: Path) -> None:
    def refused(**changes: str) -> ManifestStore:
        changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        return open_pinned(changed, s3_server.environment, tmp_path / "other", ask=True)

    with pytest.raises(ConfigError, match=r"the manifest 'none' .*: there is no such object"):
        refused(manifest="none")
    with pytest.raises(ConfigError, match="no whole manifest"):
        refused(manifest="k/07")
    with pytest.raises(UsageError, match="only a bucket"):
        refused(source="file:///tmp")
    with pytest.raises((CredentialsError, AccessDenied)):  # an answer to HEAD does not say which
        opened(environment={**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})


def test_bytes_come_over_wires_as_ever(opened: Open) -> None:
    store = opened()
    assert isinstance(store.inner, Wired)
    assert store.inner.wire() is not None
    version = store.head("k/07").version
    assert bytes(store.get_range(version, 0, 1)) == b"7"
