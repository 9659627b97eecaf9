"""What training jobs and others read, as traces: which block after which.

Generated traces are the same in every run (one seed each). Recorded ones: `bench.policies.recorded`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import xxhash

from cachefs.types import BlockKey, ObjectId, block_key

SEED = 20_261_123
FILE_BYTES = 110_000
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Trace:
    """Reads of blocks, and the cache that they meet."""

    name: str
    title: str
    keys: Sequence[BlockKey]
    capacity: int
    """Bytes of the cache."""
    sizes: dict[BlockKey, int]
    phases: tuple[int, ...] = field(default=())
    """After how many reads an epoch, or another phase, ends; the last one ends with the trace."""


def objects(name: str, count: int) -> list[ObjectId]:
    """Return the identities of so many objects."""
    return [ObjectId(xxhash.xxh3_128_digest(f"{name}/{number}".encode())) for number in range(count)]


def small_files(name: str, count: int) -> list[BlockKey]:
    """Return the keys of files with one block each."""
    return [block_key(oid, 0) for oid in objects(name, count)]


def _shuffled(keys: Sequence[BlockKey], draw: random.Random) -> list[BlockKey]:
    return draw.sample(keys, len(keys))


def _of_files(
    name: str, title: str, epochs: Sequence[Sequence[BlockKey]], files: int, draw: random.Random | None = None
) -> Trace:
    """Return a trace for a cache of so many files; `draw`: of different sizes, 20 to 200 KB."""
    keys = [key for epoch in epochs for key in epoch]
    known = dict.fromkeys(keys)
    sizes = {key: FILE_BYTES if draw is None else draw.randrange(20_000, 200_000) for key in known}
    ends, at = [], 0
    for epoch in epochs:
        at += len(epoch)
        ends.append(at)
    return Trace(name, title, keys, files * FILE_BYTES, sizes, tuple(ends))


# -- epochs ------------------------------------------------------------------------------------------------------------


def shuffled_epochs(share: int, files: int) -> Trace:
    """Every file once in an epoch, in another order each time; the cache holds `share` percent of them."""
    draw = random.Random(SEED)
    every = small_files("train", files)
    epochs = [_shuffled(every, draw) for _ in range(5)]
    name = f"epochs-{share}"
    return _of_files(name, f"shuffled epochs, cache {share} % of the data", epochs, files * share // 100, draw)


def interleaved_workers(files: int) -> Trace:
    """Eight workers with batches of 32 files each, whose reads come in any order within a round."""
    draw = random.Random(SEED + 1)
    every, epochs = small_files("train", files), []
    for _ in range(5):
        order, epoch = _shuffled(every, draw), []
        for start in range(0, files, 8 * 32):
            batch = order[start : start + 8 * 32]
            draw.shuffle(batch)
            epoch += batch
        epochs.append(epoch)
    return _of_files("workers", "8 workers, shuffled epochs, cache 50 %", epochs, files // 2)


def repeated_order(files: int) -> Trace:
    """The same order in each epoch."""
    every = small_files("train", files)
    return _of_files("repeated", "same order each epoch, cache 50 %", [every] * 5, files // 2)


def parameter_search(files: int) -> Trace:
    """Four jobs on the same files, with shuffles of their own, started apart."""
    draw = random.Random(SEED + 2)
    every = small_files("train", files)
    jobs = [[key for _ in range(4) for key in _shuffled(every, draw)] for _ in range(4)]
    starts = [0, files // 4, files // 2, files * 4 // 5]
    rounds: list[list[BlockKey]] = [[] for _ in range(5)]
    for at in range(5 * files):
        rounds[at // files] += [
            job[at - start] for job, start in zip(jobs, starts, strict=True) if 0 <= at - start < len(job)
        ]
    return _of_files("search", "4 jobs on one dataset, cache 50 %", rounds, files // 2)


def class_folders(files: int) -> Trace:
    """Like ImageNet: 100 folders, shuffled epochs over the tree, and a validation set four times in each."""
    draw = random.Random(SEED + 3)
    every, checks = small_files("tree", files), small_files("validation", files // 20)
    epochs = []
    for _ in range(5):
        order, epoch = _shuffled(every, draw), list[BlockKey]()
        for quarter in range(4):
            epoch += order[quarter * files // 4 : (quarter + 1) * files // 4] + checks
        epochs.append(epoch)
    return _of_files("folders", "tree of folders, validation 4 times an epoch, cache 50 %", epochs, files // 2, draw)


def shards(count: int) -> Trace:
    """Large files of 16 blocks each, read from front to end by 4 workers, in another order of the files each epoch."""
    draw = random.Random(SEED + 4)
    every = objects("shard", count)
    epochs = []
    for _ in range(5):
        order, epoch = draw.sample(every, count), []
        for start in range(0, count, 4):
            epoch += [block_key(oid, index) for index in range(16) for oid in order[start : start + 4]]
        epochs.append(epoch)
    keys = [key for epoch in epochs for key in epoch]
    ends = tuple(len(epochs[0]) * (number + 1) for number in range(5))
    capacity = count * 16 * BLOCK_BYTES // 2
    return Trace("shards", "shards, 4 workers, cache 50 %", keys, capacity, dict.fromkeys(keys, BLOCK_BYTES), ends)


# -- other loads -------------------------------------------------------------------------------------------------------


def _skewed(name: str, count: int, reads: int, draw: random.Random) -> list[BlockKey]:
    weights = [1 / (rank + 1) ** 0.9 for rank in range(count)]
    return draw.choices(small_files(name, count), weights, k=reads)


def zipf(files: int, share: int) -> Trace:
    """A few files are read much more often than most."""
    reads = _skewed("skewed", 4 * files, 12 * files, random.Random(SEED + 5))
    third = len(reads) // 3
    parts = [reads[:third], reads[third : 2 * third], reads[2 * third :]]
    return _of_files(f"zipf-{share}", f"zipf 0.9, cache {share} %", parts, 4 * files * share // 100)


def drifting(files: int) -> Trace:
    """What was read lately is read again, and nothing for ever: work that moves on through its files."""
    draw = random.Random(SEED + 6)
    every = small_files("drift", 4 * files)
    reads = [every[max(0, int(at / 3 - draw.expovariate(12 / files)))] for at in range(10 * files)]
    return _of_files("drifting", "work that moves on slowly", [reads[: 5 * files], reads[5 * files :]], files // 6)


def random_points(count: int) -> Trace:
    """Reads of single places in one large file."""
    draw = random.Random(SEED + 7)
    [oid] = objects("large", 1)
    keys = [block_key(oid, draw.randrange(2 * count)) for _ in range(12 * count)]
    ends = (len(keys) // 2, len(keys))
    sizes = dict.fromkeys(keys, BLOCK_BYTES)
    return Trace("points", "random points of a large file, cache 50 %", keys, count * BLOCK_BYTES, sizes, ends)


def scan(files: int) -> Trace:
    """A second dataset of the same size is read once between epochs."""
    draw = random.Random(SEED + 8)
    first, second = small_files("train", files), small_files("second", files)
    epochs = [_shuffled(first, draw) for _ in range(5)]
    epochs.insert(3, list(second))
    return _of_files("scan", "a scan of other files in the 4th place, cache 50 %", epochs, files // 2, draw)


def scan_beside(files: int) -> Trace:
    """The same, while the third epoch is under way."""
    draw = random.Random(SEED + 9)
    first, second = small_files("train", files), small_files("second", files)
    epochs = [_shuffled(first, draw) for _ in range(5)]
    epochs[2] = [key for pair in zip(epochs[2], second, strict=True) for key in pair]
    return _of_files("scan-beside", "a scan of other files beside the 3rd epoch, cache 50 %", epochs, files // 2)


def moving_on(files: int) -> Trace:
    """Three epochs over one dataset, then three over another."""
    draw = random.Random(SEED + 10)
    first, second = small_files("train", files), small_files("second", files)
    epochs = [_shuffled(first if number < 3 else second, draw) for number in range(7)]
    return _of_files("moving", "3 epochs, then 4 over other files, cache 50 %", epochs, files // 2, draw)


def mixed(files: int) -> Trace:
    """Shuffled epochs beside reads of a few files that are read much more often than most."""
    draw = random.Random(SEED + 11)
    every = small_files("train", files)
    epochs = []
    for number in range(5):
        hot = _skewed("skewed", 4 * files, files, random.Random(SEED + 12 + number))
        epochs.append([key for pair in zip(_shuffled(every, draw), hot, strict=True) for key in pair])
    return _of_files("mixed", "epochs beside a skewed load, cache 50 %", epochs, files // 2)


def generate(files: int) -> list[Callable[[], Trace]]:
    """Return what makes all traces, with datasets of so many files."""
    made: list[Callable[[], Trace]] = [lambda share=share: shuffled_epochs(share, files) for share in (25, 50, 75, 100)]  # type: ignore[misc]
    made += [
        lambda: interleaved_workers(files), lambda: repeated_order(files), lambda: parameter_search(files),
        lambda: class_folders(files), lambda: shards(files // 16), lambda: zipf(files, 12), lambda: zipf(files, 2),
        lambda: drifting(files), lambda: random_points(files), lambda: scan(files), lambda: scan_beside(files),
        lambda: moving_on(files), lambda: mixed(files),
    ]  # fmt: skip
    return made
