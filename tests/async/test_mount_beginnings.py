"""Files that readers begin are told to the agent: the first at once, the others in batches."""

from __future__ import annotations

import threading
from typing import cast

import trio

from cachefs.agent import messages
from cachefs.mount.beginnings import PAUSE_S, Beginnings
from cachefs.vfs.reading import MAX_BEGUN, ReadPath
from metadata.store import MetadataReader


async def test_the_first_is_told_at_once_and_the_others_together(autojump_clock: trio.abc.Clock) -> None:
    reads = ReadPath(cast("MetadataReader", None), None, "e", "b", 1 << 20)
    told: list[messages.Message] = []
    wanted = True
    reads.note_begun(1, 0)  # nobody wants to know yet
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Beginnings(reads, told.append, lambda: wanted).run)
        reads.note_begun(2, 0)
        await trio.sleep(PAUSE_S / 2)
        assert told == [messages.Begun(files=[(2, 0)])]
        for ino in (3, 4, 3):
            reader = threading.Thread(target=reads.note_begun, args=(ino, 5 << 20))
            reader.start()
            reader.join()  # not by an await: the clock would jump meanwhile
        await trio.sleep(PAUSE_S / 4)
        assert len(told) == 1
        await trio.sleep(PAUSE_S)
        assert told[1:] == [messages.Begun(files=[(3, 5), (4, 5)])]
        for ino in range(2 * MAX_BEGUN):
            reads.note_begun(ino, 0)
        await trio.sleep(PAUSE_S * 2)
        assert len(cast("messages.Begun", told[2]).files) == MAX_BEGUN
        wanted = False
        reads.note_begun(9, 0)
        await trio.sleep(PAUSE_S * 2)
        assert len(told) == 3
        nursery.cancel_scope.cancel()
