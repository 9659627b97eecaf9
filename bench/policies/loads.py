"""What programs read, as loads: files in a tree, and readers who go through them one after the other.

A trace (`bench.policies.traces`) says which block follows on which. A load says which file of which directory, by whom,
and leaves open when: that depends on what is there when a reader comes. Every load is the same in each run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from bench.policies.traces import BLOCK_BYTES, FILE_BYTES, SEED

FOLDER_FILES = 20
SHARD_BYTES = 16 * BLOCK_BYTES
POINT_BYTES = 4096
LARGE_BYTES = 10 << 30


class Read(NamedTuple):
    """Somebody reads a part of one block."""

    path: str
    block: int = 0
    length: int = BLOCK_BYTES
    """Bytes that are wanted, as far as the file has them."""


@dataclass(frozen=True, slots=True)
class Reader:
    """One process that reads."""

    epochs: Sequence[Sequence[Read]]
    starts_s: float = 0.0
    compute_s: float = 0.001
    """For each read, before it asks for the next one."""


@dataclass(frozen=True, slots=True)
class Load:
    """Everything that is read, and the cache that it meets."""

    name: str
    title: str
    files: dict[str, int]
    """Bytes of each file, by path."""
    readers: Sequence[Reader]
    capacity: int
    """Bytes of the tiers."""


def _flat(files: int, name: str = "train") -> list[str]:
    return [f"{name}/{number:06d}.jpg" for number in range(files)]


def _folders(folders: int, name: str = "tree") -> list[str]:
    return [f"{name}/n{folder:05d}/{number:03d}.jpg" for folder in range(folders) for number in range(FOLDER_FILES)]


def _small(paths: Sequence[str]) -> dict[str, int]:
    return dict.fromkeys(paths, FILE_BYTES)


def _reads(paths: Sequence[str]) -> list[Read]:
    return [Read(path) for path in paths]


def _shuffled(paths: Sequence[str], draw: random.Random) -> list[Read]:
    return _reads(draw.sample(paths, len(paths)))


def _whole(path: str) -> list[Read]:
    return [Read(path, block) for block in range(SHARD_BYTES // BLOCK_BYTES)]


def _batches(epoch: Sequence[Read], workers: int, size: int = 32) -> list[list[Read]]:
    """Divide an epoch among workers as data loaders do: worker k has the batches k, k + workers, and so on."""
    shares: list[list[Read]] = [[] for _ in range(workers)]
    for number, start in enumerate(range(0, len(epoch), size)):
        shares[number % workers] += epoch[start : start + size]
    return shares


def _by_workers(epochs: Sequence[Sequence[Read]], workers: int) -> list[Reader]:
    shares = [_batches(epoch, workers) for epoch in epochs]
    return [Reader([share[worker] for share in shares]) for worker in range(workers)]


# -- loads -------------------------------------------------------------------------------------------------------------


def in_order(files: int) -> Load:
    """One reader, in the order of the listing."""
    paths = _flat(files)
    return Load(
        "order", "listing order, cache 50 %", _small(paths), [Reader([_reads(paths)] * 3)], files * FILE_BYTES // 2
    )


def shuffled(share: int, files: int) -> Load:
    """One reader, shuffled epochs."""
    draw, paths = random.Random(SEED), _flat(files)
    readers = [Reader([_shuffled(paths, draw) for _ in range(3)])]
    title = f"shuffled epochs, cache {share} % of the data"
    return Load(f"epochs-{share}", title, _small(paths), readers, files * FILE_BYTES * share // 100)


def workers_in_order(files: int) -> Load:
    """Eight workers with batches of 32 in the order of the listing."""
    paths = _flat(files)
    readers = _by_workers([_reads(paths)] * 3, 8)
    return Load("workers-order", "8 workers, in order, cache 50 %", _small(paths), readers, files * FILE_BYTES // 2)


def workers_shuffled(files: int) -> Load:
    """Eight workers with batches of 32 of shuffled epochs."""
    draw, paths = random.Random(SEED + 1), _flat(files)
    readers = _by_workers([_shuffled(paths, draw) for _ in range(3)], 8)
    return Load("workers", "8 workers, shuffled epochs, cache 50 %", _small(paths), readers, files * FILE_BYTES // 2)


def same_order(files: int) -> Load:
    """The same permutation in each epoch."""
    paths = _flat(files)
    epoch = _shuffled(paths, random.Random(SEED + 2))
    return Load(
        "repeated", "same order each epoch, cache 50 %", _small(paths), [Reader([epoch] * 3)], files * FILE_BYTES // 2
    )


def search(files: int) -> Load:
    """Four jobs on the same files, with shuffles of their own, started apart."""
    draw, paths = random.Random(SEED + 3), _flat(files)
    pause_s = files * 0.001 / 3
    readers = [Reader([_shuffled(paths, draw) for _ in range(3)], starts_s=job * pause_s) for job in range(4)]
    return Load("search", "4 jobs on one dataset, cache 50 %", _small(paths), readers, files * FILE_BYTES // 2)


def class_folders(folders: int) -> Load:
    """Shuffled epochs over a tree like ImageNet's, by four workers."""
    draw, paths = random.Random(SEED + 4), _folders(folders)
    readers = _by_workers([_shuffled(paths, draw) for _ in range(2)], 4)
    title = f"tree of {folders} class folders, shuffled, cache 50 %"
    return Load("folders", title, _small(paths), readers, len(paths) * FILE_BYTES // 2)


def folders_in_order(folders: int) -> Load:
    """The same tree, folder after folder, by four readers with a quarter each."""
    paths = _folders(folders)
    quarter = len(paths) // 4
    readers = [Reader([_reads(paths[start : start + quarter])]) for start in range(0, 4 * quarter, quarter)]
    return Load(
        "folders-order", "the same tree in order, 4 readers", _small(paths), readers, len(paths) * FILE_BYTES // 2
    )


def shards(count: int) -> Load:
    """Large files, each from front to end, in another order of the files each epoch, by four workers."""
    draw = random.Random(SEED + 5)
    paths = [f"shards/shard-{number:06d}.tar" for number in range(count)]
    readers = []
    for worker in range(4):
        mine = paths[worker::4]
        epochs = [list(chain.from_iterable(map(_whole, draw.sample(mine, len(mine))))) for _ in range(3)]
        readers.append(Reader(epochs, compute_s=0.01))
    return Load(
        "shards",
        "shards, shuffled, 4 workers, cache 50 %",
        dict.fromkeys(paths, SHARD_BYTES),
        readers,
        count * SHARD_BYTES // 2,
    )


def shards_in_order(count: int) -> Load:
    """One reader, shard after shard."""
    paths = [f"shards/shard-{number}.tar" for number in range(count)]
    reader = Reader([list(chain.from_iterable(map(_whole, paths)))], compute_s=0.01)
    return Load(
        "shards-order",
        "numbered shards in order",
        dict.fromkeys(paths, SHARD_BYTES),
        [reader],
        count * SHARD_BYTES // 2,
    )


def points(reads: int) -> Load:
    """4 KiB at random places of a file of 10 GiB, by two readers."""
    draw = random.Random(SEED + 6)
    readers = [Reader([_points("large.bin", reads // 2, draw)]) for _ in range(2)]
    return Load("points", "random points of 10 GiB, cache 5 %", {"large.bin": LARGE_BYTES}, readers, LARGE_BYTES // 20)


def _points(path: str, reads: int, draw: random.Random) -> list[Read]:
    return [Read(path, draw.randrange(LARGE_BYTES // BLOCK_BYTES), POINT_BYTES) for _ in range(reads)]


def skewed(files: int) -> Load:
    """A few files of a large directory, most of which are read again and again: a notebook, a service."""
    paths = _flat(4 * files, "pool")
    reads = _skewed(paths, 3 * files, random.Random(SEED + 7))
    return Load("skewed", "zipf 0.9, cache 12 %", _small(paths), [Reader([reads])], 4 * files * FILE_BYTES * 12 // 100)


def _skewed(paths: Sequence[str], reads: int, draw: random.Random) -> list[Read]:
    mixed = draw.sample(paths, len(paths))  # what is popular has nothing to do with the order of the names
    return _reads(draw.choices(mixed, [1 / (rank + 1) ** 0.9 for rank in range(len(paths))], k=reads))


def mix(files: int) -> Load:
    """A training job over a tree, one over a directory in order, shards, single points, and a skewed load, at once."""
    draw = random.Random(SEED + 8)
    tree, flat, pool = _folders(files // FOLDER_FILES), _flat(files), _flat(files, "pool")
    large = [f"shards/shard-{number:06d}.tar" for number in range(max(4, files // 64))]
    readers = _by_workers([_shuffled(tree, draw) for _ in range(2)], 2)
    readers.append(Reader([_reads(flat)] * 2))
    readers.append(Reader([list(chain.from_iterable(map(_whole, large)))], compute_s=0.01))
    readers.append(Reader([_points("large.bin", files // 4, draw)], compute_s=0.004))
    readers.append(Reader([_skewed(pool, files, draw)]))
    sizes = _small([*tree, *flat, *pool]) | dict.fromkeys(large, SHARD_BYTES)
    capacity = sum(sizes.values()) // 2
    return Load("mix", "all of it at once, cache 50 %", sizes | {"large.bin": LARGE_BYTES}, readers, capacity)


def generate(files: int) -> list[Callable[[], Load]]:
    """Return what makes all loads, with datasets of so many files."""
    made: list[Callable[[], Load]] = [lambda share=share: shuffled(share, files) for share in (25, 50, 75, 100)]  # type: ignore[misc]
    made += [
        lambda: in_order(files), lambda: workers_in_order(files), lambda: workers_shuffled(files),
        lambda: same_order(files), lambda: search(files), lambda: class_folders(files // 5),
        lambda: folders_in_order(files // 5), lambda: shards(files // 16), lambda: shards_in_order(files // 16),
        lambda: points(files), lambda: skewed(files), lambda: mix(files),
    ]  # fmt: skip
    return made
