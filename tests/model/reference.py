"""The model: a dict of keys and bytes, and what it must look like as a tree of files.

What is right is written down once, here: `tree` derives the visible tree from nothing but the bucket's objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

PARTS = ["a", "b", "a!", "a-", "a0", "é", "long" * 60]
KEYS = [
    *PARTS,
    *(f"{top}/{name}" for top in ("a", "b", "é") for name in PARTS),
    "a/b/a",
    "a/b/b",
    "b/a/b/a/b",
    "a/",
    "b/",
    "b/a/",
    "a//b",
    "b/./a",
    "../a",
    "b/..",
    f"b/{'n' * 256}",
    f"{'n' * 300}/a",
]


def usable(part: str) -> bool:
    """Whether a path can contain this name."""
    return part not in ("", ".", "..") and len(part.encode()) <= 255


PATHS = sorted(
    path
    for path in {"/".join(key.split("/")[:depth]) for key in KEYS for depth in range(1, 6)}
    if all(map(usable, path.split("/")))
)
"""Every path that may be asked for, also such that never exist."""


SIZES = [0, 1, 100, 65_535, 65_536, 65_537, 200_000, 400_000]


@dataclass(frozen=True)
class Put:
    """Somebody outside makes or overwrites an object."""

    key: int
    size: int
    seed: int


@dataclass(frozen=True)
class Delete:
    """Somebody outside deletes one of the objects that exist."""

    index: int


@dataclass(frozen=True)
class Stat:
    """stat(2) of a path."""

    path: int


@dataclass(frozen=True)
class ListDirectory:
    """List one of the directories that exist."""

    index: int


@dataclass(frozen=True)
class Read:
    """Open one of the files that exist and read a piece."""

    index: int
    offset: int
    size: int


@dataclass(frozen=True)
class Hold:
    """Open one of the files that exist, and keep it open."""

    index: int


@dataclass(frozen=True)
class ReadHeld:
    """Read a piece of a file that was opened some time ago."""

    index: int
    offset: int
    size: int


@dataclass(frozen=True)
class Restart:
    """All of cachefs ends and begins anew on what it left on the disk."""


Op = Put | Delete | Stat | ListDirectory | Read | Hold | ReadHeld | Restart

_INDEX = st.integers(0, 200)
_OFFSET = st.one_of(st.integers(0, 450_000), st.sampled_from([0, 65_535, 65_536, 131_072, 400_000]))
_LENGTH = st.one_of(st.integers(1, 450_000), st.sampled_from([1, 4096, 65_536]))
OPS: st.SearchStrategy[Op] = st.one_of(
    st.builds(Put, st.integers(0, len(KEYS) - 1), st.sampled_from(SIZES), st.integers(0, 3)),
    st.builds(Put, st.integers(0, len(KEYS) - 1), st.sampled_from(SIZES), st.integers(0, 3)),
    st.builds(Delete, _INDEX),
    st.builds(Stat, st.integers(0, len(PATHS) - 1)),
    st.builds(ListDirectory, _INDEX),
    st.builds(Read, _INDEX, _OFFSET, _LENGTH),
    st.builds(Hold, _INDEX),
    st.builds(ReadHeld, _INDEX, _OFFSET, _LENGTH),
    st.just(Restart()),
)
"""Indexes are taken modulo what exists at the time, so every list of operations means something, and so does a part of
it when a failure is made smaller."""


def tree(objects: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """Return path by path what is visible: bytes for a file, None for a directory ("" is the root)."""
    found: dict[str, bytes | None] = {"": None}
    files: dict[str, bytes] = {}
    for key, body in objects.items():
        parts = key.split("/")
        good = next((at for at, part in enumerate(parts) if not usable(part)), len(parts))
        for depth in range(1, min(good, len(parts) - 1) + 1):
            found["/".join(parts[:depth])] = None
        if good == len(parts):
            files[key] = body
    return files | found


def names_in(tree: Mapping[str, bytes | None], directory: str) -> list[str]:
    """Return the names of a directory in the order in which S3 lists them."""
    prefix = f"{directory}/" if directory else ""
    inside = {
        path.removeprefix(prefix): body for path, body in tree.items() if path.startswith(prefix) and path != directory
    }
    names = [name for name in inside if "/" not in name]
    return sorted(names, key=lambda name: (name + "/" if inside[name] is None else name).encode())
