"""Sources, addresses, and what enters URLs."""

from __future__ import annotations

import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.config import Addressing, S3Config
from cachefs.errors import ConfigError, UsageError
from cachefs.store.address import Address, encode_query, quote
from cachefs.store.local import LocalStore
from cachefs.store.open import Source, open_store, parse_source
from cachefs.store.s3 import S3Store


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("s3://bucket", Source("s3", "bucket", "")),
        ("s3://bucket/", Source("s3", "bucket", "")),
        ("S3://bucket/a", Source("s3", "bucket", "a/")),
        ("s3://bucket/a/b/", Source("s3", "bucket", "a/b/")),
        ("s3://Old_Bucket.name/ä b/%", Source("s3", "Old_Bucket.name", "ä b/%/")),
        ("s3://bucket/a?b#c", Source("s3", "bucket", "a?b#c/")),
        ("file:///data", Source("file", "/data", "")),
        ("file:///data//x/../y/", Source("file", "/data/y", "")),
        ("file:///", Source("file", "/", "")),
    ],
)
def test_good_sources(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "s3://BUCKET"),
        ("bucket", "s3://BUCKET"),
        ("/data", "file://DIRECTORY"),
        ("s3:bucket", "s3://BUCKET"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://ab", "3 to 63"),
        ("s3://" + "a" * 64, "3 to 63"),
        ("s3://-bucket", "letter or digit first"),
        ("s3://bu cket", "not the name"),
        ("s3://user:secret@bucket", "not the name"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket//", "empty part"),
        ("s3://bucket//a", "empty part"),
        ("s3://bucket/a//", "empty part"),
        ("s3://bucket/../x", "'..'"),
        ("s3://bucket/./x", "'.'"),
        ("s3://bucket/a\0b", "NUL"),
        ("s3://bucket/" + "x" * 1100, "1024"),
        ("gs://bucket", "unknown scheme 'gs'"),
        ("http://host/bucket", "unknown scheme"),
        ("file://data", "absolute"),
        ("file://", "absolute"),
        ("file:///a\0b", "NUL"),
    ],
)
def test_bad_sources(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(text)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), max_size=4))
def test_every_prefix_that_is_a_path_is_kept(parts: list[str]) -> None:
    path = "/".join(parts)
    if any(part in (".", "..") for part in parts) or len(path.encode()) > 1000:
        return
    assert parse_source(f"s3://bucket/{path}").prefix == (f"{path}/" if path else "")


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        (("bucket", "eu-west-1", "", Addressing.AUTO), "https://bucket.s3.eu-west-1.amazonaws.com/k"),
        (("bucket", "eu-west-1", "", Addressing.PATH), "https://s3.eu-west-1.amazonaws.com/bucket/k"),
        (("dotted.bucket", "eu-west-1", "", Addressing.AUTO), "https://s3.eu-west-1.amazonaws.com/dotted.bucket/k"),
        (("Bucket", "us-east-1", "", Addressing.AUTO), "https://s3.us-east-1.amazonaws.com/Bucket/k"),
        (("bucket", "cn-north-1", "", Addressing.AUTO), "https://bucket.s3.cn-north-1.amazonaws.com.cn/k"),
        (("bucket", "x", "http://host:9000/", Addressing.AUTO), "http://host:9000/bucket/k"),
        (("bucket", "x", "https://host/s3", Addressing.AUTO), "https://host/s3/bucket/k"),
        (("bucket", "x", "https://host:9/s3", Addressing.VIRTUAL), "https://bucket.host:9/s3/k"),
    ],
)
def test_where_an_object_is(settings: tuple[str, str, str, Addressing], url: str) -> None:
    address = Address.parse(*settings)
    assert address.url("k") == url
    assert address.url(None, "a=b") == url.removesuffix("k" if address.virtual_host else "/k") + "?a=b"
    assert address.secure == url.startswith("https")


@pytest.mark.parametrize(
    "endpoint", ["host:9000", "ftp://host", "http://", "http://user:pass@host", "http://host:port", "http://host/?x=1"]
)
def test_bad_endpoints(endpoint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        S3Store(S3Config(source="s3://bucket", endpoint_url=endpoint), {})
    assert "pass@" not in str(caught.value)


def test_virtual_hosts_need_a_name_that_is_a_label() -> None:
    with pytest.raises(ConfigError, match="--path-style"):
        Address.parse("dotted.bucket", "us-east-1", "", Addressing.VIRTUAL)


def test_the_identity_of_aws_is_one_for_all_regions() -> None:
    here, there = (Address.parse("bucket", region, "", Addressing.AUTO) for region in ("eu-west-1", "us-east-2"))
    assert here.identity == there.identity == here.in_region("us-west-2").identity
    assert Address.parse("bucket", "cn-north-1", "", Addressing.AUTO).identity != here.identity
    assert Address.parse("bucket", "r", "http://host/", Addressing.AUTO).identity == "http://host"


@given(st.text())
def test_quoting_is_reversible_and_plain(text: str) -> None:
    encoded = quote(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"))
    assert encoded.isascii()
    assert urllib.parse.unquote_to_bytes(encoded) == text.encode("utf-8", "surrogatepass")


def test_queries_are_in_the_order_of_signatures() -> None:
    assert encode_query({"prefix": "a b/+", "list-type": "2", "delimiter": "/"}) == (
        "delimiter=%2F&list-type=2&prefix=a%20b%2F%2B"
    )


def test_open_store_makes_no_request_and_passes_the_limits_on() -> None:
    config = S3Config(source="s3://bucket/p", endpoint_url="http://127.0.0.1:1", max_requests=7, io_timeout_s=3)
    store = open_store(config, {})
    assert isinstance(store.inner, S3Store)
    assert (store.endpoint, store.bucket) == ("http://127.0.0.1:1", "bucket")
    assert store.limiter.limit == 7
    assert store.policy.deadline_s == 3
    store.close()
    local = open_store(S3Config(source="file:///tmp"), {})
    assert isinstance(local.inner, LocalStore)
    local.close()
    with pytest.raises(UsageError):
        open_store(S3Config(source="nonsense"), {})


def test_the_endpoint_of_the_environment() -> None:
    environment = {"AWS_ENDPOINT_URL": "http://all:1", "AWS_ENDPOINT_URL_S3": "http://s3only:2"}
    config = S3Config(source="s3://bucket")
    assert S3Store(config, environment).endpoint == "http://s3only:2"
    assert S3Store(config, {"AWS_ENDPOINT_URL": "http://all:1"}).endpoint == "http://all:1"
    assert S3Store(S3Config(source="s3://bucket", endpoint_url="http://mine"), environment).endpoint == "http://mine"
