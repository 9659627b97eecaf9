"""The program that reads a dataset on one node of a cluster: it verifies every byte and notes how long each step took.

    python -m bench.cluster.reader < specification.json

    {"directory": "/mnt/x", "manifest": "...", "progress": "...", "seed": 1, "threads": 1, "read_bytes": 1048576}

It says "ready" when all is prepared, begins when it gets a line, and prints a JSON document at the end. How many bytes
it has read stands in the file `progress` (8 bytes). `seed` shuffles the order of the files; none: as in the manifest.
`evict`: forget the kernel's pages of a file before it is read, so that cachefs is asked.
An error of the file system is noted, and the next file is read; wrong bytes are noted too, and the exit code is 3.
A step is an open, or one readv of `read_bytes`; what lasts longer than `STALL_MS` is listed with its time.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

STALL_MS = 250.0
CHUNK = 1 << 20
WRONG_BYTES_EXIT = 3
_ERRORS_KEPT = 20
_STALLS_KEPT = 1000


class Report:
    """What happened, of all threads."""

    def __init__(self, progress: Path | None) -> None:
        self.bytes_read = 0
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self.error_count = 0
        self.stalls: list[tuple[float, float, str]] = []
        self.longest_ms = 0.0
        self.begun = 0.0
        self._lock = threading.Lock()
        self._progress = os.open(progress, os.O_WRONLY | os.O_CREAT, 0o600) if progress else None

    def step(self, begun: float, what: str) -> None:
        """Count something that began at `begun` and ends now."""
        spent_ms = (time.perf_counter() - begun) * 1e3
        with self._lock:
            self.longest_ms = max(self.longest_ms, spent_ms)
            if spent_ms >= STALL_MS:
                self.stalls.append((round(begun - self.begun, 3), round(spent_ms, 1), what))

    def got(self, size: int) -> None:
        """Count bytes that were right."""
        with self._lock:
            self.bytes_read += size
            if self._progress is not None:
                os.pwrite(self._progress, self.bytes_read.to_bytes(8, "little"), 0)

    def failed(self, text: str) -> None:
        """Note an error of the file system."""
        with self._lock:
            self.error_count += 1
            if len(self.errors) < _ERRORS_KEPT:
                self.errors.append(text)

    def outcome(self) -> dict[str, Any]:
        """Return the document."""
        return {
            "bytes": self.bytes_read,
            "seconds": time.perf_counter() - self.begun,
            "longest_ms": self.longest_ms,
            "stalls": sorted(self.stalls, key=lambda stall: -stall[1])[:_STALLS_KEPT],
            "errors": self.errors,
            "error_count": self.error_count,
            "wrong": self.wrong,
        }


def read_file(report: Report, spec: dict[str, Any], wanted: dict[str, Any], buffer: memoryview) -> None:
    """Read one file into the buffer (1 MiB), and compare each MiB."""
    read_bytes = spec.get("read_bytes", CHUNK)
    begun = time.perf_counter()
    descriptor = os.open(f"{spec['directory']}/{wanted['name']}", os.O_RDONLY)
    report.step(begun, f"open {wanted['name']}")
    try:
        if spec.get("evict"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for number, xxh3 in enumerate(wanted["sums"]):
            length = min(CHUNK, wanted["size"] - number * CHUNK)
            at = 0
            while at < length:
                begun = time.perf_counter()
                got = os.readv(descriptor, [buffer[at : min(at + read_bytes, length)]])
                report.step(begun, f"read {wanted['name']} at {number * CHUNK + at}")
                if not got:
                    break
                at += got
            if at != length or xxhash.xxh3_64_intdigest(buffer[:length]) != xxh3:
                report.wrong.append(f"{wanted['name']}: MiB {number} is wrong ({at} of {length} bytes)")
                return
            report.got(length)
    finally:
        os.close(descriptor)


def read_all(report: Report, spec: dict[str, Any], files: Iterator[dict[str, Any]]) -> None:
    """Read files until there are no more."""
    buffer = memoryview(bytearray(CHUNK))
    for wanted in files:
        try:
            read_file(report, spec, wanted, buffer)
        except OSError as error:
            report.failed(f"{wanted['name']}: {error.strerror} ({error.errno})")


class _Shared:
    """An iterator for several threads."""

    def __init__(self, files: list[dict[str, Any]]) -> None:
        self._files = iter(files)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            with self._lock:
                wanted = next(self._files, None)
            if wanted is None:
                return
            yield wanted


def main() -> int:
    """Read the specification, wait for the start, read the dataset, print the outcome."""
    spec: dict[str, Any] = json.loads(sys.stdin.readline())
    files = json.loads(Path(spec["manifest"]).read_bytes())["files"]
    if spec.get("seed") is not None:
        random.Random(spec["seed"]).shuffle(files)
    report = Report(Path(spec["progress"]) if spec.get("progress") else None)
    shared = _Shared(files)
    threads = [
        threading.Thread(target=read_all, args=(report, spec, iter(shared))) for _ in range(spec.get("threads", 1))
    ]
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    sys.stdin.readline()
    report.begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(report.outcome()), flush=True)
    return WRONG_BYTES_EXIT if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
