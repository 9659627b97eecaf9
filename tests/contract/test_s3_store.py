"""The S3 adapter against the real server with a proxy between that breaks answers: which error each fault becomes."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import botocore.httpsession
import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.errors import (
    AccessDenied,
    BadBody,
    CachefsError,
    ConfigError,
    CredentialsError,
    NotFound,
    StaleObject,
    StorageUnavailable,
)
from cachefs.store.open import open_store
from cachefs.store.retry import RetryingStore
from cachefs.store.s3 import S3Store
from cachefs.types import ObjectVersion
from tests.contract.test_bulk_gets import Orders
from tests.support.fault_proxy import Fault, FaultProxy

PLAIN, ODD = "dir/plain", "dir/odd\nkey"
"""A key that obstore can ask for, and one that only the signed requests can."""
BODY = bytes(range(256)) * 2000
LONG, LONG_BODY = "dir/long", bytes(range(251)) * 12_000
"""A range of this length is streamed."""
WAYS = pytest.mark.parametrize("key", [PLAIN, ODD], ids=["obstore", "signed"])


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    s3_server.put_many("faulty", [(PLAIN, BODY), (ODD, BODY), (LONG, LONG_BODY)])
    s3_server.client().put_object(Bucket="faulty", Key="tagged", Body=b"x", Metadata={"Mode": "33188", "mtime": "1.5"})
    s3_server.client().put_object(
        Bucket="faulty", Key="tagged\n", Body=b"x", Metadata={"Mode": "33188", "mtime": "1.5"}
    )
    return "faulty"


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy.before(s3_server.endpoint_url) as made:
        yield made


@pytest.fixture
def config(proxy: FaultProxy, bucket: str) -> S3Config:
    return S3Config(
        source=f"s3://{bucket}",
        endpoint_url=proxy.endpoint_url,
        connect_timeout_s=1,
        request_timeout_s=0.7,
        io_timeout_s=2,
    )


@pytest.fixture
def store(config: S3Config, s3_server: S3Server) -> Iterator[S3Store]:
    made = S3Store(config, s3_server.environment)
    yield made
    made.close()


@pytest.fixture
def version(store: S3Store, proxy: FaultProxy) -> Callable[[str], ObjectVersion]:
    found = {key: store.head(key).version for key in (PLAIN, ODD, LONG)}
    proxy.forget()
    return found.__getitem__


BROKEN_BODIES = [
    (Fault(truncate_after=1000), BadBody),
    (Fault(truncate_after=0), BadBody),
    (Fault(length_delta=-10), BadBody),
    (Fault(length_delta=10), BadBody),
    (Fault(etag='"0123"'), BadBody),
    (Fault(etag='W/"0123"'), BadBody),
    (Fault(status=200), BadBody),
    (Fault(truncate_after=1000, reset=True), StorageUnavailable),
    (Fault(reset=True), StorageUnavailable),
    (Fault(stall=True), StorageUnavailable),
    (Fault(truncate_after=1000, stall=True), StorageUnavailable),
    (Fault(status=500), StorageUnavailable),
    (Fault(status=503), StorageUnavailable),
    (Fault(status=403), AccessDenied),
    (Fault(status=404), StaleObject),
    (Fault(status=412), StaleObject),
    (Fault(status=400, code="ExpiredToken"), CredentialsError),
    (Fault(status=403, code="InvalidAccessKeyId"), CredentialsError),
]


@WAYS
@pytest.mark.parametrize(("fault", "kind"), BROKEN_BODIES, ids=lambda value: repr(value)[:60] if value else None)
def test_what_a_broken_get_becomes(
    key: str,
    fault: Fault,
    kind: type[CachefsError],
    store: S3Store,
    proxy: FaultProxy,
    version: Callable[[str], ObjectVersion],
    s3_server: S3Server,
) -> None:
    rule = proxy.add(fault)
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        store.get_range(version(key), 100, 400_000)
    assert time.monotonic() - started < 2.5
    if kind is StorageUnavailable or kind is BadBody:
        assert isinstance(caught.value, StorageUnavailable)
        assert caught.value.retryable
        assert caught.value.throttled == (fault.status == 503)
    assert s3_server.secret_key not in str(caught.value)
    assert "Signature" not in str(caught.value)
    proxy.remove(rule)
    # A retry may be needed: the proxy closes the connection behind a fault, perhaps after it was taken from the pool.
    assert bytes(RetryingStore(store).get_range(version(key), 100, 400_000)) == BODY[100:400_100]


@pytest.mark.parametrize(("fault", "kind"), BROKEN_BODIES, ids=lambda value: repr(value)[:60] if value else None)
@pytest.mark.parametrize("pieces", [1, 5])
def test_what_a_broken_stream_becomes(
    pieces: int,
    fault: Fault,
    kind: type[CachefsError],
    store: S3Store,
    proxy: FaultProxy,
    version: Callable[[str], ObjectVersion],
) -> None:
    if fault.truncate_after:
        fault = replace(fault, truncate_after=1_500_000)
    rule = proxy.add(fault)
    buffers = [memoryview(bytearray(2_000_000 // pieces)) for _ in range(pieces)]
    started = time.monotonic()
    seen = [0]
    with pytest.raises(kind) as caught:
        seen.extend(store.read_into(version(LONG), 100, buffers))
    complete = seen[-1]
    assert time.monotonic() - started < 2.5
    sent = 1_500_000 * pieces // 2_000_000 if fault.truncate_after else 0
    if fault.reset:  # a reset connection loses what the sender's kernel still had
        assert complete <= sent
    elif not fault.length_delta:
        assert complete == sent
    length = len(buffers[0])
    for at, buffer in enumerate(buffers[:complete]):
        assert bytes(buffer) == LONG_BODY[100 + at * length : 100 + (at + 1) * length], "what was yielded is good"
    if kind is StorageUnavailable or kind is BadBody:
        assert isinstance(caught.value, StorageUnavailable)
        assert caught.value.retryable
        assert caught.value.throttled == (fault.status == 503)
    proxy.remove(rule)
    assert list(RetryingStore(store).read_into(version(LONG), 100, buffers)) == list(range(1, pieces + 1))
    assert b"".join(map(bytes, buffers)) == LONG_BODY[100 : 100 + pieces * length]


def test_a_stream_that_breaks_off_goes_on_where_it_broke(
    store: S3Store, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    wanted = version(LONG)
    proxy.add(Fault(kind="get", times=2, truncate_after=1_300_000))
    buffers = [memoryview(bytearray(500_000)) for _ in range(6)]
    assert list(RetryingStore(store).read_into(wanted, 0, buffers)) == [1, 2, 3, 4, 5, 6]
    assert b"".join(map(bytes, buffers)) == LONG_BODY[:3_000_000]
    ranges = [exchange.range for exchange in proxy.requests]
    assert ranges == ["bytes=0-2999999", "bytes=1000000-2999999", "bytes=2000000-2999999"]


def test_a_stream_that_drips_ends_in_time(
    store: S3Store, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    wanted = version(LONG)
    proxy.add(Fault(kind="get", drip_s=0.02))
    started = time.monotonic()
    with pytest.raises(StorageUnavailable):
        list(store.read_into(wanted, 0, [memoryview(bytearray(2_000_000))]))
    assert time.monotonic() - started < 2.0


@WAYS
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=404), NotFound),
        (Fault(status=403), AccessDenied),
        (Fault(status=500), StorageUnavailable),
        (Fault(status=503), StorageUnavailable),
        (Fault(reset=True), StorageUnavailable),
        (Fault(stall=True), StorageUnavailable),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_a_broken_head_becomes(
    key: str, fault: Fault, kind: type[CachefsError], store: S3Store, proxy: FaultProxy
) -> None:
    rule = proxy.add(fault)
    with pytest.raises(kind):
        store.head(key)
    proxy.remove(rule)
    assert RetryingStore(store).head(key).size == len(BODY)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=403), AccessDenied),
        (Fault(status=404, code="NoSuchBucket"), CachefsError),
        (Fault(status=500), StorageUnavailable),
        (Fault(status=503, retry_after_s=7), StorageUnavailable),
        (Fault(truncate_after=100), BadBody),
        (Fault(length_delta=-20), BadBody),
        (Fault(status=200), BadBody),
        (Fault(reset=True), StorageUnavailable),
        (Fault(stall=True), StorageUnavailable),
        (Fault(truncate_after=100, stall=True), StorageUnavailable),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_a_broken_listing_becomes(
    fault: Fault, kind: type[CachefsError], store: S3Store, proxy: FaultProxy
) -> None:
    rule = proxy.add(fault)
    with pytest.raises(kind) as caught:
        store.list_page("dir/")
    if isinstance(caught.value, StorageUnavailable) and caught.value.throttled:
        assert caught.value.retry_after_s == 7
    proxy.remove(rule)
    assert [found.key for found in RetryingStore(store).list_page("dir/").objects] == sorted([PLAIN, ODD, LONG])


def test_retry_after_is_seen_once_the_store_throttles(
    store: S3Store, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    """obstore hides headers, so the request after a 503 goes the way that sees them."""
    proxy.add(Fault(kind="get", status=503, retry_after_s=3, times=2))
    seen = []
    for _ in range(2):
        with pytest.raises(StorageUnavailable) as caught:
            store.get_range(version(PLAIN), 0, 10)
        seen.append(caught.value.retry_after_s)
    assert seen == [None, 3]
    assert bytes(store.get_range(version(PLAIN), 0, 10)) == BODY[:10]


@WAYS
def test_if_match_and_range_are_sent(
    key: str, store: S3Store, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    store.get_range(version(key), 5, 10)
    assert [(request.key, request.range) for request in proxy.requests] == [(key, "bytes=5-14")]
    with pytest.raises(StaleObject, match="changed"):
        store.get_range(ObjectVersion(key, "another", len(BODY)), 5, 10)


@pytest.mark.parametrize("key", ["tagged", "tagged\n"], ids=["obstore", "signed"])
def test_user_metadata(key: str, store: S3Store) -> None:
    assert dict(store.head(key).metadata) == {"mode": "33188", "mtime": "1.5"}


@WAYS
def test_stored_encodings_are_not_undone(key: str, store: S3Store, s3_server: S3Server, bucket: str) -> None:
    """The bytes of the object, not what a browser would make of them."""
    body, name = gzip.compress(b"text" * 100), f"packed/{key}"
    s3_server.client().put_object(Bucket=bucket, Key=name, Body=body, ContentEncoding="gzip")
    found = store.head(name)
    assert found.size == len(body)
    assert bytes(store.get_range(found.version, 0, len(body))) == body


def test_variables_of_this_process_change_nothing(
    config: S3Config, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore and botocore read AWS_* by themselves; the agent's are not those of the mount."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "wrong",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_SESSION_TOKEN": "wrong",
        "AWS_REGION": "wrong-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_PROFILE": "wrong",
        "AWS_CA_BUNDLE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)
    store = S3Store(config, s3_server.environment)
    store.check("")
    for key in (PLAIN, ODD):
        assert bytes(store.get_range(store.head(key).version, 1, 7)) == BODY[1:8]
    store.close()


@WAYS
def test_retries_make_up_for_faults(
    key: str, config: S3Config, s3_server: S3Server, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    with_retries = open_store(config, s3_server.environment)
    proxy.add(Fault(kind="get", reset=True, times=1))
    proxy.add(Fault(kind="get", truncate_after=10, times=1))
    assert bytes(with_retries.get_range(version(key), 0, 1000)) == BODY[:1000]
    counted = with_retries.counters.snapshot()
    assert counted["origin_retries"] == 2
    assert counted["origin_get_requests"] == 3
    assert counted["origin_errors"] == 2
    assert counted["origin_bytes"] == 1000
    assert proxy.count("get") == 3
    with_retries.close()


@pytest.mark.expect_warnings
def test_a_store_that_is_down_costs_no_more_than_the_deadline(
    config: S3Config, s3_server: S3Server, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    with_retries = open_store(config, s3_server.environment)
    proxy.down = True
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"connection refused.*tried \d+ times"):
        with_retries.get_range(version(PLAIN), 0, 10)
    assert config.io_timeout_s - 0.5 < time.monotonic() - started < config.io_timeout_s + 0.5

    timer = threading.Timer(0.5, lambda: setattr(proxy, "down", False))
    timer.start()
    assert bytes(with_retries.get_range(version(PLAIN), 0, 10)) == BODY[:10]
    timer.join()
    with_retries.close()


def test_close_ends_a_wait(
    config: S3Config, s3_server: S3Server, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    with_retries = open_store(config, s3_server.environment)
    proxy.add(Fault(status=503, retry_after_s=1))
    timer = threading.Timer(0.4, with_retries.close)
    started = time.monotonic()
    timer.start()
    with pytest.raises(StorageUnavailable, match="closed"):
        with_retries.list_page("")
    assert time.monotonic() - started < 1.5
    timer.join()


# -- what `check` says to a person ------------------------------------------------------------------------------------


def _check(environment: dict[str, str], **settings: object) -> str:
    store = S3Store(S3Config(**{"connect_timeout_s": 0.7, "request_timeout_s": 0.7, **settings}), environment)  # type: ignore[arg-type]
    with pytest.raises(CachefsError) as caught:
        store.check("")
    store.close()
    text = str(caught.value)
    assert "\n" not in text
    assert "testsecret" not in text
    return f"{type(caught.value).__name__}: {text}"


def test_messages_of_check(s3_server: S3Server, bucket: str, proxy: FaultProxy) -> None:
    good, url = s3_server.environment, s3_server.endpoint_url
    assert _check(good, source="s3://no-such-bucket", endpoint_url=url) == (
        f"BucketNotFound: bucket 'no-such-bucket' does not exist at {url}"
    )
    source = f"s3://{bucket}"
    wrong_key = {**good, "AWS_ACCESS_KEY_ID": "nobody"}
    assert "CredentialsError" in _check(wrong_key, source=source, endpoint_url=url)
    wrong_secret = {**good, "AWS_SECRET_ACCESS_KEY": "wrong"}
    assert "secret key is wrong" in _check(wrong_secret, source=source, endpoint_url=url)
    without = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nonexistent"}
    without["AWS_SHARED_CREDENTIALS_FILE"] = "/nonexistent"
    assert "no credentials were found" in _check(without, source=source, endpoint_url=url)
    half = {**without, "AWS_ACCESS_KEY_ID": "only"}
    assert "CredentialsError" in _check(half, source=source, endpoint_url=url)
    assert "these credentials may not list" in _check(without, source=source, endpoint_url=url, anonymous=True)
    assert "ConfigError" in _check(good, source=source, endpoint_url=url, profile="absent")
    proxy.down = True
    assert _check(good, source=source, endpoint_url=proxy.endpoint_url) == (
        f"StorageUnavailable: endpoint {proxy.endpoint_url} does not answer (connection refused)"
    )


def test_messages_about_endpoints(s3_server: S3Server) -> None:
    good = s3_server.environment
    assert "its name is unknown" in _check(good, source="s3://bkt", endpoint_url="http://host.invalid:1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "no answer in time" in _check(good, source="s3://bkt", endpoint_url=url)
        secure = url.replace("http", "https")
        assert "no answer in time" in _check(good, source="s3://bkt", endpoint_url=secure)
    no_tls = s3_server.endpoint_url.replace("http:", "https:")
    assert "does not speak TLS" in _check(good, source="s3://bkt", endpoint_url=no_tls)


def test_another_region_is_learned(
    config: S3Config, s3_server: S3Server, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    """A bucket elsewhere: the answer names the region, and everything goes there from then on."""
    store = S3Store(config, s3_server.environment)
    proxy.add(Fault(status=400, code="AuthorizationHeaderMalformed", region="eu-central-1", times=1))
    assert len(store.list_page("dir/").objects) == 3
    assert store.list_page("dir/", limit=1).next_token
    assert proxy.count("list") == 3
    assert "/eu-central-1/s3/" in proxy.requests[-1].authorization
    store.get_range(version(PLAIN), 0, 1)
    assert "/eu-central-1/s3/" in proxy.requests[-1].authorization
    store.close()


def test_another_region_is_learned_by_a_read(
    config: S3Config, s3_server: S3Server, proxy: FaultProxy, version: Callable[[str], ObjectVersion]
) -> None:
    store = S3Store(config, s3_server.environment)
    proxy.add(Fault(status=301, code="PermanentRedirect", region="eu-west-1", times=2))
    assert bytes(store.get_range(version(PLAIN), 0, 5)) == BODY[:5]
    store.get_range(version(PLAIN), 0, 1)
    assert "/eu-west-1/s3/" in proxy.requests[-1].authorization
    store.close()


def test_another_region_without_a_name_is_a_clear_message(store: S3Store, proxy: FaultProxy) -> None:
    proxy.add(Fault(status=301, code="PermanentRedirect"))
    with pytest.raises(ConfigError, match=r"another region.*--region"):
        store.check("")


@pytest.fixture
def keys_file(tmp_path: Path, s3_server: S3Server) -> Callable[[str], dict[str, str]]:
    """Writes a file of keys: good ones or such that the server does not know; returns the environment that names it."""
    path = tmp_path / "credentials"

    def write(which: str) -> dict[str, str]:
        good = s3_server.environment
        access_key = good["AWS_ACCESS_KEY_ID"] if which == "good" else which
        secret_key = good["AWS_SECRET_ACCESS_KEY"]
        path.write_text(f"[default]\naws_access_key_id={access_key}\naws_secret_access_key={secret_key}\n")
        named = {"AWS_SHARED_CREDENTIALS_FILE": str(path), "AWS_CONFIG_FILE": "/nonexistent"}
        return {**named, "AWS_EC2_METADATA_DISABLED": "true"}

    return write


@WAYS
@pytest.mark.parametrize("operation", ["get", "long get", "head", "list"])
def test_keys_that_were_replaced_are_found_without_an_error(
    key: str,
    operation: str,
    config: S3Config,
    proxy: FaultProxy,
    version: Callable[[str], ObjectVersion],
    keys_file: Callable[[str], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cachefs.store.s3.STREAMED_BYTES", 1 << 18)
    store = S3Store(config, keys_file("good"))
    wanted = version(key)

    def read_long() -> int:
        return list(store.read_into(wanted, 0, [memoryview(bytearray(wanted.size))]))[-1]

    operations: dict[str, Callable[[], object]] = {
        "get": lambda: store.get_range(wanted, 0, 10),
        "long get": read_long,
        "head": lambda: store.head(key),
        "list": lambda: store.list_page("dir/"),
    }
    operations[operation]()
    # The server says of the keys in use that their time is over (once), and the file has others by then.
    proxy.add(Fault(status=400, code="ExpiredToken", times=1))
    keys_file("SOMEBODY")
    keys_file("good")
    with pytest.raises(CredentialsError) if operation != "head" else pytest.raises(CachefsError):
        operations[operation]()  # the file is another, but its keys are the same: no second request
    keys_file("SOMEBODY")
    time.sleep(1.1)
    with pytest.raises(CachefsError):
        operations[operation]()  # these the server does not know at all
    keys_file("good")
    proxy.forget()
    operations[operation]()
    refused = [exchange.status for exchange in proxy.requests]
    assert len(refused) == 2
    assert refused[0] == 403
    store.close()


def test_keys_that_stay_bad_cost_no_more_requests(
    config: S3Config,
    proxy: FaultProxy,
    version: Callable[[str], ObjectVersion],
    keys_file: Callable[[str], dict[str, str]],
) -> None:
    store = S3Store(config, keys_file("SOMEBODY"))
    wanted = version(PLAIN)
    for _ in range(20):
        with pytest.raises(CredentialsError):
            store.get_range(wanted, 0, 10)
    assert len(proxy.requests) == 20
    store.close()


def test_threads_share_a_store(store: S3Store, version: Callable[[str], ObjectVersion]) -> None:
    wrong: list[BaseException] = []

    def read(number: int) -> None:
        try:
            for start in range(number, 20_000, 997):
                for key in (PLAIN, ODD):
                    assert bytes(store.get_range(version(key), start, 100)) == BODY[start : start + 100]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- TLS --------------------------------------------------------------------------------------------------------------


def test_ca_bundle(
    secure_proxy: FaultProxy, certificate: Path, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.pem"  # ours is the last of several
    bundle.write_bytes(Path(botocore.httpsession.where()).read_bytes() + b"\n" + certificate.read_bytes())
    config = S3Config(source=f"s3://{bucket}", endpoint_url=secure_proxy.endpoint_url, ca_bundle=str(bundle))
    store = S3Store(config, s3_server.environment)
    store.check("")
    for key in (PLAIN, ODD):
        assert bytes(store.get_range(store.head(key).version, 0, 7)) == BODY[:7]
    store.close()
    many, orders = open_store(config, s3_server.environment), Orders()
    many.get_many([many.head(key).version for key in (PLAIN, ODD)] * 20, orders)
    assert orders.bodies == dict.fromkeys(range(40), BODY)
    many.close()


def test_a_certificate_that_is_not_trusted(secure_proxy: FaultProxy, s3_server: S3Server, bucket: str) -> None:
    settings = {"source": f"s3://{bucket}", "endpoint_url": secure_proxy.endpoint_url}
    assert "use --ca-bundle" in _check(s3_server.environment, **settings)
    store = S3Store(S3Config(**settings), s3_server.environment)  # type: ignore[arg-type]
    with pytest.raises(StorageUnavailable, match="--ca-bundle"):
        store.head(PLAIN)
    store.close()


def test_a_ca_bundle_that_is_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for path in (empty, tmp_path / "absent.pem", tmp_path):
        with pytest.raises(ConfigError, match="CA bundle"):
            S3Store(S3Config(source="s3://bkt", ca_bundle=str(path)), {})
