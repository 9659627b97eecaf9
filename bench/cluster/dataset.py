"""The objects that all nodes of a cluster read: large ones as shards, small ones as images, with sums of each MiB."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bench.s3_server import S3Server

CHUNK = 1 << 20
_UPLOAD_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much of what."""

    large_files: int
    large_bytes: int
    small_files: int = 0
    small_bytes: int = 100_000

    @property
    def total_bytes(self) -> int:
        """Of the whole dataset."""
        return self.large_files * self.large_bytes + self.small_files * self.small_bytes

    @property
    def sizes(self) -> dict[str, int]:
        """Return the size of every object by its key."""
        large = {f"shards/{at:04}.tar": self.large_bytes for at in range(self.large_files)}
        return large | {f"images/{at:05}.jpg": self.small_bytes for at in range(self.small_files)}


def upload(server: S3Server, bucket: str, shape: Shape, manifest: Path, seed: str = "cluster") -> None:
    """Fill a bucket, and write down what is in it for `bench.cluster.reader`. One object at a time is in memory."""
    files: list[dict[str, Any]] = []

    def objects() -> Iterator[tuple[str, bytes]]:
        for name, size in shape.sizes.items():
            body = memoryview(random.Random(f"{seed}/{name}").randbytes(size))
            sums = [xxhash.xxh3_64_intdigest(body[at : at + CHUNK]) for at in range(0, size, CHUNK)]
            files.append({"name": name, "size": size, "sums": sums})
            yield name, bytes(body)

    server.put_many(bucket, objects(), threads=_UPLOAD_THREADS)
    manifest.write_text(json.dumps({"files": files}))
