"""`make demo`: a bucket, a mount, two epochs of a real training loop over plain paths, a killed worker in the second.

Everything is real and local: an S3 server on loopback, `cachefs mount`, open() and read(), a network that learns. Every
byte is compared with what was uploaded. The exit code is not 0 when a byte was wrong, a read failed, the loss did not
fall, or the second epoch asked S3 for an object again. Nothing is left behind, not even when it is interrupted.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import machine
from bench.cachefs_cli import CachefsMount, Counts, MountOptions
from bench.demo_training import Floats, Network, features, pictures
from bench.s3_server import S3Server
from bench.workdir import work_directory

BUCKET = "demo"
CLASSES, PER_CLASS, BATCH = 10, 300, 50
SHARDS, SHARD_BYTES, CHUNK = 4, 32 << 20, 1 << 20
COUNTERS_SETTLE_S = 1.5  # the worker tells the agent its counts once a second
_SEED = 7


class DemoFailed(Exception):
    """What went wrong, in words for a person."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """What was uploaded: labels of the pictures and the sum of every file."""

    labels: dict[str, int]
    shards: list[str]
    sums: dict[str, int]


@dataclass(slots=True)
class Epoch:
    """What one pass over the bucket showed."""

    name: str
    samples: int = 0
    size: int = 0
    sample_s: float = 0.0
    read_s: float = 0.0
    longest_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    right: int = 0
    sources: dict[str, float] = field(default_factory=dict)
    requests: dict[str, float] = field(default_factory=dict)


# -- the bucket --------------------------------------------------------------------------------------------------------


def fill_bucket(server: S3Server, rng: np.random.Generator) -> Bucket:
    """Generate pictures and shards and upload them."""
    bucket = Bucket({}, [], {})

    def objects() -> Iterator[tuple[str, bytes]]:
        for picture in pictures(rng, CLASSES, PER_CLASS):
            bucket.labels[picture.key] = picture.label
            bucket.sums[picture.key] = xxhash.xxh3_64_intdigest(picture.content)
            yield picture.key, picture.content
        for number in range(SHARDS):
            name, content = f"shards/shard_{number}.bin", rng.bytes(SHARD_BYTES)
            bucket.shards.append(name)
            bucket.sums[name] = xxhash.xxh3_64_intdigest(content)
            yield name, content

    server.put_many(BUCKET, objects())
    return bucket


# -- the loop ----------------------------------------------------------------------------------------------------------


class Training:
    """Reads the mount as a training job does and notes what it saw."""

    def __init__(self, mounted: CachefsMount, bucket: Bucket, progress: Progress) -> None:
        self._mounted = mounted
        self._root = mounted.options.mountpoint
        self._bucket = bucket
        self._progress = progress
        self._rng = np.random.default_rng(_SEED)
        self._network = Network(self._rng, CLASSES)
        self.killed: tuple[int, int] | None = None
        """Numbers of the worker that was killed and of the one that took over."""

    def run_epoch(self, epoch: Epoch, *, kill_worker: bool) -> None:
        """Read every picture once in a random order and train on it; read every shard."""
        names = sorted(self._bucket.labels)
        self._rng.shuffle(names)
        spans: list[tuple[Counts, Counts]] = []
        before = self._mounted.counters()
        task = self._progress.add_task(epoch.name, total=len(names) + SHARDS * (SHARD_BYTES // CHUNK))
        for start in range(0, len(names), BATCH):
            if kill_worker and start == len(names) // BATCH // 2 * BATCH:
                time.sleep(COUNTERS_SETTLE_S)
                spans.append((before, self._mounted.counters()))
                before = Counts({}, spans[-1][1].agent)  # the next worker counts from 0
                self._kill_worker()
            self._train_on(names[start : start + BATCH], epoch)
            self._progress.advance(task, BATCH)
        for name in self._bucket.shards:
            self._read_shard(name, epoch)
            self._progress.advance(task, SHARD_BYTES // CHUNK)
        time.sleep(COUNTERS_SETTLE_S)
        spans.append((before, self._mounted.counters()))
        _count_sources(epoch, spans)
        if self.killed is not None:
            self.killed = (self.killed[0], self._mounted.pid("worker"))

    def _train_on(self, names: list[str], epoch: Epoch) -> None:
        begun = time.perf_counter()
        batch: list[Floats] = []
        for name in names:
            read = time.perf_counter()
            with open(self._root / name, "rb") as file:
                content = file.read()
            epoch.longest_s = max(epoch.longest_s, time.perf_counter() - read)
            if xxhash.xxh3_64_intdigest(content) != self._bucket.sums[name]:
                raise DemoFailed(f"{name}: {len(content)} bytes were read, and they are not what was uploaded")
            epoch.size += len(content)
            batch.append(features(content))
        labels = np.array([self._bucket.labels[name] for name in names])
        loss, right = self._network.train(np.stack(batch), labels)
        epoch.sample_s += time.perf_counter() - begun
        epoch.losses.append(loss)
        epoch.right += right
        epoch.samples += len(names)

    def _read_shard(self, name: str, epoch: Epoch) -> None:
        digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(CHUNK))
        begun = time.perf_counter()
        with open(self._root / name, "rb", buffering=0) as file:
            while True:
                read = time.perf_counter()
                got = file.readinto(buffer)
                epoch.longest_s = max(epoch.longest_s, time.perf_counter() - read)
                if not got:
                    break
                digest.update(buffer[:got])
                epoch.size += got
        epoch.read_s += time.perf_counter() - begun
        if digest.intdigest() != self._bucket.sums[name]:
            raise DemoFailed(f"{name}: the bytes are not what was uploaded")

    def _kill_worker(self) -> None:
        pid = self._mounted.pid("worker")
        os.kill(pid, signal.SIGKILL)
        self.killed = (pid, 0)
        self._progress.console.print(
            f"  [bold]kill -9 {pid}[/]: the process that answers this mount is dead; reading on"
        )


def _count_sources(epoch: Epoch, spans: list[tuple[Counts, Counts]]) -> None:
    def grown(name: str, *, of_worker: bool) -> float:
        total = 0.0
        for before, after in spans:
            first, last = (before.worker, after.worker) if of_worker else (before.agent, after.agent)
            total += max(0.0, last.get(name, 0) - first.get(name, 0))
        return total

    from_s3, from_disk = grown("origin_bytes", of_worker=False), grown("disk_hit_bytes", of_worker=False)
    near = max(0.0, epoch.size - from_s3 - from_disk)  # what was in this node's memory already
    from_shm = min(near, grown("shm_hit_bytes", of_worker=True))
    epoch.sources = {"S3": from_s3, "disk": from_disk, "shm": from_shm, "page cache": near - from_shm}
    epoch.requests = {kind: grown(f"origin_{kind}_requests", of_worker=False) for kind in ("get", "list", "head")}


def forget_pages(root: Path, names: list[str]) -> None:
    """Empty the kernel's page cache, for the whole machine or (without the right to) file by file."""
    try:
        machine.drop_page_cache()
    except OSError:
        for name in names:
            fd = os.open(root / name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


# -- what a person sees ------------------------------------------------------------------------------------------------


def report(console: Console, epochs: list[Epoch], killed: tuple[int, int] | None) -> None:
    """Print the table and what it means."""
    table = Table(title="two epochs over plain paths", title_justify="left")
    for title in ("", *(epoch.name for epoch in epochs)):
        table.add_column(title, justify="right" if title else "left")

    def row(title: str, cells: list[str]) -> None:
        table.add_row(title, *cells)

    row("samples/s (read, decode, train)", [f"{e.samples / e.sample_s:,.0f}" for e in epochs])
    shards = SHARDS * SHARD_BYTES / 1e6
    row("shards, MB/s (read, compare)", [f"{shards / e.read_s:,.0f}" for e in epochs])
    row("loss, first to last batch", [f"{e.losses[0]:.2f} to {e.losses[-1]:.2f}" for e in epochs])
    row("accuracy while training", [f"{e.right / e.samples:.0%}" for e in epochs])
    for source in epochs[0].sources:
        row(f"MB from {source}", [f"{e.sources[source] / 1e6:,.0f}" for e in epochs])
    row("S3 requests: GET", [f"{e.requests['get']:,.0f}" for e in epochs])
    row("S3 requests: LIST and HEAD", [f"{e.requests['list'] + e.requests['head']:,.0f}" for e in epochs])
    row("longest wait for one read (ms)", [f"{e.longest_s * 1000:,.0f}" for e in epochs])
    console.print(table)
    if killed is not None:
        console.print(
            f"The worker {killed[0]} was killed with -9 in the middle of the second epoch; {killed[1]} took over.\n"
            f"The job saw no error; its longest wait for a file was {epochs[-1].longest_s * 1000:,.0f} ms."
        )


def verdict(epochs: list[Epoch], killed: tuple[int, int] | None) -> None:
    """Raise DemoFailed when the figures do not show what the demo claims."""
    first, second = epochs
    if second.requests["get"]:
        raise DemoFailed(f"the second epoch made {second.requests['get']:.0f} GET requests; everything was cached")
    if not first.requests["get"]:
        raise DemoFailed("the first epoch made no GET request: the counters do not work")
    if not np.mean(second.losses[-10:]) < np.mean(first.losses[:10]):
        raise DemoFailed("the loss did not fall: the network saw no sense in what it read")
    if killed is None or killed[0] == killed[1] or not killed[1]:
        raise DemoFailed("the worker was not replaced")


def _closing_words(console: Console) -> None:
    console.print(
        "\nShown: a bucket as a directory of plain paths; the first epoch brought every byte from S3 once, the second\n"
        "read it from this node; a dead worker costs a pause, not the job. Everything is unmounted and removed again.\n"
        "\nThe same with a bucket of your own:\n"
        "  cachefs mount s3://BUCKET /mnt/bucket       (--profile NAME, --region NAME, --endpoint-url URL as needed)\n"
        "  python train.py --train-dir /mnt/bucket\n"
        "  cachefs status\n"
        "  cachefs umount /mnt/bucket",
        highlight=False,
        soft_wrap=True,
    )


# -- the whole ---------------------------------------------------------------------------------------------------------


def missing() -> list[str]:
    """What this machine or this user lacks, each with the remedy."""
    lacking = []
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        lacking.append("/dev/fuse cannot be opened: `modprobe fuse`, or `--device /dev/fuse` for a container")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        lacking.append("mounting without root needs fusermount3: install the package fuse3, or run this as root")
    return lacking


def run_demo(console: Console, work: Path) -> None:
    """Do everything below `work`. Raises DemoFailed, RuntimeError or OSError."""
    begun = time.monotonic()
    with S3Server(str(work)) as server:
        console.print(f"An S3 server listens on {server.endpoint_url}.", highlight=False)
        bucket = fill_bucket(server, np.random.default_rng(_SEED))
        console.print(f"Uploaded {len(bucket.labels):,} pictures in {CLASSES} classes and {SHARDS} shards of 32 MiB.")
        environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ} | server.environment
        options = MountOptions(
            source=f"s3://{BUCKET}",
            endpoint_url=server.endpoint_url,
            mountpoint=work / "bucket",
            cache_dir=work / "cache",
            runtime_dir=work / "run",
            environment=environment | {"HOME": str(work)},
            more=("--shm-size", "512MiB"),
        )
        mounted = CachefsMount(options)
        try:
            mounted.mount()
            console.print(f"cachefs mount s3://{BUCKET} {options.mountpoint}", highlight=False)
            epochs, killed = _two_epochs(console, mounted, bucket)
        finally:
            mounted.close()
    report(console, epochs, killed)
    verdict(epochs, killed)
    _closing_words(console)
    console.print(f"\n{time.monotonic() - begun:.0f} s in all.")


def _two_epochs(console: Console, mounted: CachefsMount, bucket: Bucket) -> tuple[list[Epoch], tuple[int, int] | None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    epochs = [Epoch("first epoch"), Epoch("second epoch")]
    with Progress(*columns, console=console) as progress:
        training = Training(mounted, bucket, progress)
        training.run_epoch(epochs[0], kill_worker=False)
        forget_pages(mounted.options.mountpoint, [*bucket.labels, *bucket.shards])
        progress.console.print("  the kernel's page cache was emptied, so that the tiers of cachefs have to answer")
        training.run_epoch(epochs[1], kill_worker=True)
    return epochs, training.killed


def main() -> int:
    """Run the demo and return the exit code."""
    console = Console()
    lacking = missing()
    if lacking:
        console.print("The demo cannot run here:\n" + "\n".join(f"  {line}" for line in lacking), highlight=False)
        return 1
    try:
        with work_directory(Path(__file__).parent.parent / ".demo") as work:
            run_demo(console, work)
    except (DemoFailed, RuntimeError, OSError) as error:
        console.print(f"[bold red]The demo failed:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything was taken down.")
        return 130
    return 0


if __name__ == "__main__":
    machine.end_in_order()
    sys.exit(main())
