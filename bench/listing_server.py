"""A synthetic S3 server for huge directories: ListObjectsV2, HEAD and GET for objects that exist only as numbers.

    python -m bench.listing_server 1000000      prints its port, serves until its standard input closes

The key of object i is ``many/0000000.txt`` with i in it; its body is the key and a newline. Pages are made as they are
asked for (one costs about 1 ms), so a million objects cost neither memory nor disk and the client is what is measured.
Signatures are accepted and not checked. `GET /-/requests` returns the number of requests by kind as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.parse
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.sax.saxutils import escape

DIRECTORY = "many"
BUCKET = "synthetic"
MAX_KEYS = 1000
_WIDTH = 7
_MODIFIED = "2026-01-01T00:00:00.000Z"
_MODIFIED_HTTP = "Thu, 01 Jan 2026 00:00:00 GMT"


def key(index: int) -> str:
    """Return the key of object `index`; keys sort as their numbers do."""
    return f"{DIRECTORY}/{index:0{_WIDTH}d}.txt"


def body(index: int) -> bytes:
    """Return the content of object `index`."""
    return f"{key(index)}\n".encode()


def etag(index: int) -> str:
    """Return the entity tag of object `index`, without quotes."""
    return f"{index:032x}"


BODY_BYTES = len(body(0))


def index_of(name: str, objects: int) -> int | None:
    """Return the number of the object called `name`, or None when there is none."""
    digits = name.removeprefix(f"{DIRECTORY}/").removesuffix(".txt")
    if not digits.isdecimal() or int(digits) >= objects or key(int(digits)) != name:
        return None
    return int(digits)


def first_at_or_after(name: str, objects: int) -> int:
    """Return the number of the first object whose key is not below `name`."""
    low, high = 0, objects
    while low < high:
        middle = (low + high) // 2
        if key(middle) < name:
            low = middle + 1
        else:
            high = middle
    return low


def list_page(query: dict[str, str], objects: int) -> bytes:
    """Return the answer to one ListObjectsV2 request."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    limit = min(int(query.get("max-keys") or MAX_KEYS), MAX_KEYS)
    after = query.get("start-after", "")
    first = int(query.get("continuation-token") or first_at_or_after(max(prefix, after), objects))
    if after and first < objects and key(first) == after:
        first += 1
    past = first_at_or_after(prefix + "\U0010ffff", objects) if prefix else objects
    folded = delimiter == "/" and f"{DIRECTORY}/".startswith(prefix) and prefix != f"{DIRECTORY}/"
    if folded:  # everything is below one common prefix
        below = first < past and limit > 0 and not after.startswith(f"{DIRECTORY}/")
        entries, count, next_token = (_COMMON_PREFIX if below else ""), int(below), None
    else:
        last = min(first + limit, past)
        entries, count = "".join(_entry(index) for index in range(first, last)), max(last - first, 0)
        next_token = str(last) if last < past else None
    more = f"<NextContinuationToken>{next_token}</NextContinuationToken>" if next_token else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>{limit}</MaxKeys>"
        f"<IsTruncated>{'true' if next_token else 'false'}</IsTruncated>{more}{entries}</ListBucketResult>"
    ).encode()


_COMMON_PREFIX = f"<CommonPrefixes><Prefix>{DIRECTORY}/</Prefix></CommonPrefixes>"


def _entry(index: int) -> str:
    return (
        f"<Contents><Key>{key(index)}</Key><LastModified>{_MODIFIED}</LastModified><ETag>&quot;{etag(index)}&quot;</ETag>"
        f"<Size>{BODY_BYTES}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


class ListingServer(ThreadingHTTPServer):
    """The server; `counts` says how many requests of each kind it answered."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, objects: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.objects = objects
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, kind: str) -> None:
        """Count a request."""
        with self._lock:
            self._counts[kind] += 1

    @property
    def counts(self) -> dict[str, int]:
        """Requests so far, by kind."""
        with self._lock:
            return dict(self._counts)


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ListingServer  # type: ignore[mutable-override]  # it is only ever made by that class
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of an answer leave in one segment

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Stay silent."""

    def _answer(self, *, with_body: bool) -> None:
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path).lstrip("/")
        if path == "-/requests":
            self._send(HTTPStatus.OK, json.dumps(self.server.counts).encode(), {"Content-Type": "application/json"})
            return
        bucket, _, name = path.partition("/")
        if bucket != BUCKET:
            self._refuse(HTTPStatus.NOT_FOUND, "NoSuchBucket", with_body)
        elif name:
            self._object(name, with_body)
        elif with_body:
            self.server.count("list")
            query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
            self._send(HTTPStatus.OK, list_page(query, self.server.objects), {"Content-Type": "application/xml"})
        else:
            self.server.count("head")
            self._send(HTTPStatus.OK, b"", {})

    def _object(self, name: str, with_body: bool) -> None:
        self.server.count("get" if with_body else "head")
        index = index_of(name, self.server.objects)
        if index is None:
            self._refuse(HTTPStatus.NOT_FOUND, "NoSuchKey", with_body)
            return
        if self.headers.get("If-Match", etag(index)).strip('"') != etag(index):
            self._refuse(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed", with_body)
            return
        whole = body(index)
        fields = {"ETag": f'"{etag(index)}"', "Last-Modified": _MODIFIED_HTTP, "Accept-Ranges": "bytes"}
        span = _span(self.headers.get("Range", ""), len(whole))
        if span is None:
            self._send(HTTPStatus.OK, whole, fields, with_body=with_body)
        else:
            fields["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(whole)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, whole[span.start : span.stop], fields, with_body=with_body)

    def _refuse(self, status: HTTPStatus, code: str, with_body: bool) -> None:
        text = f"<Error><Code>{code}</Code><Message>{status.phrase}</Message></Error>".encode()
        self._send(status, text, {"Content-Type": "application/xml"}, with_body=with_body)

    def _send(self, status: HTTPStatus, payload: bytes, fields: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if with_body:
            self.wfile.write(payload)
        self.wfile.flush()


def _span(header: str, size: int) -> range | None:
    """Return the bytes of a ``bytes=first-last`` header, or None for the whole."""
    unit, _, rest = header.partition("=")
    first, dash, last = rest.partition("-")
    if unit != "bytes" or not dash or not first.isdecimal():
        return None
    return range(min(int(first), size), min(int(last) + 1, size) if last.isdecimal() else size)


def main() -> int:
    """Serve until standard input closes."""
    server = ListingServer(int(sys.argv[1]))
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while os.read(0, 4096):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
