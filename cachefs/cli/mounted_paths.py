"""From a path that a person typed to a mount of cachefs and a path in it, without asking the mount anything.

Links lead into mounts, but there are none inside of one (a bucket has none), so a path is followed with readlink(2) up
to the mount point and is only text from there on. A mount that hangs is found as quickly as any other.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from cachefs.cli.output import plain
from cachefs.errors import UsageError
from cachefs.mount.mountinfo import Mount, mounts
from cachefs.runtime import RuntimeDir, mount_id

MAX_LINKS = 40


class Place(NamedTuple):
    """A path in a mount."""

    mount_id: str
    mountpoint: str
    cache_dir: str
    """Of the agent that serves it."""
    path: bytes
    """Relative to the root of what is mounted; b"" is the root."""


class Mounts:
    """The mounts that there are, as one look at them shows."""

    def __init__(self, runtime: RuntimeDir) -> None:
        self._states = {state["mount_id"]: state for state in runtime.mount_states() if "mount_id" in state}
        self._mounts: dict[str, Mount] = {mount.mountpoint: mount for mount in mounts()}  # the topmost one of each
        self._known: dict[str, Place | None] = {}

    def locate(self, typed: str) -> Place:
        """Return where a path is. Raises UsageError with a line for a person."""
        above, rest = self._mount_of(os.path.join(os.getcwd(), typed) if not os.path.isabs(typed) else typed)
        if above is None:
            raise UsageError(f"{plain(typed)} is not in a mount of cachefs")
        place = self._known.get(above)
        if above not in self._known:
            place = self._known[above] = self._place(self._mounts[above])
        if place is None:
            raise UsageError(
                f"{plain(above)} is a mount of cachefs that this runtime directory does not know (see --runtime-dir)"
            )
        inside = b"/".join(os.fsencode(part) for part in rest)
        return place._replace(path=b"/".join(part for part in (place.path, inside) if part))

    def _place(self, mount: Mount) -> Place | None:
        """Return the root of a mount: the one that was made by this name, or another name of the same one (bind)."""
        names = [mount.mountpoint]
        names += [other.mountpoint for other in self._mounts.values() if other.device == mount.device]
        for name in names:
            state = self._states.get(mount_id(name))
            if state is not None and state.get("mountpoint") == name:
                root = os.fsencode(mount.root.strip("/"))
                return Place(state["mount_id"], name, str(state.get("cache_dir", "")), root)
        return None

    def _mount_of(self, path: str) -> tuple[str | None, list[str]]:
        """Return the mount point of cachefs that a path leads to, if it does, and the names that are left."""
        waiting = path.split("/")[::-1]
        here, links = "/", 0
        found: str | None = None
        rest: list[str] = []
        while waiting:
            name = waiting.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if rest:
                    rest.pop()
                else:
                    here, found = os.path.dirname(here), None
                continue
            if found is not None:
                rest.append(name)
                continue
            there = os.path.join(here, name)
            mount = self._mounts.get(there)
            target = None if mount is not None else _link(there)
            if target is not None:
                links += 1
                if links > MAX_LINKS:
                    return None, []
                waiting += target.split("/")[::-1]
                here = "/" if target.startswith("/") else here
                continue
            here = there
            if mount is not None and mount.is_cachefs:
                found = there
        return found, rest


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
