"""Copies of a part of a mount, as kubelet makes them for `subPath`: a bind of a directory or file within a target.

Nobody asks the keeper for them, so they are in no record. When a mount is lost and made anew, the same part of the new
one is bound over each of them, as with targets (`KeptMount.revive`). To find that part means to ask the file system,
which a child process does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from cachefs.keeper.binds import Ground
from cachefs.keeper.places import below
from cachefs.keeper.probing import Prober
from cachefs.mount import mountinfo
from cachefs.mount.journal import Journal
from cachefs.mount.mountinfo import Answer, Mount

FOLLOW_S = 30.0
"""The agent may have to start first, and names may have to be asked for."""


def copies_of(device: str, root: str) -> list[Mount]:
    """Return the copies below `root` of parts of the mount with this device number."""
    return [
        mount
        for mount in mountinfo.mounts()
        if mount.device == device and mount.root != "/" and mount.mountpoint.startswith(below(root))
    ]


def follow(copies: Iterable[Mount], place: str, ground: Ground, prober: Prober, journal: Journal) -> None:
    """Bind the parts of the mount at `place`, which is served, over its lost copies. Returns at once."""
    for copy in copies:
        act = functools.partial(ground.bind_part, f"{place}{copy.root}", copy)
        prober.do(act, functools.partial(_say, copy, journal), FOLLOW_S)


def _say(copy: Mount, journal: Journal, answer: Answer) -> None:
    if answer is Answer.ALIVE:
        journal.info(f"{copy.root} is bound to {copy.mountpoint} again")
    else:
        journal.warning(f"{copy.root} cannot be bound to {copy.mountpoint} again ({answer.value})")
