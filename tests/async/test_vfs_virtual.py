"""`.cachefs` without a mount: each text has a number of its own."""

from __future__ import annotations

import stat

from cachefs.config import Config, FuseConfig
from cachefs.mount.control_files import settings_text, stats_text
from cachefs.types import ROOT_INO, Ino
from cachefs.vfs.attributes import AttributeRules
from cachefs.vfs.virtual import CONFIG, DIRECTORY, END, FIRST_TEXT, KEPT_TEXTS, PLAN, STATS, VirtualDirectory
from tests.support.tree import Clock


class Rig:
    def __init__(self) -> None:
        self.made = 0
        self.clock = Clock()
        rules = AttributeRules.create(FuseConfig(), 7, 8)
        self.directory = VirtualDirectory({STATS: self.text, CONFIG: self.text}, {PLAN: b"/run/x"}, rules, self.clock)

    async def text(self) -> bytes:
        self.made += 1
        return b"text %d\n" % self.made

    async def look(self, name: bytes, parent: Ino = DIRECTORY) -> Ino | None:
        answer = await self.directory.lookup(parent, name)
        assert answer is not None
        return None if answer[0] is None else answer[0].ino


async def test_each_look_up_is_a_version() -> None:
    rig = Rig()
    assert await rig.look(b".cachefs", ROOT_INO) == DIRECTORY
    assert await rig.directory.lookup(ROOT_INO, b"other") is None
    assert await rig.directory.lookup(Ino(END + 5), b".cachefs") is None
    first = await rig.look(STATS)
    assert first is not None
    assert await rig.look(STATS) == first, "the kernel looks twice"
    rig.clock.now_ns += 10**9
    second = await rig.look(STATS)
    assert second not in (first, None)
    assert rig.directory.content(first, 0, 100) == b"text 1\n"
    assert rig.directory.content(first, 5, 1) == b"1"
    assert rig.directory.content(first, 50, 10) == b""
    attributes = rig.directory.attributes(first)
    assert attributes is not None
    assert (attributes.size, attributes.uid, attributes.gid) == (7, 7, 8)
    assert FIRST_TEXT <= first < END
    for _ in range(KEPT_TEXTS + 1):
        rig.clock.now_ns += 10**9
        await rig.look(CONFIG)
    assert rig.directory.content(first, 0, 1) is None, "bounded"
    assert rig.directory.attributes(first) is None


async def test_entries_and_links() -> None:
    rig = Rig()
    listed = dict(rig.directory.entries())
    assert set(listed) == {STATS, CONFIG, PLAN}
    assert rig.made == 0, "a listing makes no text"
    plan = await rig.look(PLAN)
    assert plan == listed[PLAN].ino
    assert rig.directory.target(plan) == b"/run/x"
    assert rig.directory.target(listed[STATS].ino) is None
    assert stat.S_ISLNK(listed[PLAN].mode)
    assert rig.directory.attributes(DIRECTORY) is not None
    assert await rig.look(b"nothing") is None
    assert not VirtualDirectory.has(ROOT_INO)
    assert not VirtualDirectory.has(END)


async def test_numbers_of_another_worker_are_others() -> None:
    first = await Rig().look(STATS)
    later = Rig()
    later.clock.now_ns += 60 * 10**9
    again = VirtualDirectory({STATS: later.text}, {}, AttributeRules.create(FuseConfig(), 0, 0), later.clock)
    answer = await again.lookup(DIRECTORY, STATS)
    assert answer is not None
    assert answer[0] is not None
    assert answer[0].ino != first


async def test_texts_without_an_agent() -> None:
    text = stats_text("/nonexistent/socket", "id", {"fuse_reads": 5.0}).decode()
    assert "mount.counters.fuse_reads 5\n" in text
    assert "agent.error" in text
    assert b"metadata-ttl = 60.0\n" in settings_text(Config())
