"""What the store said about names, in the terms of the metadata store. Pure functions.

User metadata (`x-amz-meta-*`) comes with HEAD only. s3fs writes `mode` in decimal with the file type, rclone in octal;
`mtime` is seconds since the epoch with a fraction. Values that make no sense are ignored: anybody can write them.
"""

from __future__ import annotations

import decimal
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from cachefs.store.port import ListPage, ObjectInfo
from metadata.names import SLASH, encode_key, usable

_PERMISSIONS = 0o777
_MAX_ID = (1 << 32) - 2
_MAX_TIME_S = 1 << 33


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One object version and its attributes."""

    size: int
    mtime_ns: int
    etag: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    own_time: bool = False
    """`mtime_ns` is from user metadata."""
    full: bool = False
    """From a HEAD: what is None here is None. Listings do not know the user metadata."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of one name after asking. `None` for a thing that was not asked for."""

    file: FileFacts | None = None
    no_file: bool = False
    """There is no object of this name (False with `file` None: not asked)."""
    directory: bool | None = None


@dataclass(frozen=True, slots=True)
class PageEntries:
    """One page of a listing, in the order of sort keys. A directory has no facts."""

    entries: tuple[tuple[bytes, FileFacts | None], ...]
    hidden: int
    found: int
    """Everything that proves that the directory exists: entries, hidden keys, its own marker."""
    next_token: str | None


def listed_facts(listed: ObjectInfo) -> FileFacts:
    """Return the facts that a listing states."""
    return FileFacts(listed.size, listed.mtime_ns, listed.etag)


def head_facts(found: ObjectInfo) -> FileFacts:
    """Return the facts that a HEAD states."""
    own = _time_ns(found.metadata.get("mtime"))
    return FileFacts(
        found.size,
        own if own is not None else found.mtime_ns,
        found.etag,
        _mode(found.metadata.get("mode")),
        _number(found.metadata, "uid"),
        _number(found.metadata, "gid"),
        own is not None,
        True,
    )


def page_entries(page: ListPage, directory_key: str) -> PageEntries:
    """Return the entries of a page of the listing of `directory_key`, without what cannot be a path."""
    start = len(encode_key(directory_key))
    found: dict[bytes, FileFacts | None] = {}
    hidden = 0
    for listed in page.objects:
        name = encode_key(listed.key)[start:]
        if usable(name):
            found[name] = listed_facts(listed)
        elif name:  # the empty one is the directory's own marker
            hidden += 1
    for prefix in page.prefixes:
        name = encode_key(prefix)[start:].removesuffix(SLASH)
        if usable(name):
            found[name + SLASH] = None
        else:
            hidden += 1
    everything = len(page.objects) + len(page.prefixes)
    return PageEntries(tuple(sorted(found.items(), key=_by_key)), hidden, everything, page.next_token)


def _by_key(entry: tuple[bytes, FileFacts | None]) -> bytes:
    return entry[0]


def _number(user: Mapping[str, str], name: str) -> int | None:
    text = user.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) <= _MAX_ID else None


def _mode(text: str | None) -> int | None:
    """Return permission bits: decimal where the number has the type of a regular file in it (s3fs), else octal."""
    if text is None or not text.isascii() or len(text) > 10:
        return None
    digits = text.removeprefix("0o")
    if not digits.isdigit():
        return None
    if digits == text and stat.S_ISREG(int(text)) and int(text) < 0o200000:
        return int(text) & _PERMISSIONS
    try:
        value = int(digits, 8)
    except ValueError:
        return None
    if value >= 0o200000 or stat.S_IFMT(value) not in (0, stat.S_IFREG):
        return None
    return value & _PERMISSIONS


def _time_ns(text: str | None) -> int | None:
    if text is None or len(text) > 40:
        return None
    try:
        seconds = decimal.Decimal(text)
    except decimal.InvalidOperation:
        return None
    if not seconds.is_finite() or not 0 <= seconds < _MAX_TIME_S:
        return None
    return int(seconds * 1_000_000_000)
