"""The directory `.cachefs` in the root of a mount: figures and settings to read, and doors for a plan and a log.

The kernel opens files of a mount without asking (see `cachefs.fuse.channel`), so there is no open(2) here at which a
text could be made, and no close(2) at which one could be taken. So these files follow the rule of all others:

* A text (`stats`, `config`) is made when its NAME is looked up, and gets an inode number of its own: one inode is one
  version. Its size is true, the kernel may keep its pages, and whoever holds it open sees one moment.
* What is a stream (`plan`, `accesslog`) is a symbolic link to a pipe in the runtime directory, where open and close
  mean something. So a mount that is read-only has a `plan` that can be written.

Nothing of it is in a listing of the root, or in the metadata. An object of that name is hidden.

INVARIANT: numbers are below `END`, where no object's inode is (`metadata.volume`), and none is used for two texts.
"""

from __future__ import annotations

import logging
import stat
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cachefs.types import ROOT_INO, Ino
from cachefs.vfs.attributes import FOREVER_S, AttributeRules, Attributes

log = logging.getLogger(__name__)

NAME = b".cachefs"
DIRECTORY = Ino(16)
STATS, CONFIG, PLAN, ACCESS_LOG = b"stats", b"config", b"plan", b"accesslog"
NUMBERS = {STATS: Ino(17), CONFIG: Ino(18), PLAN: Ino(19), ACCESS_LOG: Ino(20)}
"""Of links, and of texts in a listing: a look-up gives those others. The kernel knows them: never to be changed."""
FIRST_TEXT = 1 << 20
END = 1 << 32
KEPT_TEXTS = 64
FRESH_S = 0.1
"""The kernel looks a name up twice when its number has changed: the second time it finds the same."""
MODE = 0o400

MakeText = Callable[[], Awaitable[bytes]]


@dataclass(slots=True)
class _Text:
    content: bytes
    mtime_ns: int


class VirtualDirectory:
    """Names, attributes and contents of `.cachefs`. Trio thread; `content` in any."""

    def __init__(
        self,
        texts: Mapping[bytes, MakeText],
        links: Mapping[bytes, bytes],
        rules: AttributeRules,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`texts`: what makes each of them; `links`: where each leads."""
        self._makers = dict(texts)
        self._links = dict(links)
        self._rules = rules
        self._clock_ns = clock_ns
        self._began_ns = clock_ns()
        self._texts: OrderedDict[int, _Text] = OrderedDict()
        self._newest: dict[bytes, int] = {}
        # Another worker of this mount begins elsewhere: the kernel may still have pages of the last one's numbers.
        self._next = FIRST_TEXT + (clock_ns() >> 24) % (END - 2 * FIRST_TEXT)
        self._entries = {name: NUMBERS[name] for name in NUMBERS if name in self._makers or name in self._links}
        self.on_first_use: Callable[[], object] | None = None
        """Called once, when somebody looks for the directory."""

    @staticmethod
    def has(ino: int) -> bool:
        """Whether an inode number is one of these."""
        return ROOT_INO < ino < END

    async def lookup(self, parent: Ino, name: bytes) -> tuple[Attributes | None, float] | None:
        """Answer a name as `FileSystem.lookup` does; None: it is not one of these."""
        if parent == ROOT_INO and name == NAME:
            if self.on_first_use is not None:
                first, self.on_first_use = self.on_first_use, None
                first()
            return self._directory(), FOREVER_S
        if parent != DIRECTORY:
            return None
        if name in self._links:
            return self._entry(name), FOREVER_S
        if name in self._makers:
            return await self._text(name), 0.0
        return None, 0.0

    def attributes(self, ino: Ino) -> Attributes | None:
        """Return the attributes of one of these; None: it is not known (any more)."""
        if ino == DIRECTORY:
            return self._directory()
        for name, entry in self._entries.items():
            if entry == ino:
                return self._entry(name)
        text = self._texts.get(ino)
        return None if text is None else self._file(ino, len(text.content), text.mtime_ns)

    def entries(self) -> list[tuple[bytes, Attributes]]:
        """Return what is in the directory. The kernel must not keep these: a look-up gives other numbers."""
        return [(name, self._entry(name)) for name in self._entries]

    def target(self, ino: Ino) -> bytes | None:
        """Return where a link leads; None: it is none."""
        name = next((name for name, entry in self._entries.items() if entry == ino), b"")
        return self._links.get(name)

    def content(self, ino: int, offset: int, size: int) -> bytes | None:
        """Return a part of a text; None: it is not known (any more). Any thread."""
        text = self._texts.get(ino)
        return None if text is None else text.content[offset : offset + size]

    async def _text(self, name: bytes) -> Attributes:
        newest = self._texts.get(self._newest.get(name, 0))
        if newest is None or not 0 <= self._clock_ns() - newest.mtime_ns < FRESH_S * 1e9:
            newest = _Text(await self._makers[name](), self._clock_ns())
            self._next = self._next + 1 if self._next + 1 < END else FIRST_TEXT
            self._newest[name] = self._next
            self._texts[self._next] = newest
            if len(self._texts) > KEPT_TEXTS:
                self._texts.popitem(last=False)
        return self._file(Ino(self._newest[name]), len(newest.content), newest.mtime_ns)

    def _file(self, ino: Ino, size: int, mtime_ns: int) -> Attributes:
        return Attributes(ino, stat.S_IFREG | MODE, size, mtime_ns, 1, self._rules.uid, self._rules.gid)

    def _entry(self, name: bytes) -> Attributes:
        ino = self._entries[name]
        if name not in self._links:
            return self._file(ino, 0, self._began_ns)
        size, mode = len(self._links[name]), stat.S_IFLNK | 0o777
        return Attributes(ino, mode, size, self._began_ns, 1, self._rules.uid, self._rules.gid)

    def _directory(self) -> Attributes:
        return Attributes(DIRECTORY, stat.S_IFDIR | 0o555, 0, self._began_ns, 1, self._rules.uid, self._rules.gid)
