"""Numbered files: `shard-7.tar`, `shard-8.tar`, and what comes next is `shard-9.tar`.

Numbers of one width are in the order of the listing anyway, and the streams of a `Folder` see them. Here are those of
different widths: a listing has `shard-10` before `shard-2`. The last number in a name is the position in `streams`, so
workers who take every n-th shard are understood as they are in listings.

INVARIANT: at most `FAMILIES` kinds of names for each directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cachefs.prefetch.streams import Stream, Streams

FAMILIES = 4
_NUMBERED = re.compile(rb"(.*?)(?<![0-9])(0|[1-9][0-9]{0,8})([^0-9]*)", re.DOTALL)


class Shards:
    """The numbered files of one directory whose numbers are written without zeros before them."""

    __slots__ = ("_families",)

    def __init__(self) -> None:
        self._families: dict[tuple[bytes, bytes], Streams] = {}

    def note(self, name: bytes, *, proposed: bool) -> None:
        """A reader began a file of this name."""
        match = _NUMBERED.fullmatch(name)
        if match is None:
            return
        family = (match[1], match[3])
        streams = self._families.get(family)
        if streams is None:
            if len(self._families) >= FAMILIES:
                del self._families[next(iter(self._families))]
            streams = self._families[family] = Streams()
        streams.note(int(match[2]), proposed=proposed)

    def wanted(self) -> Iterator[tuple[bytes, Stream]]:
        """Give the names that come next, each once, and who wants them."""
        for (before, behind), streams in self._families.items():
            for stream in streams.trusted():
                while (number := stream.peek()) is not None:
                    stream.advance()
                    yield before + str(number).encode() + behind, stream
