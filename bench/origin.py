"""The S3 server's own rate: obstore alone, no file system. The ceiling of every cold figure; it also warms the server.

A process of its own, specification as JSON on standard input, like `bench.reader`:

* small: every small object, 32 threads, each body compared with its sum;
* large: the large object in ranges of 8 MiB, 8 in flight, each MiB compared with its sum;
* warm: every object of a bucket once, so that a cold run measures the reader and not the server's disk.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import xxhash
from obstore.store import S3Store

from bench.reader import CHUNK, WRONG_BYTES_EXIT, Outcome, Spec, WrongBytes, load_sums

_SMALL_THREADS = 32
_RANGE_BYTES = 8 * CHUNK
_RANGES_IN_FLIGHT = 8


def open_store(spec: Spec) -> S3Store:
    """Return the bucket."""
    return S3Store(
        spec["bucket"],
        endpoint=spec["endpoint_url"],
        region=spec["region"],
        access_key_id=spec["access_key"],
        secret_access_key=spec["secret_key"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def small(spec: Spec) -> Outcome:
    """Fetch every small object."""
    store = open_store(spec)
    listed = json.loads(Path(spec["manifest"]).read_bytes())["small"]

    def fetch(item: tuple[str, int]) -> int:
        name, xxh3 = item
        body = memoryview(obstore.get(store, f"{spec['directory']}/{name}").bytes())
        if xxhash.xxh3_64_intdigest(body) != xxh3:
            raise WrongBytes(f"{name}: wrong bytes")
        return len(body)

    return _timed(fetch, list(zip(listed["names"], listed["sums"], strict=True)), _SMALL_THREADS)


def large(spec: Spec) -> Outcome:
    """Fetch the large object."""
    store = open_store(spec)
    listed = json.loads(Path(spec["manifest"]).read_bytes())["large"]
    sums = load_sums(Path(spec["manifest"]).parent / listed["chunk_sums"])
    size: int = listed["size"]

    def fetch(start: int) -> int:
        length = min(_RANGE_BYTES, size - start)
        body = memoryview(obstore.get_range(store, spec["key"], start=start, length=length))
        for at in range(0, length, CHUNK):
            if xxhash.xxh3_64_intdigest(body[at : at + CHUNK]) != sums[(start + at) // CHUNK]:
                raise WrongBytes(f"{spec['key']}: wrong bytes at {start + at}")
        return length

    return _timed(fetch, list(range(0, size, _RANGE_BYTES)), _RANGES_IN_FLIGHT)


def warm(spec: Spec) -> Outcome:
    """Fetch everything once."""
    store = open_store(spec)

    def pieces() -> Iterator[tuple[str, int, int]]:
        for page in obstore.list(store):
            for entry in page:
                for start in range(0, entry["size"], _RANGE_BYTES):
                    yield entry["path"], start, min(_RANGE_BYTES, entry["size"] - start)

    def fetch(piece: tuple[str, int, int]) -> int:
        path, start, length = piece
        return len(memoryview(obstore.get_range(store, path, start=start, length=length)))

    return _timed(fetch, list(pieces()), _RANGES_IN_FLIGHT)


def _timed(fetch: Callable[[Any], int], items: list[Any], threads: int) -> Outcome:
    with ThreadPoolExecutor(threads) as pool:
        begun, cpu_begun = time.perf_counter(), time.process_time()
        size: int = sum(pool.map(fetch, items))
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
    return {"count": len(items), "bytes": size, "seconds": seconds, "cpu_s": cpu_s}


def main() -> int:
    """Read the specification, run it, print the outcome."""
    spec: Spec = json.load(sys.stdin)
    try:
        outcome = {"small": small, "large": large, "warm": warm}[spec["action"]](spec)
    except WrongBytes as error:
        print(json.dumps({"error": str(error)}))
        return WRONG_BYTES_EXIT
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
