"""The files that every system reads: many small ones in one directory and a large one, with the sums of every byte.

The bytes are random (no system gains from compression) and come from a seed, so runs are comparable. Sums: one xxh3 per
small file, one per MiB of the large file for sequential reading, one per page for random reading.
"""

from __future__ import annotations

import array
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from bench.reader import CHUNK, PAGE

if TYPE_CHECKING:
    from bench.s3_server import S3Server

SMALL_DIRECTORY = "small"
LARGE_NAME = "large.bin"
SMALL_BYTES = 110_000
_SEED = 20261122


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A data set on the local disk; `root` holds the files as they will appear below every mount point."""

    root: Path
    manifest: Path
    small_count: int
    small_bytes: int
    large_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return self.small_count * self.small_bytes + self.large_bytes

    def names(self) -> Iterator[str]:
        """The paths of all files, relative to the root."""
        for index in range(self.small_count):
            yield f"{SMALL_DIRECTORY}/{small_name(index)}"
        yield LARGE_NAME


def small_name(index: int) -> str:
    """Return the name of the small file `index`."""
    return f"sample_{index:06d}.bin"


def generate(directory: Path, *, small_count: int, large_bytes: int, small_bytes: int = SMALL_BYTES) -> Dataset:
    """Write the files and their manifest below `directory` (`large_bytes` is rounded up to whole MiB)."""
    root = directory / "files"
    (root / SMALL_DIRECTORY).mkdir(parents=True)
    rng = np.random.default_rng(_SEED)
    names, sums = [], []
    for index in range(small_count):
        content = rng.bytes(small_bytes)
        names.append(small_name(index))
        sums.append(xxhash.xxh3_64_intdigest(content))
        (root / SMALL_DIRECTORY / names[-1]).write_bytes(content)
    chunk_sums, page_sums = array.array("Q"), array.array("Q")
    chunks = -(-large_bytes // CHUNK)
    with (root / LARGE_NAME).open("wb") as large:
        for _ in range(chunks):
            content = rng.bytes(CHUNK)
            large.write(content)
            chunk_sums.append(xxhash.xxh3_64_intdigest(content))
            page_sums.extend(xxhash.xxh3_64_intdigest(content[at : at + PAGE]) for at in range(0, CHUNK, PAGE))
    (directory / "chunk_sums").write_bytes(chunk_sums.tobytes())
    (directory / "page_sums").write_bytes(page_sums.tobytes())
    manifest = directory / "manifest.json"
    manifest.write_text(
        json.dumps(
            {
                "small": {"names": names, "sizes": [small_bytes] * small_count, "sums": sums},
                "large": {"size": chunks * CHUNK, "chunk_sums": "chunk_sums", "page_sums": "page_sums"},
            }
        )
    )
    return Dataset(
        root=root,
        manifest=manifest,
        small_count=small_count,
        small_bytes=small_bytes,
        large_bytes=chunks * CHUNK,
    )


def upload(dataset: Dataset, server: S3Server, bucket: str) -> None:
    """Store the files as objects whose keys are their paths."""

    def small_objects() -> Iterator[tuple[str, bytes]]:
        for name in dataset.names():
            if name != LARGE_NAME:
                yield name, (dataset.root / name).read_bytes()

    server.put_many(bucket, small_objects())
    server.client().upload_file(str(dataset.root / LARGE_NAME), bucket, LARGE_NAME)
