"""Which accesses the prefetcher recognises, with traces: few misses where there is a pattern, few guesses where not."""

from __future__ import annotations

import random
from itertools import chain, zip_longest

import pytest

from cachefs.prefetch.scheduler import Room
from tests.support.traces import MIB, Names, Store, Trace

FILES = [f"train/{number:05d}.jpg" for number in range(2000)]
CLASSES = [f"train/n{label:03d}/{number:03d}.jpg" for label in range(40) for number in range(50)]


def interleaved(*shares: list[str]) -> list[str]:
    return [path for path in chain.from_iterable(zip_longest(*shares)) if path is not None]


def jittered(paths: list[str], most: int, seed: int = 1) -> list[str]:
    """As read by several processes that start in order and overtake each other a little."""
    chance = random.Random(seed)
    return [path for _, path in sorted((number + chance.uniform(0, most), path) for number, path in enumerate(paths))]


def batches(paths: list[str], workers: int, size: int) -> list[str]:
    """As loaders do: worker k reads the batches k, k + workers, ..., all at the same speed."""
    shares: list[list[str]] = [[] for _ in range(workers)]
    for number in range(0, len(paths), size):
        shares[number // size % workers] += paths[number : number + size]
    return interleaved(*shares)


def shuffled(paths: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(paths, len(paths))


# -- in order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 20])
def test_a_directory_in_listing_order(batch: int) -> None:
    trace = Trace(Names(FILES))
    assert trace.read(FILES, batch=batch) <= 4 * batch
    assert trace.count("wasted") == 0
    assert trace.count("used") >= len(FILES) - 5 * batch


def test_backward() -> None:
    trace = Trace(Names(FILES))
    assert trace.read(FILES[::-1]) <= 5


def test_from_the_middle_as_after_a_checkpoint() -> None:
    trace = Trace(Names(FILES))
    assert trace.read(FILES[900:1500]) <= 5
    ahead = [path for path in trace.asked() if path < FILES[900]]
    assert ahead == []


@pytest.mark.parametrize("nodes", [2, 8, 64])
def test_the_share_of_one_of_several_nodes(nodes: int) -> None:
    share = FILES[1::nodes]
    trace = Trace(Names(FILES))
    assert trace.read(share) <= 5
    assert set(trace.asked()) <= set(share), "what other nodes read is not wanted here"


def test_workers_that_take_every_fourth_file() -> None:
    trace = Trace(Names(FILES))
    assert trace.read(jittered(FILES, 8)) <= 8


def test_workers_that_take_batches() -> None:
    trace = Trace(Names(FILES))
    assert trace.read(batches(FILES, 4, 32)) <= 60


def test_workers_with_contiguous_shares() -> None:
    trace = Trace(Names(FILES))
    shares = [FILES[start : start + 500] for start in range(0, 2000, 500)]
    assert trace.read(interleaved(*shares)) <= 20


def test_the_amount_ahead_grows_with_hits() -> None:
    trace = Trace(Names(FILES))
    trace.read(FILES[:4])
    assert len(trace.asked()) <= 8
    trace.read(FILES[4:40])
    assert 16 <= len(trace.asked()) <= 200
    trace.read(FILES[40:200])
    assert len(trace.asked()) >= 350


# -- shuffled ---------------------------------------------------------------------------------------------------------


def test_a_shuffled_directory() -> None:
    trace = Trace(Names(FILES))
    assert trace.read(shuffled(FILES, 1)) <= 200
    assert trace.count("wasted") == 0


def test_a_shuffled_directory_asks_for_no_more_than_is_free() -> None:
    trace = Trace(Names(FILES), room=Room(0, 0))
    trace.read(shuffled(FILES, 1)[:500])
    assert trace.asked() == []


def test_a_shuffled_tree_of_class_folders() -> None:
    trace = Trace(Names(CLASSES))
    assert trace.read(shuffled(CLASSES, 1)) <= 200
    assert trace.count("wasted") == 0


def test_a_shuffled_tree_that_was_never_listed() -> None:
    trace = Trace(Names(CLASSES, listed=False))
    assert trace.read(shuffled(CLASSES, 1)) <= 1000
    assert len(trace.listings) == len(set(trace.listings))


def test_the_next_shuffled_epoch_brings_back_what_was_evicted() -> None:
    trace = Trace(Names(CLASSES))
    trace.read(shuffled(CLASSES, 1))
    trace.store.cached.clear()
    assert trace.read(shuffled(CLASSES, 2)) <= 500


def test_a_hot_set_is_no_epoch() -> None:
    """Reads of the same few files again and again bring nothing else."""
    trace = Trace(Names(FILES))
    chance = random.Random(3)
    hot = [f"train/{number * 97:05d}.jpg" for number in range(20)]
    trace.read(chance.choice(hot) for _ in range(1000))
    assert len(trace.asked()) <= 400


# -- trees in order ---------------------------------------------------------------------------------------------------


def test_a_tree_in_order() -> None:
    trace = Trace(Names(CLASSES))
    assert trace.read(CLASSES) <= 12


def test_a_tree_in_order_that_was_never_listed_but_for_what_is_read() -> None:
    """Names come ahead of data: the next directories are listed before the reader gets there."""
    names = Names(CLASSES, listed=False)
    for directory in ("", "train", "train/n000"):
        names.generations[names.inos[directory]] = 1
    trace = Trace(names)
    assert trace.read(CLASSES) <= 12
    assert "train/n001" in trace.listings
    assert len(trace.listings) == len(set(trace.listings))


def test_a_tree_in_order_by_four_readers() -> None:
    shares = [CLASSES[start : start + 500] for start in range(0, 2000, 500)]
    trace = Trace(Names(CLASSES))
    assert trace.read(interleaved(*shares)) <= 80


def test_directories_with_one_file_each() -> None:
    files = [f"samples/{number:04d}/data.npy" for number in range(500)]
    trace = Trace(Names(files))
    assert trace.read(files) <= 8


# -- the same order again ---------------------------------------------------------------------------------------------


def test_the_same_order_in_every_epoch() -> None:
    files = [f"{number % 7}/{number:05d}.bin" for number in range(1500)]
    order = shuffled(files, 4)
    trace = Trace(Names(files), room=Room(100 * MIB, 0))
    trace.read(order)
    trace.store.cached.clear()
    trace.prefetch.outstanding.give_up()
    assert trace.read(order) <= 60


# -- large files ------------------------------------------------------------------------------------------------------


def shards(pattern: str, count: int, size: int = 200 * MIB) -> dict[str, int]:
    return {pattern.format(number): size for number in range(count)}


@pytest.mark.parametrize("pattern", ["shards/shard-{:06d}.tar", "shards/shard-{}.tar"])
def test_numbered_shards(pattern: str) -> None:
    files = shards(pattern, 40)
    trace = Trace(Names(files))
    assert trace.read(list(files)) <= 8
    assert {piece.first for piece in trace.store.asked} == {0}
    assert {piece.count for piece in trace.store.asked} == {8}, "heads: the rest is readahead's"


def test_large_files_are_begun_a_few_ahead() -> None:
    files = shards("shards/shard-{:06d}.tar", 400)
    trace = Trace(Names(files))
    trace.read(list(files)[:100])
    assert len(trace.asked()) <= 110


def test_formats_that_are_read_from_their_end() -> None:
    files = shards("tables/part-{:05d}.parquet", 60)
    trace = Trace(Names(files))
    assert trace.read(list(files), block=199) <= 8
    tails = {piece.version.key for piece in trace.store.asked if piece.first == 199}
    heads = {piece.version.key for piece in trace.store.asked if piece.first == 0}
    assert len(tails) >= 50
    assert len(heads) >= 50


# -- no pattern -------------------------------------------------------------------------------------------------------


def test_random_points_within_one_large_file() -> None:
    trace = Trace(Names({"table.bin": 10 << 30}))
    chance = random.Random(5)
    for _ in range(500):
        trace.read(["table.bin"], block=chance.randrange(10 << 10))
    assert len(trace.asked()) <= 3


def test_reading_a_file_here_and_there() -> None:
    """A few files of each of many directories that have nothing to do with each other."""
    files = [f"{a}/{b}/{c}.bin" for a in range(30) for b in range(3) for c in range(40)]
    trace = Trace(Names(files))
    trace.read([f"{a}/1/{7 * a % 40}.bin" for a in random.Random(6).sample(range(30), 3)])
    assert trace.asked() == []


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_what_is_evicted_unread_makes_it_careful() -> None:
    trace = Trace(Names(FILES), Store(capacity=20))
    trace.read(FILES[:1000])
    assert trace.prefetch.allowance.trust < 0.2
    assert trace.count("wasted") > 0


def test_a_store_that_refuses_is_asked_for_less() -> None:
    from cachefs.prefetch.ports import Outcome

    trace = Trace(Names(FILES))
    trace.store.outcome = Outcome.FAILED
    trace.read(FILES[:400])
    assert trace.prefetch.allowance.window == 8
    assert trace.prefetch.outstanding.held_bytes == 0


def test_no_more_is_held_than_the_room() -> None:
    room = Room(5 * MIB, 0)
    trace = Trace(Names(FILES), room=room)
    for path in FILES[:500]:
        trace.read([path])
        assert trace.prefetch.outstanding.held_bytes <= room.ordered_bytes + 110 * 1024


def test_a_file_that_was_replaced_is_found_in_the_new_listing() -> None:
    names = Names(FILES)
    trace = Trace(names)
    trace.read(FILES[:500])
    for path in FILES[500:1000]:
        names.replace(path)
    names.generations[names.inos["train"]] = 2
    assert trace.read(FILES[500:1200]) <= 500
    asked = trace.asked()
    assert len(asked) == len(set(asked)) or trace.count("wasted") == 0
