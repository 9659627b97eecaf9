"""Copies of a part of a mount, as kubelet makes them for `subPath`: a bind of a directory or file within a target.

Nobody asks the keeper for them, so they are in no record. When a mount is lost and made anew, the same part of the new
one is bound over each of them, as with targets (`KeptMount.revive`). To find that part means to ask the file system,
which a child process does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

from cachefs.keeper.binds import Ground
from cachefs.keeper.places import below
from cachefs.keeper.probing import Prober
from cachefs.mount import mountinfo
from cachefs.mount.journal import Journal
from cachefs.mount.mountinfo import Answer

FOLLOW_S = 30.0
"""The agent may have to start first, and names may have to be asked for."""


class Copy(NamedTuple):
    """One of them."""

    target: str
    part: str
    """Its path within the mount."""
    read_only: bool


def copies_of(device: str, root: str) -> list[Copy]:
    """Return the copies below `root` of parts of the mount with this device number."""
    return [
        Copy(mount.mountpoint, mount.root.strip("/"), "ro" in mount.options.split(","))
        for mount in mountinfo.mounts()
        if mount.device == device and mount.root != "/" and mount.mountpoint.startswith(below(root))
    ]


def follow(copies: Iterable[Copy], place: str, ground: Ground, prober: Prober, journal: Journal) -> None:
    """Bind the parts of the mount at `place`, which is served, over its lost copies. Returns at once."""
    for copy in copies:
        act = functools.partial(ground.bind_part, f"{place}/{copy.part}", copy.target, read_only=copy.read_only)
        prober.do(act, functools.partial(_say, copy, journal), FOLLOW_S)


def _say(copy: Copy, journal: Journal, answer: Answer) -> None:
    if answer is Answer.ALIVE:
        journal.info(f"/{copy.part} is bound to {copy.target} again")
    else:
        journal.warning(f"/{copy.part} cannot be bound to {copy.target} again ({answer.value})")
