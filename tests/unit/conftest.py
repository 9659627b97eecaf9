"""Metadata of a store whose root was listed once. What the store holds is up to the module: its fixture `store`.

A module with a `clock` or a `writer` of its own overrides ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO
from metadata.store import MetadataWriter
from tests.support.tree import Clock, list_whole, writer_at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def writer(tmp_path: Path, store: MemoryStore, clock: Clock) -> Iterator[MetadataWriter]:
    with writer_at(tmp_path / "volume") as opened:
        list_whole(opened, store, ROOT_INO, clock)
        yield opened
