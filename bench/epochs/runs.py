"""The scenarios. Each begins with an empty cache and a fresh mount, and returns plain figures.

The peers are measured as installed, with room for the data set; cachefs as installed, too, but for what a scenario is
about (`--prefetch off`, the size of its tiers, `--eviction`). Before a first epoch every object was read once from the
server by `bench.origin`, so that its disk plays no part.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.cachefs_cli import CachefsMount, MountOptions
from bench.dataset import LARGE_NAME
from bench.epochs import orders
from bench.epochs.dataset import EpochFiles
from bench.epochs.orders import Order
from bench.scenarios import origin_spec, run_program
from bench.systems.port import Site, System

Figures = dict[str, Any]
SETTLE_S = 1.5
"""Counters of a worker reach the agent within a second."""
WORKERS = 4
EPOCHS = 4
POINTS = 2000
HALF, SHM_PART, SHM_LEAST = 0.5385, 0.05, 16 << 20
"""The sizes of the tiers, per byte of files, so that they hold half of the files: a tier leaves a part of its size free
for LMDB's trees and for what a transaction takes. `held_share` says how many they were."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the scenarios play."""

    site: Site
    files: EpochFiles

    def read(self, root: Path, order: Order, workers: int = 1) -> Figures:
        """Read an epoch through a mount. Memory for it is touched before: see `machine.make_memory_resident`."""
        machine.make_memory_resident(3 * len(order) * self.files.small_bytes)
        spec = {
            "action": "epoch",
            "root": str(root),
            "sums": str(self.files.sums()),
            "paths": orders.write(order, self.site.work / "order.json"),
            "workers": workers,
        }
        outcome = run_program("bench.epochs.reader", spec)
        return outcome | {"files_per_s": outcome["count"] / outcome["seconds"]}

    def warm_server(self, bucket: str) -> None:
        """Read every object once from the server."""
        run_program("bench.origin", {"action": "warm", **origin_spec(self.site, bucket)}, self.site.beside_server)

    @contextmanager
    def mounted(self, *more: str, shm_bytes: int = 0) -> Iterator[CachefsMount]:
        """A mount of cachefs with an empty cache; nothing of it is left."""
        site, shm = self.site, shm_bytes or self.files.total_bytes * 3 // 2
        mount = CachefsMount(
            MountOptions(
                source=f"s3://{site.bucket}",
                endpoint_url=site.endpoint_url,
                mountpoint=site.place("mnt", "epochs"),
                cache_dir=site.work / "epochs-cache",
                runtime_dir=site.work / "epochs-run",
                environment=site.clean_environment(),
                more=("--shm-size", str(shm), "--log-level", "warning", *more),
            )
        )
        try:
            mount.mount()
            yield mount
        finally:
            mount.close()


def first_epoch(stage: Stage, system: System, bucket: str, order: Order, workers: int) -> Figures:
    """Read an epoch through a system that has nothing yet."""
    system.umount()
    system.reset()
    stage.warm_server(bucket)
    root = system.mount()
    try:
        return stage.read(root, order, workers)
    finally:
        system.umount()


def server_rate(stage: Stage) -> Figures:
    """What obstore alone gets: the files of the directory, 32 threads, no file system."""
    stage.warm_server(stage.site.bucket)
    outcome = run_program("bench.origin", {"action": "small", **origin_spec(stage.site, stage.site.bucket)})
    return outcome | {"files_per_s": outcome["count"] / outcome["seconds"]}


def with_and_without(stage: Stage, without_files: int) -> Figures:
    """The directory in listing order with prefetch, and the first files of it without."""
    order = orders.listed(stage.files.directory())
    figures: Figures = {}
    for name, mode, some in (("off", "off", order[:without_files]), ("auto", "auto", order)):
        with stage.mounted("--prefetch", mode) as mount:
            figures[name] = stage.read(mount.options.mountpoint, some)
    return figures


@dataclass(slots=True)
class _Origin:
    """What the agent took from the store since it was last asked."""

    mount: CachefsMount
    seen: float = 0.0

    def taken(self) -> float:
        time.sleep(SETTLE_S)
        total = float(self.mount.counters().agent.get("origin_bytes", 0))
        taken, self.seen = total - self.seen, total
        return taken


