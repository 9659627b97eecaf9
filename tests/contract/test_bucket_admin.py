"""What the controller does to buckets, against the real server: conditions, pages, deletions, copies, refusals."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import (
    AccessDenied,
    AlreadyExists,
    BadBody,
    BucketNotFound,
    CachefsError,
    ConfigError,
    CredentialsError,
    NotFound,
    StaleObject,
    StorageUnavailable,
    UsageError,
)
from cachefs.store.admin import BucketAdmin
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.spare_bucket import emptied, spare_bucket


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[str]:
    with spare_bucket(s3_server, "admin") as name:
        yield name


@pytest.fixture
def s3_bucket(s3_server: S3Server, bucket: str) -> Iterator[str]:
    """It is empty."""
    with emptied(s3_server, bucket) as name:
        yield name


@pytest.fixture
def config(s3_server: S3Server, s3_bucket: str) -> S3Config:
    return S3Config(source=f"s3://{s3_bucket}/some/prefix", endpoint_url=s3_server.endpoint_url)


@pytest.fixture
def admin(s3_server: S3Server, config: S3Config) -> Iterator[BucketAdmin]:
    with BucketAdmin(config, s3_server.environment) as made:
        yield made


@pytest.fixture
def proxied(s3_server: S3Server, config: S3Config) -> Iterator[tuple[BucketAdmin, FaultProxy]]:
    with FaultProxy.before(s3_server.endpoint_url) as proxy:
        through = dataclasses.replace(config, endpoint_url=proxy.endpoint_url, io_timeout_s=5.0)
        with BucketAdmin(through, s3_server.environment) as made:
            yield made, proxy


def keys_of(admin: BucketAdmin, prefix: str = "", start_after: str = "") -> list[str]:
    return [found.key for found in admin.objects(prefix, start_after)]


def test_what_is_put_is_there(admin: BucketAdmin) -> None:
    etag = admin.put("a/b", b"one")
    assert admin.head("a/b").etag == etag
    file = io.BytesIO(b"xxtwo")
    file.seek(2)
    assert admin.put("a/b", file) != etag
    assert admin.get("a/b") == b"two"
    with admin.open("a/b") as body:
        assert (body.read(1), body.read(), body.read()) == (b"t", b"wo", b"")
    assert admin.put("empty", b"") == admin.head("empty").etag
    assert admin.get("empty") == b""


def test_of_many_who_want_to_be_first_one_is(admin: BucketAdmin) -> None:
    def first(number: int) -> bool:
        try:
            admin.put("claim", b"%d" % number, only_new=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(first, range(12)))
    assert won.count(True) == 1
    assert admin.get("claim") == b"%d" % won.index(True)


def test_pages_and_deletion_of_2500_keys(s3_server: S3Server, admin: BucketAdmin) -> None:
    keys = [f"many/{number:05d}" for number in range(2500)]
    s3_server.put_many(admin.bucket, ((key, b"x") for key in [*keys, "many-more"]), threads=4)
    assert keys_of(admin, "many/") == keys
    assert keys_of(admin, "many/", "many/01234") == keys[1235:]
    assert keys_of(admin, "many/", "many/01234x") == keys[1235:]
    assert keys_of(admin, "many/", keys[-1]) == []
    assert admin.delete(iter(keys)) == 2500
    assert keys_of(admin) == ["many-more"]
    assert admin.delete(["many-more", "never there"]) == 2


def test_keys_that_xml_cannot_carry(admin: BucketAdmin) -> None:
    odd = ["odd/\x01", "odd/tab\there", "odd/cr\rhere", "odd/a b+c%20&<>\"'", "odd/é\U0001f600", "odd/ "]
    for key in odd:
        admin.put(key, key.encode())
    assert keys_of(admin, "odd/") == sorted(odd, key=str.encode)
    assert (
        keys_of(admin, "odd/", "odd/ ") == sorted(odd, key=str.encode)[sorted(odd, key=str.encode).index("odd/ ") + 1 :]
    )
    for key in odd:
        found = admin.head(key)
        admin.copy(key, found.etag, f"copy/{key}", size=found.size)
        assert admin.get(f"copy/{key}") == key.encode()
    assert admin.delete([*odd, *(f"copy/{key}" for key in odd)]) == 12
    assert keys_of(admin) == []


def test_a_copy_is_of_the_version_that_was_asked_for(s3_server: S3Server, admin: BucketAdmin) -> None:
    s3_server.client().put_object(Bucket=admin.bucket, Key="from", Body=b"one", Metadata={"colour": "red"})
    etag = admin.head("from").etag
    assert admin.copy("from", etag, "to") == etag
    assert admin.head("to").metadata == {"colour": "red"}
    admin.put("from", b"two")
    for size in (None, 3):
        with pytest.raises(StaleObject, match="'from' has changed"):
            admin.copy("from", etag, "later", size=size)
    admin.delete(["from"])
    for size in (None, 3):
        with pytest.raises(StaleObject, match="'from' was deleted"):
            admin.copy("from", etag, "later", size=size)
    assert admin.get("to") == b"one"
    assert keys_of(admin) == ["to"]


def test_a_large_copy_is_made_in_parts(s3_server: S3Server, config: S3Config) -> None:
    body = random.Random(5).randbytes(12 << 20)
    client = s3_server.client()
    with BucketAdmin(config, s3_server.environment, single_copy_bytes=1 << 20, part_copy_bytes=5 << 20) as admin:
        client.put_object(Bucket=admin.bucket, Key="from", Body=body, Metadata={"colour": "red"}, ContentType="a/b")
        etag = admin.head("from").etag
        assert admin.copy("from", etag, "to").endswith("-3")
        assert admin.get("to") == body
        described = client.head_object(Bucket=admin.bucket, Key="to")
        assert (described["Metadata"], described["ContentType"]) == ({"colour": "red"}, "a/b")
        admin.put("from", body + b"!")
        with pytest.raises(StaleObject, match="has changed"):
            admin.copy("from", etag, "later", size=len(body))
        assert not client.list_multipart_uploads(Bucket=admin.bucket).get("Uploads")
        assert keys_of(admin) == ["from", "to"]


def calls(admin: BucketAdmin) -> list[Callable[[], Any]]:
    return [
        lambda: admin.check(""),
        lambda: admin.put("k", b"x"),
        lambda: admin.get("k"),
        lambda: admin.open("k"),
        lambda: admin.head("k"),
        lambda: admin.delete(["k"]),
        lambda: admin.copy("a", "etag", "k"),
        lambda: admin.copy("a", "etag", "k", size=1),
        lambda: list(admin.objects("")),
        lambda: list(admin.objects("", "a")),
    ]


def refusals(admin: BucketAdmin) -> set[type[CachefsError]]:
    found = set()
    for call in calls(admin):
        with pytest.raises(CachefsError) as raised:
            call()
        assert "testsecret" not in str(raised.value)
        found.add(type(raised.value))
    return found


def test_wrong_keys_are_told_in_every_call(s3_server: S3Server, config: S3Config) -> None:
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "not it"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        with BucketAdmin(config, {**s3_server.environment, **wrong}) as admin:
            assert refusals(admin) == {CredentialsError, AccessDenied}  # an answer to HEAD does not say which
    with BucketAdmin(config, {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null"}) as admin:
        assert refusals(admin) == {CredentialsError}


def test_missing_things_are_told(s3_server: S3Server, admin: BucketAdmin, config: S3Config) -> None:
    for ask in (admin.get, admin.open, admin.head):
        with pytest.raises(NotFound, match="no object 'nothing'"):
            ask("nothing")
    elsewhere = dataclasses.replace(config, source="s3://no-such-bucket")
    with BucketAdmin(elsewhere, s3_server.environment) as other, pytest.raises(BucketNotFound, match="no-such-bucket"):
        other.check("")


def test_a_server_that_is_away_is_told_and_no_secret(config: S3Config, s3_server: S3Server) -> None:
    away = dataclasses.replace(config, endpoint_url="http://127.0.0.1:9", io_timeout_s=0.2)
    with BucketAdmin(away, s3_server.environment) as admin:
        assert refusals(admin) == {StorageUnavailable}
        with pytest.raises(StorageUnavailable, match="connection refused"):
            admin.put("k", b"x")


def test_only_buckets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only buckets"):
        BucketAdmin(S3Config(source=f"file://{tmp_path}"), {})
    with pytest.raises(ConfigError, match="CA bundle"):
        BucketAdmin(S3Config(source="s3://bucket", ca_bundle=str(tmp_path / "none")), {})


def test_failures_of_a_moment_are_tried_again(proxied: tuple[BucketAdmin, FaultProxy]) -> None:
    admin, proxy = proxied
    proxy.add(Fault(status=503, times=2))
    admin.put("a", io.BytesIO(b"body"))
    assert admin.get("a") == b"body"
    proxy.add(Fault(status=500, times=1))
    assert admin.delete(["a"]) == 1
    assert keys_of(admin) == []


def test_a_body_that_breaks_off_is_an_error(proxied: tuple[BucketAdmin, FaultProxy]) -> None:
    admin, proxy = proxied
    body = random.Random(3).randbytes(3 << 20)
    admin.put("a", body)
    proxy.add(Fault(kind="get", truncate_after=1 << 20, times=1))
    with admin.open("a") as opened, pytest.raises(BadBody):
        opened.read()
    proxy.add(Fault(kind="get", truncate_after=1 << 20, times=1))
    assert admin.get("a") == body  # tried again


def test_over_tls(secure_proxy: FaultProxy, certificate: Path, s3_server: S3Server, config: S3Config) -> None:
    secure = dataclasses.replace(config, endpoint_url=secure_proxy.endpoint_url, io_timeout_s=1.0)
    with BucketAdmin(secure, s3_server.environment) as admin, pytest.raises(ConfigError, match="--ca-bundle"):
        admin.put("a", b"x")
    with BucketAdmin(dataclasses.replace(secure, ca_bundle=str(certificate)), s3_server.environment) as admin:
        admin.put("a", b"x", only_new=True)
        assert admin.get("a") == b"x"


def test_closed_means_closed(admin: BucketAdmin) -> None:
    admin.put("a", b"x")
    admin.close()
    for call in calls(admin):
        with pytest.raises(StorageUnavailable):
            call()
