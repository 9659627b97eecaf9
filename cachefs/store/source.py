"""What a person writes after `cachefs mount`: s3://BUCKET[/PREFIX] or file://DIRECTORY."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from cachefs.errors import UsageError

# Loose on purpose: old AWS buckets have capitals and underscores, other servers have their own rules.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_MOST_KEY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source."""

    scheme: str
    """"s3" or "file"."""
    bucket: str
    """The bucket, or the absolute directory."""
    prefix: str
    """What the keys of the volume begin with: "" or "x/y/"."""


def parse_source(source: str) -> Source:
    """Parse and normalise. Raises UsageError with what is wrong and how it should look."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        raise UsageError(f"{source!r} is not a source: write s3://BUCKET[/PREFIX] or file://DIRECTORY")
    match scheme.lower():
        case "s3":
            return _parse_s3(source, rest)
        case "file":
            return _parse_file(source, rest)
        case _:
            raise UsageError(f"{source!r}: unknown scheme {scheme!r}, known are s3:// and file://")


def _parse_s3(source: str, rest: str) -> Source:
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise UsageError(f"{source!r} names no bucket: write s3://BUCKET[/PREFIX]")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(
            f"{source!r}: {bucket!r} is not the name of a bucket "
            "(3 to 63 letters, digits, dots, hyphens or underscores; a letter or digit first and last)"
        )
    path = path.removesuffix("/")
    if not path:
        if rest.endswith("//"):
            raise UsageError(f"{source!r} has an empty part in its prefix")
        return Source("s3", bucket, "")
    for part in path.split("/"):
        if part in ("", ".", ".."):
            named = f"the part {part!r}" if part else "an empty part"
            raise UsageError(f"{source!r} has {named} in its prefix, which no path can have")
    if "\0" in path or len(os.fsencode(path)) >= _MOST_KEY_BYTES:
        raise UsageError(f"{source!r}: no key can begin with this prefix (over 1024 bytes, or a NUL in it)")
    return Source("s3", bucket, path + "/")


def _parse_file(source: str, rest: str) -> Source:
    if not rest.startswith("/"):
        raise UsageError(f"{source!r}: the directory must be absolute, as in file:///data")
    if "\0" in rest:
        raise UsageError(f"{source!r} has a NUL in it")
    return Source("file", os.path.normpath(rest) if rest.strip("/") else "/", "")
