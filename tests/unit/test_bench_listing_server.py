"""The synthetic server pages through its key space exactly as a plain sorted list of keys would be paged."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from xml.etree import ElementTree

import boto3
import pytest
from botocore.config import Config
from hypothesis import given
from hypothesis import strategies as st

from bench.listing_server import BUCKET, DIRECTORY, ListingServer, body, etag, first_at_or_after, key, list_page

SPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


def parse(page: bytes) -> tuple[list[str], list[str], str | None]:
    root = ElementTree.fromstring(page)
    token = root.findtext(f"{SPACE}NextContinuationToken")
    assert (root.findtext(f"{SPACE}IsTruncated") == "true") == (token is not None)
    keys = [entry.findtext(f"{SPACE}Key", "") for entry in root.iter(f"{SPACE}Contents")]
    prefixes = [entry.findtext(f"{SPACE}Prefix", "") for entry in root.iter(f"{SPACE}CommonPrefixes")]
    assert int(root.findtext(f"{SPACE}KeyCount", "-1")) == len(keys) + len(prefixes)
    return keys, prefixes, token


def list_all(objects: int, **query: str) -> tuple[list[str], list[str]]:
    keys: list[str] = []
    prefixes: list[str] = []
    token: str | None = None
    while True:
        page_keys, page_prefixes, token = parse(
            list_page(query | ({"continuation-token": token} if token else {}), objects)
        )
        keys += page_keys
        prefixes += page_prefixes
        if token is None:
            return keys, prefixes


PREFIXES = st.one_of(
    st.sampled_from(["", "m", f"{DIRECTORY}/", "x", "a", f"{DIRECTORY}x"]),
    st.integers(0, 400).flatmap(lambda i: st.integers(0, 16).map(lambda n: key(i)[:n])),
)


@given(
    objects=st.integers(1, 300),
    prefix=PREFIXES,
    after=st.one_of(st.just(""), st.integers(0, 400).map(key), st.sampled_from(["a", "z"])),
    limit=st.integers(1, 400),
    delimiter=st.sampled_from(["", "/"]),
)
def test_pages_are_those_of_a_sorted_list(objects: int, prefix: str, after: str, limit: int, delimiter: str) -> None:
    keys, prefixes = list_all(
        objects, prefix=prefix, delimiter=delimiter, **{"start-after": after, "max-keys": str(limit)}
    )
    expected = [key(i) for i in range(objects) if key(i).startswith(prefix) and key(i) > after]
    if delimiter and expected and "/" in expected[0][len(prefix) :]:
        assert keys == []
        assert prefixes == ([] if after.startswith(f"{DIRECTORY}/") else [f"{DIRECTORY}/"])
    else:
        assert (keys, prefixes) == (expected, [])


@given(objects=st.integers(1, 1000), at=st.integers(0, 1200))
def test_positions_are_found(objects: int, at: int) -> None:
    assert first_at_or_after(key(at), objects) == min(at, objects)
    assert first_at_or_after("", objects) == 0
    assert first_at_or_after("z", objects) == objects


@pytest.fixture(scope="module")
def server() -> Iterator[ListingServer]:
    server = ListingServer(2500)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: ListingServer, path: str, **fields: str) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}/{path}", headers=fields)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_objects_answer_as_s3_does(server: ListingServer) -> None:
    path = f"{BUCKET}/{key(42)}"
    assert fetch(server, path) == (200, body(42))
    assert fetch(server, path, Range="bytes=5-8") == (206, body(42)[5:9])
    assert fetch(server, path, **{"If-Match": f'"{etag(42)}"'})[0] == 200
    assert fetch(server, path, **{"If-Match": '"other"'})[0] == 412
    assert fetch(server, f"{BUCKET}/{key(2500)}")[0] == 404
    assert fetch(server, f"{BUCKET}/{DIRECTORY}/42.txt")[0] == 404
    status, text = fetch(server, "elsewhere")
    assert status == 404
    assert b"NoSuchBucket" in text


def test_a_real_client_lists_all_pages_and_the_requests_are_counted(server: ListingServer) -> None:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.server_port}",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    before = server.counts.get("list", 0)
    pages = list(client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{DIRECTORY}/", Delimiter="/"))
    assert [entry["Key"] for page in pages for entry in page["Contents"]] == [key(i) for i in range(2500)]
    assert len(pages) == server.counts["list"] - before == 3
    assert client.head_object(Bucket=BUCKET, Key=key(7))["ETag"] == f'"{etag(7)}"'
    client.close()
