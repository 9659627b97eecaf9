"""What the keeper of this node has mounted, as the node service sees it: mounts, their labels, and who is to blame.

The plugin remembers nothing by itself: what it has to know of a mount after a restart is in the labels that the keeper
keeps with it. `Keeper` is the keeper's client with refusals that name the pod to look at; `Mounts` is one look at all
mounts.

    volume         id of the volume                kind        staged, or published: it ends with its last target
    stage          where it is staged              group       group of the files, or empty
    mode           access mode of the stage call   auth        authSource
    credentials    name of its credential files    identity    whose they are (a hash)
    parameters     parameters and flags as JSON    environment variables of the mount as JSON (paths, never keys)
    capacity       bytes, as far as known          warm        how far the warm-up is (`csi.node_warmup`)
    target.<hash>  access mode and readonly of one target
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cachefs.keeper.client import KeeperClient, KeeperError, KeeperStatus, MountState, Repairs
from csi.status import unavailable

STAGED, PUBLISHED = "staged", "published"
UNAVAILABLE = "unavailable"
LOOK_S = 8.0
"""For a look, with which nearly every call begins: Probe and statistics have to be answered within ten seconds."""


def target_label(target: str) -> str:
    """Return the name of the label that says how `target` was published."""
    return f"target.{hashlib.sha256(target.encode(errors='surrogateescape')).hexdigest()[:16]}"


def mount_key(volume_id: str, identity: str = "", group: int | None = None) -> str:
    """Return the name of a mount. Whatever two publishes must not share is part of it."""
    parts = (volume_id, identity, "" if group is None else str(group))
    return f"v-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


class Mounts:
    """All mounts of the node at one moment, without those that are leaving: they only serve open files."""

    def __init__(self, status: KeeperStatus) -> None:
        self.all = tuple(mount for mount in status.mounts if mount.state != "unmounting")
        self.has_node_service = status.runner is not None and status.runner.connected

    def of_volume(self, volume_id: str) -> list[MountState]:
        """Return the mounts of a volume."""
        return [mount for mount in self.all if mount.labels.get("volume") == volume_id]

    def by_key(self, key: str) -> MountState | None:
        """Return the mount with this name."""
        return next((mount for mount in self.all if mount.key == key), None)

    def staged(self, volume_id: str) -> MountState | None:
        """Return the mount by which a volume is staged."""
        return next((mount for mount in self.of_volume(volume_id) if mount.labels.get("kind") == STAGED), None)

    def holder(self, path: str) -> MountState | None:
        """Return the mount that is bound to `path`."""
        return next((mount for mount in self.all if any(target.path == path for target in mount.targets)), None)


def targets(mount: MountState) -> list[str]:
    """Return where a mount is published."""
    return [target.path for target in mount.targets]


class Keeper:
    """The keeper's client, for people: who does not answer is named. BLOCKS; any thread."""

    def __init__(self, client: KeeperClient, node_id: str) -> None:
        self._client = client
        self._node_id = node_id

    def look(self) -> Mounts:
        """Return what is mounted. Raises Refused (UNAVAILABLE)."""
        with self._named():
            return Mounts(self._client.status(LOOK_S))

    def mount(
        self,
        key: str,
        plan: Mapping[str, Any],
        environment: Mapping[str, str],
        fingerprint: str,
        labels: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        """Make a mount, and return when it serves. Raises Refused (UNAVAILABLE), KeeperError."""
        with self._named():
            self._client.mount(
                key, plan, environment=environment, fingerprint=fingerprint, labels=labels, timeout_s=timeout_s
            )

    def unmount(self, key: str) -> bool:
        """Take a mount away that has no targets any more. Raises Refused (UNAVAILABLE), KeeperError."""
        with self._named():
            return self._client.unmount(key)

    def bind(self, key: str, target: str) -> None:
        """Bind a mount to `target`, read-only. Raises Refused (UNAVAILABLE), KeeperError."""
        with self._named():
            self._client.bind(key, target, read_only=True)

    def unbind(self, target: str) -> bool:
        """Take away what is bound to `target`. Raises Refused (UNAVAILABLE), KeeperError."""
        with self._named():
            return self._client.unbind(target)

    def label(self, key: str, labels: Mapping[str, str | None]) -> None:
        """Change labels. Raises Refused (UNAVAILABLE), KeeperError."""
        with self._named():
            self._client.label(key, labels)

    def reconcile(self) -> Repairs:
        """Repair what is broken. Raises Refused (UNAVAILABLE), KeeperError."""
        with self._named():
            return self._client.reconcile()

    def node_service_missing(self) -> Exception:
        """Return what to raise when the keeper has nobody who starts workers."""
        return unavailable(
            f"the node service of node {self._node_id} is not running: look at its cachefs-node pod "
            f"(kubectl get pods -A -o wide --field-selector spec.nodeName={self._node_id})"
        )

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except KeeperError as error:
            if error.kind != UNAVAILABLE:
                raise
            raise unavailable(
                f"{error.text} (node {self._node_id}: look at its cachefs-keeper and cachefs-node pods)"
            ) from error
