"""Answers of servers: listings, entity tags, refusals."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import (
    AccessDenied,
    BadBody,
    BucketNotFound,
    CachefsError,
    ConfigError,
    CredentialsError,
    NotFound,
    StorageUnavailable,
)
from cachefs.store.listing import parse_etag, parse_page, quote_etag
from cachefs.store.refusals import Refusal, error_of
from cachefs.store.signed import proxies_of

NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


def listing(keys: Iterable[str], *, namespace: str = NAMESPACE, more: str = "", encoded: bool = True) -> bytes:
    def written(key: str) -> str:
        return urllib.parse.quote_plus(key) if encoded else escape(key)

    entries = "".join(
        f"<Contents><Key>{written(key)}</Key><LastModified>2026-11-22T01:02:03.456Z</LastModified>"
        f"<ETag>&quot;abc&quot;</ETag><Size>5</Size></Contents>"
        for key in keys
    )
    encoding = "<EncodingType>url</EncodingType>" if encoded else ""
    return f'<?xml version="1.0"?><ListBucketResult{namespace}>{encoding}{more}{entries}</ListBucketResult>'.encode()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=5))
def test_every_key_survives_the_encoding(keys: list[str]) -> None:
    page = parse_page(listing(keys))
    assert [found.key for found in page.objects] == keys
    assert page.next_token is None


@pytest.mark.parametrize("key", ["%2F", "%252F", "a+b c", "100%", "%25", "ä%2Fb", "+", "a/b%"])
def test_keys_that_look_encoded(key: str) -> None:
    assert parse_page(listing([key])).objects[0].key == key
    assert parse_page(listing([key], encoded=False, namespace="")).objects[0].key == key


def test_fields_of_a_page() -> None:
    more = (
        "<IsTruncated>true</IsTruncated><NextContinuationToken>t/+==</NextContinuationToken><Prefix>ignored</Prefix>"
        "<CommonPrefixes><Prefix>a%2F</Prefix></CommonPrefixes><CommonPrefixes><Prefix>b+c%2F</Prefix></CommonPrefixes>"
    )
    page = parse_page(listing(["key"], more=more))
    (found,) = page.objects
    assert (found.key, found.size, found.etag) == ("key", 5, "abc")
    assert found.mtime_ns == 1795309323 * 1_000_000_000  # whole seconds: HEAD knows no more
    assert page.prefixes == ("a/", "b c/")
    assert page.next_token == "t/+=="


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"<Error><Code>Other</Code></Error>",
        listing(["k"])[:-30],
        listing([], more="<IsTruncated>true</IsTruncated>"),
        listing(["k"]).replace(b"<Size>5</Size>", b""),
        listing(["k"]).replace(b"<Size>5</Size>", b"<Size>five</Size>"),
        listing(["k"]).replace(b"2026-11-22", b"yesterday"),
        listing(["k"]).replace(b"<ETag>&quot;abc&quot;</ETag>", b""),
        b'<!DOCTYPE x [<!ENTITY a "' + b"a" * 9999 + b'">]><ListBucketResult>&b;</ListBucketResult>',
    ],
    ids=range(10),
)
def test_what_is_no_listing_is_no_empty_listing(body: bytes) -> None:
    with pytest.raises(BadBody):
        parse_page(body)


def test_entity_tags() -> None:
    assert parse_etag('"abc-2"') == parse_etag(' "abc-2" ') == parse_etag("abc-2") == "abc-2"
    weak = parse_etag('W/"abc"')
    assert weak != "abc"
    assert quote_etag("abc") == '"abc"'
    assert quote_etag(weak) == 'W/"abc"'


@pytest.mark.parametrize(
    ("status", "code", "key", "kind"),
    [
        (404, "NoSuchBucket", None, BucketNotFound),
        (404, "NoSuchBucket", "k", BucketNotFound),
        (404, "", None, BucketNotFound),
        (404, "NoSuchKey", "k", NotFound),
        (404, "", "k", NotFound),
        (403, "AccessDenied", "k", AccessDenied),
        (403, "", "k", AccessDenied),
        (401, "", None, AccessDenied),
        (403, "InvalidAccessKeyId", None, CredentialsError),
        (403, "SignatureDoesNotMatch", None, CredentialsError),
        (400, "ExpiredToken", "k", CredentialsError),
        (403, "RequestTimeTooSkewed", None, CredentialsError),
        (301, "PermanentRedirect", None, ConfigError),
        (400, "AuthorizationHeaderMalformed", None, ConfigError),
        (200, "", "k", BadBody),
        (416, "InvalidRange", "k", BadBody),
    ],
)
def test_refusals(status: int, code: str, key: str | None, kind: type[CachefsError]) -> None:
    error = error_of(Refusal(status, code), bucket="bkt", endpoint="http://host", key=key)
    assert type(error) is kind
    assert "bkt" in str(error) or "http://host" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "retryable", "throttled"),
    [
        (503, "SlowDown", True, True),
        (503, "", True, True),
        (429, "", True, True),
        (400, "Throttling", True, True),
        (500, "InternalError", True, False),
        (502, "", True, False),
        (504, "", True, False),
        (400, "RequestTimeout", True, False),
        (400, "InvalidRequest", False, False),
        (405, "MethodNotAllowed", False, False),
        (501, "NotImplemented", False, False),
    ],
)
def test_which_refusals_may_be_tried_again(status: int, code: str, retryable: bool, throttled: bool) -> None:
    error = error_of(Refusal(status, code, retry_after_s=4.0), bucket="bkt", endpoint="http://host", key="k")
    assert isinstance(error, StorageUnavailable)
    assert (error.retryable, error.throttled, error.retry_after_s) == (retryable, throttled, 4.0)


def test_what_a_refusal_says() -> None:
    body = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-central-1</Region></Error>"
    assert Refusal.parse(400, body).elsewhere
    assert Refusal.parse(400, body).region == "eu-central-1"
    assert Refusal.parse(301, "", region="us-west-2").region == "us-west-2"
    assert Refusal.parse(503, "", retry_after="12").retry_after_s == 12.0
    assert Refusal.parse(503, "", retry_after="Sun, 22 Nov 2026 17:03:12 GMT").retry_after_s is None
    said = str(error_of(Refusal.parse(400, body), bucket="bkt", endpoint="http://host", key=None))
    assert "--region eu-central-1" in said


def test_proxies() -> None:
    mine = proxies_of({"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "inside.example,127.0.0.1", "AWS_REGION": "x"})
    assert mine.of("https", "s3.example") == "http://proxy:3128"
    assert mine.of("http", "s3.example") == ""
    assert mine.of("https", "inside.example") == ""
    assert mine.of("https", "127.0.0.1:8333") == ""
    assert proxies_of({"ALL_PROXY": "proxy:1"}).of("http", "s3.example") == "http://proxy:1"
