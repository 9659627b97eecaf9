"""What `cachefs doctor` says of the keeper of a Kubernetes node, and of the mounts that it has.

INVARIANT: as in `cachefs.cli.checks`, no mount is touched. Nobody is told to unmount what a keeper has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cachefs.cli import kept_mounts, output
from cachefs.mount.mountinfo import Mount

_OWN_PLACE = re.compile(r"/.*/(?:plugins|cachefs)/[^/]+/mounts/[a-z0-9-]{1,64}")
"""Where a keeper mounts (`cachefs.keeper.places`)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is right (`remedy` is empty) or wrong with the keeper."""

    text: str
    remedy: str = ""


def has_keeper(runtime_dir: str) -> bool:
    """Return whether a keeper makes the mounts of this node."""
    return kept_mounts.find_socket(runtime_dir) is not None


def mounts_for(runtime_dir: str) -> bool:
    """Return whether a keeper makes the mounts that this process needs, which has no right to and needs none."""
    return os.geteuid() != 0 and has_keeper(runtime_dir)


def look(runtime_dir: str) -> Iterator[Finding]:
    """Yield what there is to say, nothing where there is no keeper."""
    socket_path = kept_mounts.find_socket(runtime_dir)
    if socket_path is None:
        return
    keeper, mounts = kept_mounts.ask_keeper(socket_path)
    if keeper["problem"] is not None:
        what, _, remedy = str(keeper["problem"]).rpartition(": ")
        yield Finding(what, remedy)
    else:
        service = keeper["node_service"]
        told = f"version {keeper['version']}, node service {service['pid']} (version {service['version']})"
        yield Finding(f"{told}, {output.count(len(mounts))} mounts")
    for mount in mounts:
        if mount.state in ("failed", "waiting"):
            why = f" ({mount.last_crash})" if mount.last_crash else ""
            text = f"{mount.key} of volume {mount.labels.get('volume', '-')} is {mount.state}{why}"
            yield Finding(output.plain(text), "look at the logs of the cachefs-node pod of this node")


def kept(runtime_dir: str, mounted: Iterable[Mount]) -> set[str]:
    """Return where the keeper's mounts are, and everything that is bound from them (a subPath, too).

    While the keeper does not answer they are known by their place.
    """
    socket_path = kept_mounts.find_socket(runtime_dir)
    if socket_path is None:
        return set()
    keeper, mounts = kept_mounts.ask_keeper(socket_path)
    found = list(mounted)
    if keeper["version"] is None:
        devices = {each.device for each in found if _OWN_PLACE.fullmatch(each.mountpoint)}
    else:
        known = {mount.mountpoint for mount in mounts}
        devices = {each.device for each in found if each.mountpoint in known}
    return {each.mountpoint for each in found if each.device in devices}
