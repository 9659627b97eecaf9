"""The files of the epochs: one directory of small files, the same number of them in class folders, one large file.

The file of number i has the same bytes in the directory and in the tree; all others differ, so a mix-up shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import dataset as datasets
from bench.dataset import SMALL_DIRECTORY, Dataset, small_name

if TYPE_CHECKING:
    from bench.s3_server import S3Server

TREE_DIRECTORY = "tree"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochFiles(Dataset):
    """The data set; `small_count` files in the directory, and as many in `folders` class folders."""

    folders: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return 2 * self.small_count * self.small_bytes + self.large_bytes

    def names(self) -> Iterator[str]:
        """The paths of all files, relative to the root."""
        yield from self.tree()
        yield from Dataset.names(self)

    def directory(self) -> list[str]:
        """The paths of the one directory, in the order of its listing."""
        return [f"{SMALL_DIRECTORY}/{small_name(index)}" for index in range(self.small_count)]

    def tree(self) -> list[str]:
        """The paths of the class folders, in the order of their listings."""
        each = -(-self.small_count // self.folders)
        return [
            f"{TREE_DIRECTORY}/class_{index // each:03d}/{small_name(index % each)}"
            for index in range(self.small_count)
        ]

    def sums(self) -> Path:
        """The file that `bench.epochs.reader` takes: the sum of each small file, by its number."""
        return self.manifest.parent / "sums.json"


def generate(directory: Path, *, small_count: int, folders: int, large_bytes: int) -> EpochFiles:
    """Write the files below `directory`."""
    plain = datasets.generate(directory, small_count=small_count, large_bytes=large_bytes)
    files = EpochFiles(
        root=plain.root,
        manifest=plain.manifest,
        small_count=small_count,
        small_bytes=plain.small_bytes,
        large_bytes=plain.large_bytes,
        folders=folders,
    )
    for flat, foldered in zip(files.directory(), files.tree(), strict=True):
        (files.root / foldered).parent.mkdir(parents=True, exist_ok=True)
        os.link(files.root / flat, files.root / foldered)
    listed = json.loads(plain.manifest.read_bytes())["small"]["sums"]
    files.sums().write_text(json.dumps(listed))
    return files


def upload(files: EpochFiles, server: S3Server, bucket: str) -> None:
    """Store the files as objects whose keys are their paths."""
    datasets.upload(files, server, bucket)
