"""ListObjectsV2: the question, and the answer read with the C parser (boto3's own takes several times the CPU).

Keys are asked for url-encoded, since XML cannot carry control characters. The server says whether it did so: one that
ignores the wish sends them plain.
"""

from __future__ import annotations

import urllib.parse
import xml.etree.ElementTree as ET  # expat >= 2.4.1 limits the expansion of entities, and the size is limited here
from datetime import datetime

from cachefs.errors import BadBody
from cachefs.store.address import encode_query
from cachefs.store.port import ListPage, ObjectInfo

MOST_BYTES = 64 << 20
"""Longer answers are refused: 1000 keys of 1024 bytes, each byte encoded as three, are 3 MiB."""
_SECOND_NS = 1_000_000_000


def list_query(prefix: str, delimiter: str, token: str | None, limit: int) -> str:
    """Return the encoded query of one page."""
    parameters = {"list-type": "2", "encoding-type": "url", "max-keys": str(limit), "prefix": prefix}
    if delimiter:
        parameters["delimiter"] = delimiter
    if token is not None:
        parameters["continuation-token"] = token
    return encode_query(parameters)


def parse_page(body: bytes) -> ListPage:
    """Read a ListBucketResult. Raises BadBody for anything else."""
    try:
        root = ET.fromstring(body)  # noqa: S314 - see the import
        if _name(root) != "ListBucketResult":
            raise BadBody(f"the answer to a listing is a {_name(root)!r}, not a ListBucketResult")
        return _page(root)
    except (ET.ParseError, ValueError) as error:
        raise BadBody(f"the listing cannot be read: {error}") from error


def parse_etag(text: str) -> str:
    """Strip the quotes of an entity tag. A weak one keeps its W/ and with it the quotes: it equals no strong one."""
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text


def quote_etag(etag: str) -> str:
    """Return the tag as If-Match wants it."""
    return etag if etag.startswith("W/") else f'"{etag}"'


def whole_seconds_ns(moment: datetime) -> int:
    """Return nanoseconds since the epoch. Listings may carry milliseconds, HEAD never does: both have to agree."""
    return int(moment.timestamp()) * _SECOND_NS


def _name(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _page(root: ET.Element) -> ListPage:
    space = root.tag[: -len("ListBucketResult")]  # the namespace: not every server uses the same, or any
    decode = _decoded if root.findtext(f"{space}EncodingType") == "url" else str
    key_tag, size_tag, etag_tag, time_tag = (f"{space}{name}" for name in ("Key", "Size", "ETag", "LastModified"))
    objects = []
    for entry in root.iterfind(f"{space}Contents"):
        key, size, etag, moment = map(entry.findtext, (key_tag, size_tag, etag_tag, time_tag))
        if key is None or size is None or etag is None or moment is None:
            raise BadBody("an entry of the listing lacks its key, size, entity tag or time")
        mtime_ns = whole_seconds_ns(datetime.fromisoformat(moment))
        objects.append(ObjectInfo(decode(key), int(size), parse_etag(etag), mtime_ns))
    prefixes = tuple(decode(found.text or "") for found in root.iterfind(f"{space}CommonPrefixes/{space}Prefix"))
    token = None
    if root.findtext(f"{space}IsTruncated") == "true":
        token = root.findtext(f"{space}NextContinuationToken")
        if not token:
            raise BadBody("the listing is cut off and has no token for the rest")
    return ListPage(tuple(objects), prefixes, token)


def _decoded(text: str) -> str:
    """Undo encoding-type=url, which writes a space as a plus sign. Most keys have nothing encoded but slashes."""
    plain = text.replace("%2F", "/")
    if "%" not in plain and "+" not in plain:
        return plain
    return urllib.parse.unquote_plus(text, errors="surrogateescape")