def epochs_larger_than_cache(stage: Stage, eviction: str, *, plan: bool = False, scan: bool = False) -> Figures:
    """Shuffled epochs over the tree with tiers that hold half of its files; `scan`: then the directory, and one more.

    A hit is what did not come from the store: bytes of it, so that what was prefetched in vain counts as a miss.
    """
    tree, size = stage.files.tree(), stage.files.small_bytes
    runs = [orders.shuffled(tree, seed) for seed in range(EPOCHS + scan)]
    shm = max(SHM_LEAST, int(len(tree) * size * HALF * SHM_PART))
    tiers = ("--cache-size", str(int(len(tree) * size * HALF) - shm), "--eviction", eviction)
    hits: list[float] = []
    with stage.mounted(*tiers, shm_bytes=shm) as mount:
        origin, root = _Origin(mount), mount.options.mountpoint
        if plan:
            _write_plan(root, runs)
        for number, order in enumerate(runs):
            if scan and number == EPOCHS:
                _read_forgetting(stage, root, orders.listed(stage.files.directory()))
                origin.taken()
            got = _read_forgetting(stage, root, order)
            hits.append(1 - origin.taken() / got["bytes"])
        held = _held_files(mount)
    best = list(orders.best_shares(runs, size, len(tree) // 2 * size))
    return {"hits": hits, "best": best, "eviction": eviction, "held_share": held / len(tree)}


def _held_files(mount: CachefsMount) -> int:
    """How many files the two tiers hold, those twice that are in both."""
    tiers = mount.status()["agents"][0]["tiers"]
    return int(tiers["shm"]["blocks"]) + int(tiers["disk"]["blocks"])


def _read_forgetting(stage: Stage, root: Path, order: Order) -> Figures:
    machine.drop_page_cache()
    return stage.read(root, order)


def _write_plan(root: Path, runs: Sequence[Order]) -> None:
    with (root / ".cachefs" / "plan").open("w") as plan:
        for order in runs:
            plan.writelines(f"{path}\n" for path, _ in order)


def waste(stage: Stage) -> Figures:
    """What prefetch fetched in vain on a mix of loads, and on random points of the large file.

    The mix: half of the directory in listing order (then the job ends), the tree shuffled by four workers, points. What
    was fetched and not read when the mount ends counts as wasted.
    """
    figures: Figures = {}
    with stage.mounted() as mount:
        root = mount.options.mountpoint
        half = orders.listed(stage.files.directory())[: stage.files.small_count // 2]
        stage.read(root, half)
        stage.read(root, orders.shuffled(stage.files.tree(), 11), WORKERS)
        _points(stage, root)
        figures["mix"] = _prefetched(mount)
    with stage.mounted() as mount:
        read = _points(stage, mount.options.mountpoint)
        figures["points"] = _prefetched(mount) | {"read_bytes": read["bytes"]}
    return figures


def _points(stage: Stage, root: Path) -> Figures:
    spec = {"action": "random", "path": str(root / LARGE_NAME), "manifest": str(stage.files.manifest)}
    return run_program("bench.reader", spec | {"count": POINTS, "limit_s": 60.0, "seed": 5})


def _prefetched(mount: CachefsMount) -> Figures:
    time.sleep(SETTLE_S)
    counted = mount.counters().agent
    issued, used = (float(counted.get(f"prefetch_{what}_bytes", 0)) for what in ("issued", "used"))
    return {
        "issued_bytes": issued,
        "used_bytes": used,
        "wasted_share": (issued - used) / issued if issued else 0.0,
        "origin_bytes": float(counted.get("origin_bytes", 0)),
    }


def room_needed(small_files: int, small_bytes: int, large_bytes: int) -> int:
    """Bytes of the local disk that a run takes: the files, the server's, a peer's copy and cache, ours."""
    return 5 * (2 * small_files * small_bytes + large_bytes)


def check_room(work: Path, needed: int, fail: Callable[[str], Exception]) -> None:
    """Raise `fail` with one line when the disk is too small."""
    free = shutil.disk_usage(work).free
    if free < needed:
        raise fail(f"{work} has {free / 1e9:.1f} GB free, the run needs {needed / 1e9:.1f} GB")
