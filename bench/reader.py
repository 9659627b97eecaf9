"""The one reading program that every system is measured with: its own process, one scenario per run, JSON in and out.

    echo '{"action": "small", "directory": "/mnt/x", "manifest": "manifest.json"}' | python -m bench.reader

* Only the standard library and xxhash: what it costs to start is the same for everybody and never inside a measurement.
* One preallocated buffer and `os.readv`: `os.read` allocates per call, which halves every small-file figure.
* Every byte that is read is compared with the manifest's xxh3 sums, between the timed sections. Wrong bytes end the run
  with exit code 3: a fast wrong answer is no result.
* Times are the sum of the timed sections (open, readv, close).
"""

from __future__ import annotations

import array
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

PAGE = 4096
CHUNK = 1 << 20
WRONG_BYTES_EXIT = 3

Spec = dict[str, Any]
Outcome = dict[str, Any]


class WrongBytes(Exception):
    """What was read or listed is not what was stored."""


class Stopwatch:
    """The sum of the timed sections and the longest of them."""

    def __init__(self) -> None:
        self.total_ns = 0
        self.longest_ns = 0

    def add(self, begun_ns: int) -> None:
        """Count a section that began at `begun_ns` and ends now."""
        spent = time.perf_counter_ns() - begun_ns
        self.total_ns += spent
        self.longest_ns = max(self.longest_ns, spent)

    def outcome(self, count: int, size: int) -> Outcome:
        """Return the figures of `count` operations over `size` bytes."""
        return {
            "count": count,
            "bytes": size,
            "seconds": self.total_ns / 1e9,
            "longest_ms": self.longest_ns / 1e6,
        }


def load_sums(path: Path) -> array.array[int]:
    """Return a file of 64-bit sums as an array."""
    sums = array.array("Q")
    sums.frombytes(path.read_bytes())
    return sums


def list_names(spec: Spec, manifest: dict[str, Any]) -> Outcome:
    """Read the directory `passes` times with scandir and a stat of each entry; `runs` are the seconds of each pass."""
    expected = dict(zip(manifest["small"]["names"], manifest["small"]["sizes"], strict=True))
    runs = []
    for _ in range(spec["passes"]):
        begun = time.perf_counter_ns()
        with os.scandir(spec["directory"]) as entries:
            found = {entry.name: entry.stat().st_size for entry in entries}
        runs.append((time.perf_counter_ns() - begun) / 1e9)
        if found != expected:
            raise WrongBytes(
                f"the listing of {spec['directory']} differs: {len(found)} names, {len(expected)} expected"
            )
    return {"count": len(expected), "bytes": 0, "seconds": runs[0], "runs": runs}


def stat_names(spec: Spec, manifest: dict[str, Any]) -> Outcome:
    """stat(2) every name of the directory by its path."""
    small = manifest["small"]
    paths = [f"{spec['directory']}/{name}" for name in small["names"]]
    begun = time.perf_counter_ns()
    sizes = [os.stat(path).st_size for path in paths]
    seconds = (time.perf_counter_ns() - begun) / 1e9
    if sizes != small["sizes"]:
        raise WrongBytes("a size differs from the manifest")
    return {"count": len(paths), "bytes": 0, "seconds": seconds}


