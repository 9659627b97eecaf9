"""Names for the detectors without metadata: a fixed tree of files, whose listings are known once they were made."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

import xxhash

from cachefs.prefetch.ports import Entry, Listed
from cachefs.types import FIRST_INO, ROOT_INO, Ino, ObjectId, ObjectVersion


class FixedTree:
    """Implements `cachefs.prefetch.ports.Tree`.

    INVARIANT: numbers are given in the order of a walk, as those of a mount are once it was listed.
    """

    def __init__(self, files: Mapping[str, int]) -> None:
        """`files`: bytes of each file, by path."""
        self.inos: dict[str, Ino] = {"": ROOT_INO}
        self._above: dict[Ino, tuple[Ino, bytes]] = {}
        self._versions: dict[Ino, tuple[ObjectId, ObjectVersion]] = {}
        self._children: dict[Ino, dict[bytes, Ino]] = {ROOT_INO: {}}
        self._places: dict[Ino, list[bytes]] = {}
        self._listed: set[Ino] = set()
        for path in sorted(files):
            ino = self._add(path)
            oid = ObjectId(xxhash.xxh3_128_digest(path.encode()))
            self._versions[ino] = oid, ObjectVersion(path, "", files[path])

    def _add(self, path: str) -> Ino:
        known = self.inos.get(path)
        if known is not None:
            return known
        above, _, name = path.rpartition("/")
        directory = self._add(above) if above else ROOT_INO
        ino = self.inos[path] = Ino(FIRST_INO + len(self.inos) - 1)
        self._above[ino] = directory, name.encode()
        siblings = self._children.setdefault(directory, {})
        siblings[name.encode()] = ino
        return ino

    def make_listing(self, directory: Ino) -> None:
        """A directory was listed: from now on its entries are known."""
        self._listed.add(directory)

    def parent(self, ino: Ino) -> tuple[Ino, bytes] | None:
        """See `Tree.parent`."""
        return self._above.get(ino)

    def listed(self, directory: Ino) -> Listed | None:
        """See `Tree.listed`."""
        return Listed(1, complete=True, fresh=True) if directory in self._listed else None

    def entries(self, directory: Ino, after: bytes, count: int) -> list[Entry]:
        """See `Tree.entries`."""
        if directory not in self._listed:
            return []
        children = self._children.get(directory, {})
        places = self._places.get(directory)
        if places is None:
            slashed = [name + b"/" if ino in self._children else name for name, ino in children.items()]
            places = self._places[directory] = sorted(slashed)
        first = bisect_right(places, after)
        return [Entry(children[place.rstrip(b"/")], place) for place in places[first : first + count]]

    def file(self, directory: Ino, name: bytes) -> Ino | None:
        """See `Tree.file`."""
        ino = self._children.get(directory, {}).get(name) if directory in self._listed else None
        return ino if ino in self._versions else None

    def version(self, ino: Ino) -> tuple[ObjectId, ObjectVersion] | None:
        """See `Tree.version`."""
        return self._versions.get(ino)
