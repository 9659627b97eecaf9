"""A tree of names, a store that answers at once, and readers: traces for the prefetcher without a mount."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

from cachefs.metrics import Counters
from cachefs.prefetch.ports import Entry, Listed, Outcome, Piece
from cachefs.prefetch.scheduler import Room, VolumePrefetch
from cachefs.types import ROOT_INO, Ino, ObjectId, ObjectVersion, Tier

KIB, MIB = 1 << 10, 1 << 20
BLOCK = MIB
PLENTY = Room(1 << 40, 1 << 40)


class Names:
    """A `Tree` of paths; directories are known when they are `listed`."""

    def __init__(self, files: Mapping[str, int] | Iterable[str], *, listed: bool = True, first: int = 2) -> None:
        """`files`: sizes by path (110 KiB each)."""
        self.sizes = dict(files) if isinstance(files, Mapping) else dict.fromkeys(files, 110 * KIB)
        self.inos: dict[str, Ino] = {"": ROOT_INO}
        self.paths: dict[Ino, str] = {ROOT_INO: ""}
        self._children: dict[str, dict[str, str]] = {"": {}}
        self.generations: dict[Ino, int] = {}
        self._next = first
        self._places: dict[Ino, list[bytes]] = {}
        for path in sorted(self.sizes):
            self.add(path)
        if listed:
            for path in self._children:
                self.generations[self.inos[path]] = 1

    def add(self, path: str, size: int = 110 * KIB) -> Ino:
        """Make a file, with the directories above it."""
        self.sizes.setdefault(path, size)
        above = ""
        parts = path.split("/")
        for depth, part in enumerate(parts):
            here = "/".join(parts[: depth + 1])
            is_file = depth == len(parts) - 1
            if here not in self.inos:
                self.inos[here] = Ino(self._next)
                self.paths[Ino(self._next)] = here
                self._next += 1
                self._children[above][part if is_file else part + "/"] = here
                if not is_file:
                    self._children[here] = {}
            above = here
        return self.inos[path]

    def replace(self, path: str) -> Ino:
        """Another version of a file: another number."""
        ino = self.inos[path] = Ino(self._next)
        self.paths[ino] = path
        self._next += 1
        return ino

    def parent(self, ino: Ino) -> tuple[Ino, bytes] | None:
        if ino == ROOT_INO or ino not in self.paths:
            return None
        above, _, name = self.paths[ino].rpartition("/")
        return self.inos[above], name.encode()

    def listed(self, directory: Ino) -> Listed | None:
        generation = self.generations.get(directory)
        return None if generation is None else Listed(generation, complete=True, fresh=True)

    def entries(self, directory: Ino, after: bytes, count: int) -> list[Entry]:
        if directory not in self.generations:
            return []
        children = self._children[self.paths[directory]]
        places = self._places.get(directory)
        if places is None:
            places = self._places[directory] = sorted(place.encode() for place in children)
        first = bisect_right(places, after)
        return [Entry(self.inos[children[place.decode()]], place) for place in places[first : first + count]]

    def file(self, directory: Ino, name: bytes) -> Ino | None:
        path = self.paths[directory]
        return self.inos.get(f"{path}/{name.decode()}" if path else name.decode())

    def version(self, ino: Ino) -> tuple[ObjectId, ObjectVersion] | None:
        path = self.paths.get(ino, "")
        if path not in self.sizes:
            return None
        return ObjectId(ino.to_bytes(16, "big")), ObjectVersion(path, f"{ino}", self.sizes[path])


class Store:
    """`Fetches` that keeps what it is asked for in a cache of so many blocks; answers when `deliver` is called."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.capacity = capacity
        self.cached: dict[tuple[ObjectId, int], None] = {}
        self.far: set[tuple[ObjectId, int]] = set()
        """What went straight to the tier behind the nearest one, which is large."""
        self.asked: list[Piece] = []
        self.outcome = Outcome.FETCHED
        self._due: list[tuple[Sequence[Piece], Callable[[Sequence[tuple[Piece, Outcome]]], None]]] = []

    def prefetch(self, pieces: Sequence[Piece], done: Callable[[Sequence[tuple[Piece, Outcome]]], None]) -> None:
        self.asked += pieces
        self._due.append((list(pieces), done))

    def holds(self, oid: ObjectId, block: int) -> bool:
        return (oid, block) in self.cached or (oid, block) in self.far

    def keep(self, oid: ObjectId, block: int) -> None:
        """A block comes into the cache; the oldest leaves."""
        self.cached.pop((oid, block), None)
        self.cached[oid, block] = None
        while len(self.cached) > self.capacity:
            del self.cached[next(iter(self.cached))]

    def deliver(self) -> bool:
        """What was asked for comes; returns whether there was anything."""
        due, self._due = self._due, []
        for pieces, done in due:
            if self.outcome is Outcome.FETCHED:
                for piece in pieces:
                    for block in range(piece.first, piece.first + piece.count):
                        if piece.to is Tier.DISK:
                            self.far.add((piece.oid, block))
                        else:
                            self.keep(piece.oid, block)
            done([(piece, self.outcome) for piece in pieces])
        return bool(due)


class Trace:
    """Readers of a volume, one file after the other, with a prefetcher beside them."""

    def __init__(self, names: Names, store: Store | None = None, room: Room = PLENTY) -> None:
        self.names = names
        self.store = store or Store()
        self.room = room
        self.counters = Counters()
        self.prefetch = VolumePrefetch(names, self.store, BLOCK, self.counters)
        self.misses: list[str] = []
        self.listings: list[str] = []
        self.now_s = 0.0

    def read(self, paths: Iterable[str], *, block: int = 0, batch: int = 1, lists: bool = True) -> int:
        """Read files; the agent is told of `batch` at a time. Returns how many of them were misses."""
        before = len(self.misses)
        told: list[tuple[int, int]] = []
        for path in paths:
            ino = self.names.inos[path]
            version = self.names.version(ino)
            assert version is not None
            if not self.store.holds(version[0], block):
                self.misses.append(path)
            self.store.keep(version[0], block)
            told.append((ino, block))
            if len(told) == batch:
                self.turn(told, lists=lists)
                told = []
        self.turn(told, lists=lists)
        return len(self.misses) - before

    def turn(self, begun: Sequence[tuple[int, int]] = (), *, lists: bool = True) -> None:
        """Tell of files, and let everything come that is asked for."""
        self.now_s += 0.01
        self.prefetch.note(begun)
        for _ in range(1000):
            more = self.prefetch.pump(self.now_s, self.room)
            listed = lists and self._list()
            if not (self.store.deliver() or more or listed):
                return
        raise AssertionError("it never comes to an end")

    def _list(self) -> bool:
        there = False
        while (directory := self.prefetch.planner.take_listing()) is not None:
            self.listings.append(self.names.paths[directory])
            self.names.generations[directory] = self.names.generations.get(directory, 0) + 1
            there = True
        return there

    def asked(self) -> list[str]:
        """Keys of what was asked for ahead."""
        return [piece.version.key for piece in self.store.asked]

    def count(self, name: str) -> int:
        return int(self.counters.get(f"prefetch_{name}"))