def read_file(path: str, size: int, buffers: list[memoryview]) -> int:
    """Read one file into the buffer; return the bytes read (a longer file shows as more than `size`)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        got = os.readv(fd, buffers)
        while 0 < got < size:
            more = os.readv(fd, [buffers[0][got:]])
            if not more:
                break
            got += more
    finally:
        os.close(fd)
    return got


def read_small(spec: Spec, manifest: dict[str, Any]) -> Outcome:
    """Open, read and close every file of the directory, one after the other, in the order of their names."""
    small = manifest["small"]
    view = memoryview(bytearray(max(small["sizes"]) + PAGE))
    watch, size_read = Stopwatch(), 0
    wanted = [
        (f"{spec['directory']}/{name}", size, xxh3)
        for name, size, xxh3 in zip(small["names"], small["sizes"], small["sums"], strict=True)
    ]
    for path, size, xxh3 in wanted:
        begun = time.perf_counter_ns()
        got = read_file(path, size, [view])
        watch.add(begun)
        if got != size or xxhash.xxh3_64_intdigest(view[:got]) != xxh3:
            raise WrongBytes(f"{path}: wrong bytes ({got} read, {size} expected)")
        size_read += got
    return watch.outcome(len(wanted), size_read)


def read_large(spec: Spec, manifest: dict[str, Any]) -> Outcome:
    """Read the large file from begin to end with a buffer of 1 MiB."""
    large = manifest["large"]
    sums = load_sums(Path(spec["manifest"]).parent / large["chunk_sums"])
    view = memoryview(bytearray(CHUNK))
    watch, size_read = Stopwatch(), 0
    begun = time.perf_counter_ns()
    with open(spec["path"], "rb", buffering=0) as file:
        watch.add(begun)
        for index, xxh3 in enumerate(sums):
            filled = 0
            begun = time.perf_counter_ns()
            while filled < CHUNK and (got := os.readv(file.fileno(), [view[filled:]])):
                filled += got
            watch.add(begun)
            if xxhash.xxh3_64_intdigest(view[:filled]) != xxh3:
                raise WrongBytes(f"{spec['path']}: wrong bytes in MiB {index}")
            size_read += filled
        if os.readv(file.fileno(), [view]):
            raise WrongBytes(f"{spec['path']} is longer than {size_read} bytes")
    return watch.outcome(len(sums), size_read)


def read_random(spec: Spec, manifest: dict[str, Any]) -> Outcome:
    """Read single pages of the large file, no page twice, until `count` or `limit_s` is reached."""
    sums = load_sums(Path(spec["manifest"]).parent / manifest["large"]["page_sums"])
    pages = random.Random(spec["seed"]).sample(range(len(sums)), min(spec["count"], len(sums)))
    buffer = bytearray(PAGE)
    buffers = [buffer]
    watch, done = Stopwatch(), 0
    with open(spec["path"], "rb", buffering=0) as file:
        fd = file.fileno()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for page in pages:
            begun = time.perf_counter_ns()
            got = os.preadv(fd, buffers, page * PAGE)
            watch.add(begun)
            if got != PAGE or xxhash.xxh3_64_intdigest(buffer) != sums[page]:
                raise WrongBytes(f"{spec['path']}: wrong bytes in page {page}")
            done += 1
            if watch.total_ns > spec["limit_s"] * 1e9:
                break
    return watch.outcome(done, done * PAGE)


def read_for_a_while(spec: Spec, manifest: dict[str, Any]) -> Outcome:
    """Read small files again and again for `duration_s`, dropping each from the page cache, and note every error."""
    small = manifest["small"]
    view = memoryview(bytearray(max(small["sizes"]) + PAGE))
    watch, done, size_read = Stopwatch(), 0, 0
    errors: list[str] = []
    deadline = time.monotonic() + spec["duration_s"]
    while time.monotonic() < deadline and len(errors) < 20:
        at = done % len(small["names"])
        path = f"{spec['directory']}/{small['names'][at]}"
        begun = time.perf_counter_ns()
        try:
            got = read_file(path, small["sizes"][at], [view])
        except OSError as error:
            errors.append(str(error))
            got = -1
        watch.add(begun)
        if got >= 0 and (got != small["sizes"][at] or xxhash.xxh3_64_intdigest(view[:got]) != small["sums"][at]):
            raise WrongBytes(f"{path}: wrong bytes")
        if got >= 0:
            forget_pages(path)
        done += 1
        size_read += max(got, 0)
    return watch.outcome(done, size_read) | {"errors": errors}


def forget_pages(path: str) -> None:
    """Drop the file's clean pages, so that the next read reaches the file system."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return  # the next round reports it
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


ACTIONS: dict[str, Callable[[Spec, dict[str, Any]], Outcome]] = {
    "list": list_names,
    "stat": stat_names,
    "small": read_small,
    "large": read_large,
    "random": read_random,
    "watch": read_for_a_while,
}


def main() -> int:
    """Read the specification from standard input, run it, print the outcome."""
    spec: Spec = json.load(sys.stdin)
    manifest = json.loads(Path(spec["manifest"]).read_bytes())
    gc.collect()
    gc.disable()
    try:
        outcome = ACTIONS[spec["action"]](spec, manifest)
    except WrongBytes as error:
        print(json.dumps({"error": str(error)}))
        return WRONG_BYTES_EXIT
    except OSError as error:
        print(json.dumps({"error": f"{error.strerror}: {error.filename or spec.get('path') or spec.get('directory')}"}))
        return 1
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
