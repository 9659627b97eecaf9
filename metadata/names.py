"""Which keys of a bucket can be paths, and how keys, names and the order of listings relate. Pure functions.

* Keys are `str` (UTF-8, surrogateescape), names are `bytes`, as the kernel has them.
* A key is VISIBLE below a directory when the rest of it after the directory's own key is one usable name. Hidden, and
  counted in the directory, are: an empty name (``a//b``), ``.`` and ``..``, names of more than 255 bytes, names with
  a NUL byte.
* ``dir/`` itself, as an object, is a MARKER: it makes an empty directory exist and is neither an entry nor hidden.
* The SORT KEY of an entry is its name, with a slash behind it for directories. That is exactly S3's order of a listing
  with a delimiter (``a`` < ``a-b`` < ``a/``), so entries can be stored and streamed in the order in which they come.
  Some servers (SeaweedFS) sort directories as if they had no slash; `frontier_of` is safe for both orders.
* When ``a`` and ``a/b`` both exist the directory wins and the file is shadowed (see metadata.tree).
"""

from __future__ import annotations

from collections.abc import Iterable

from cachefs.types import NAME_MAX, FileKind

SLASH = b"/"


def encode_key(key: str) -> bytes:
    """Return the bytes of a key."""
    return key.encode("utf-8", "surrogateescape")


def decode_key(raw: bytes) -> str:
    """Return the key with these bytes; bytes that are not UTF-8 survive the round trip."""
    return raw.decode("utf-8", "surrogateescape")


def normal_prefix(prefix: str) -> str:
    """Return a volume's prefix as it enters keys: empty, or ending with one slash that belongs to it."""
    return prefix if not prefix or prefix.endswith("/") else prefix + "/"


def usable(name: bytes) -> bool:
    """Return whether a path can contain this name."""
    return 0 < len(name) <= NAME_MAX and name not in (b".", b"..") and SLASH not in name and b"\0" not in name


def sort_key(name: bytes, kind: FileKind) -> bytes:
    """Return the place of an entry in the order of listings."""
    return name + SLASH if kind is FileKind.DIRECTORY else name


def name_of(key: bytes) -> tuple[bytes, FileKind]:
    """Return name and kind of an entry from its sort key (no name contains a slash)."""
    if key.endswith(SLASH):
        return key[:-1], FileKind.DIRECTORY
    return key, FileKind.FILE


def frontier_of(keys: Iterable[bytes]) -> bytes:
    """Return a frontier after a page with these sort keys: everything that sorts below it has been listed.

    It is the greatest NAME on the page, without the slash of a directory: in S3's order nothing below the page's last
    sort key can follow, and in the order of servers that ignore the slash nothing below the page's last name can. The
    greatest name is not above either of them.
    """
    return max((key.removesuffix(SLASH) for key in keys), default=b"")
