"""An S3 endpoint with keys that no real small server stores: `.`, `..`, empty parts, names of 300 bytes, a zero byte.

It answers GET, HEAD and ListObjectsV2 from a `MemoryStore`, in S3's own order and with pages of any size, and does not
look at signatures, only at the access key if told to. What real servers can do is tested against a real one.
"""

from __future__ import annotations

import datetime
import threading
import urllib.parse
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from cachefs.errors import NotFound
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage, ObjectInfo


class MemoryS3:
    """Context manager; `store` is the one bucket that it has, `endpoint_url` where it listens."""

    def __init__(self, bucket: str = "memory-bucket", *, page_size: int = 1000) -> None:
        self.store = MemoryStore(bucket)
        self.bucket = bucket
        self.page_size = page_size
        self.access_key = ""
        """The only access key that it takes; empty: any."""
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.origin = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint_url(self) -> str:
        """What to give as --endpoint-url."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Any keys do."""
        return {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    origin: MemoryS3


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""

    def _serve(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path, errors="surrogateescape").removeprefix("/")
        bucket, _, key = path.partition("/")
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
        if f"Credential={self.server.origin.access_key}" not in self.headers.get("Authorization", "Credential="):
            self._refuse(400, "ExpiredToken")
        elif bucket != self.server.origin.bucket:
            self._refuse(404, "NoSuchBucket")
        elif key:
            self._object(key)
        else:
            self._listing(query)

    do_GET = do_HEAD = _serve

    def _object(self, key: str) -> None:
        store = self.server.origin.store
        try:
            found = store.head(key)
        except NotFound:
            self._refuse(404, "NoSuchKey")
            return
        wanted = self.headers.get("If-Match", "").strip('"')
        if wanted and wanted != found.etag:
            self._refuse(412, "PreconditionFailed")
            return
        first, last = self._range(found)
        body = (
            b"" if self.command == "HEAD" or not found.size else store.get_range(found.version, first, last - first + 1)
        )
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{last}/{found.size}")
        self.send_header("ETag", f'"{found.etag}"')
        self.send_header("Last-Modified", formatdate(found.mtime_ns / 1e9, usegmt=True))
        self._finish(bytes(body), found.size if self.command == "HEAD" else len(body))

    def _range(self, found: ObjectInfo) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), min(int(last) if last else found.size - 1, found.size - 1)

    def _listing(self, query: dict[str, str]) -> None:
        limit = min(int(query.get("max-keys") or 1000), self.server.origin.page_size)
        page = self.server.origin.store.list_page(
            query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            token=urllib.parse.unquote(query.get("continuation-token", ""), errors="surrogateescape") or None,
            limit=limit,
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        body = _xml(self.server.origin.bucket, page)
        self._finish(body, len(body))

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        body = f"<Error><Code>{code}</Code><Message>refused</Message></Error>".encode()
        self._finish(b"" if self.command == "HEAD" else body, len(body))

    def _finish(self, body: bytes, length: int) -> None:
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)


def _xml(bucket: str, page: ListPage) -> bytes:
    def quoted(text: str) -> str:
        return urllib.parse.quote(text, safe="/", errors="surrogateescape")

    lines = [f"<Name>{bucket}</Name><EncodingType>url</EncodingType>"]
    lines += [
        f"<Contents><Key>{quoted(found.key)}</Key><Size>{found.size}</Size><ETag>&quot;{found.etag}&quot;</ETag>"
        f"<LastModified>{_iso(found.mtime_ns)}</LastModified></Contents>"
        for found in page.objects
    ]
    lines += [f"<CommonPrefixes><Prefix>{quoted(prefix)}</Prefix></CommonPrefixes>" for prefix in page.prefixes]
    lines.append(f"<IsTruncated>{'true' if page.next_token else 'false'}</IsTruncated>")
    if page.next_token:
        # the token is opaque to clients, so quoting keeps bytes that XML cannot carry
        lines.append(f"<NextContinuationToken>{quoted(page.next_token)}</NextContinuationToken>")
    head = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
    return f"{head}{''.join(lines)}</ListBucketResult>".encode()


def _iso(mtime_ns: int) -> str:
    when = datetime.datetime.fromtimestamp(mtime_ns / 1e9, tz=datetime.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%S.000Z")
