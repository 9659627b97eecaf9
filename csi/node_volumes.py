"""The life of volumes on a node: which mounts there are for which calls, and what each call changes of them.

    stage     -> mount (kind staged)             -> unstage takes it away
    publish   -> bind of that mount              -> unpublish
    publish   -> mount (kind published) + bind   -> the last unpublish takes it away

A mount is made by the publish call where the stage call cannot know what it is to be: credentials of the pod
(`authSource: pod`, one mount for each identity), secrets that only the publish call brings, another group than that of
the stage (a mount has one), and inline volumes, which are not staged. Its name (`mount_key`) has in it all that two
pods must not share.

Nothing is mounted at the staging path, which the CSI specification leaves open ("MAY be staged"): before kubelet
unstages a volume it looks for mounts of the same device elsewhere (GetDeviceMountRefs), and our own place is one. It
would never call NodeUnstageVolume.

INVARIANTS: all calls for one volume that change its mounts are under its lock (`csi.node`); a mount of kind published
is made and released under the lock of its own name.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager

from cachefs.keeper.client import MountState
from csi.credentials import FRESH_S, CredentialFiles, Credentials
from csi.locks import CallLocks
from csi.node_keeper import PUBLISHED, STAGED, Keeper, Mounts, mount_key, target_label, targets
from csi.node_mounts import NodeMounts, NodeSettings, group_text
from csi.node_requests import ONE_POD, Volume
from csi.node_sizes import Sizes
from csi.status import Refused, already_exists, failed_precondition

log = logging.getLogger(__name__)

UNSETTLED = frozenset({"starting", "failed"})
"""A mount that was not ready in time goes on to be made, and who asks for it again waits for it. One whose worker
crashed too often gets another when somebody asks for it.
"""
WAIT_S = 10.0
"""For another call that makes or releases the same mount."""


class NodeVolumes:
    """Makes and takes away mounts. Any thread; calls BLOCK, and raise Refused, CachefsError and KeeperError."""

    def __init__(self, settings: NodeSettings, keeper: Keeper, sizes: Sizes) -> None:
        self._keeper = keeper
        self.files = CredentialFiles(settings.credentials_dir, settings.node_uid)
        self._mounts = NodeMounts(settings, keeper, self.files, sizes)
        self._making = CallLocks("mount")

    # -- stage -------------------------------------------------------------------------------------------------------

    def stage(self, volume: Volume, place: str, credentials: Credentials | None, left_s: float | None) -> None:
        """Stage a volume at `place`; without credentials only remember that it is."""
        mounts = self._keeper.look()
        staged = mounts.staged(volume.volume_id)
        if staged is not None:
            self._stage_again(staged, volume, place, credentials, left_s)
        elif credentials is None:
            self._note_stage(volume, place)
        else:
            key = mount_key(volume.volume_id, group=volume.group)
            labels = {"kind": STAGED, "stage": place, "mode": volume.mode}
            self._mounts.make(mounts, key, volume, credentials, mount_key(volume.volume_id), labels, left_s)

    def _stage_again(
        self, staged: MountState, volume: Volume, place: str, credentials: Credentials | None, left_s: float | None
    ) -> None:
        labels = staged.labels
        if labels["stage"] != place:
            raise failed_precondition(f"the volume is staged at {labels['stage']}: unstage it there first")
        same_group = labels.get("group", "") == group_text(volume.group)
        if staged.fingerprint != volume.fingerprint or labels.get("mode") != volume.mode or not same_group:
            raise already_exists(f"the volume is staged at {place} with other parameters, access mode or group")
        if credentials is not None:
            self._mounts.renew(staged, credentials)
        self._settle(staged, volume, left_s)

    def _note_stage(self, volume: Volume, place: str) -> None:
        name = mount_key(volume.volume_id)
        note = json.dumps({"stage": place, "fingerprint": volume.fingerprint, "mode": volume.mode})
        there = _note(self.files.stage(name))
        if there and there["stage"] != place:
            raise failed_precondition(f"the volume is staged at {there['stage']}: unstage it there first")
        if there and (there["fingerprint"], there["mode"]) != (volume.fingerprint, volume.mode):
            raise already_exists(f"the volume is staged at {place} with other parameters or access mode")
        self.files.note_stage(name, note)

    def unstage(self, volume_id: str, place: str) -> None:
        """Undo `stage`; a volume that is not staged there is fine."""
        mounts = self._keeper.look()
        name = mount_key(volume_id)
        staged, noted = mounts.staged(volume_id), _note(self.files.stage(name))
        here = (staged is not None and staged.labels["stage"] == place) or noted.get("stage") == place
        if here:
            held = _published(mounts, volume_id)
            if held:  # or kubelet's directories of that pod were removed by hand, and will never be unpublished
                self._keeper.reconcile()
                mounts = self._keeper.look()
                held = _published(mounts, volume_id)
            if held:
                raise failed_precondition(
                    f"the volume is still published at {held[0]}"
                    + (f" and {len(held) - 1} more places" if len(held) > 1 else "")
                    + ": call NodeUnpublishVolume first"
                )
        self._keeper.unbind(place)
        if here:
            for mount in mounts.of_volume(volume_id):
                self._mounts.release(mount)
            self.files.remove(name)

    # -- publish -----------------------------------------------------------------------------------------------------

    def fitting(self, volume: Volume, stage: str, mounts: Mounts) -> MountState | None:
        """Return the mount by which a volume is staged at `stage`; None for one that has no mount yet.

        Raises Refused (FAILED_PRECONDITION) when it is not staged there, (ALREADY_EXISTS) when it is another way.
        """
        staged = mounts.staged(volume.volume_id)
        noted = _note(self.files.stage(mount_key(volume.volume_id)))
        place = staged.labels["stage"] if staged is not None else noted.get("stage", "")
        if not place:
            raise failed_precondition("the volume is not staged on this node: call NodeStageVolume first")
        if place != stage:
            raise failed_precondition(f"the volume is staged at {place}, and not at {stage}")
        fingerprint = staged.fingerprint if staged is not None else noted["fingerprint"]
        if fingerprint != volume.fingerprint:
            raise already_exists(f"the volume is staged at {stage} with other parameters or mount flags")
        return staged

    def check_target(self, volume: Volume, key: str, target: str, readonly: bool, mounts: Mounts) -> None:
        """Refuse a target that is published in another way, or that would be one too many."""
        holder = mounts.holder(target)
        if holder is not None:
            known = holder.labels.get(target_label(target), _target_text(volume, readonly))
            if holder.key != key or known != _target_text(volume, readonly) or self._differs(holder, volume):
                raise already_exists(f"{target} is published already, as another volume, mode, group or identity")
        others = _excluded(mounts, volume, target)
        if others:
            self._keeper.reconcile()
            others = _excluded(self._keeper.look(), volume, target)
        if others:
            raise failed_precondition(
                f"the volume is published at {others[0]}, and its access mode (ReadWriteOncePod) allows one pod"
            )

    def _differs(self, mount: MountState, volume: Volume) -> bool:
        return mount.fingerprint != volume.fingerprint

    def publish(
        self, volume: Volume, key: str, name: str, credentials: Credentials | None, mounts: Mounts, left_s: float | None
    ) -> MountState | None:
        """See that the mount `key` is there for a target that comes; returns what was known of it. `name`: of its
        credential files.
        """
        mount = mounts.by_key(key)
        if mount is not None:
            if self._differs(mount, volume):
                raise already_exists("the volume is published on this node with other parameters or mount flags")
            if credentials is not None:
                self._mounts.renew(mount, credentials)
            self._settle(mount, volume, left_s)
            return mount
        if credentials is None:
            credentials = self._as_staged(volume, mounts)
        self._mounts.make(mounts, key, volume, credentials, name, {"kind": PUBLISHED, "mode": volume.mode}, left_s)
        return None

    def _settle(self, mount: MountState, volume: Volume, left_s: float | None) -> None:
        if mount.state in UNSETTLED:
            log.info("the mount of volume %s is %s: the keeper is asked for it again", volume.volume_id, mount.state)
            self._mounts.ask_again(mount, volume, left_s)

    def _as_staged(self, volume: Volume, mounts: Mounts) -> Credentials:
        """Return the credentials that a volume was staged with, for another mount of it."""
        staged = mounts.staged(volume.volume_id)
        identity = staged.labels.get("identity", "") if staged is not None else ""
        return Credentials(volume.spec.auth_source, identity, {})

    def bind(self, volume: Volume, key: str, target: str, readonly: bool, known: MountState | None) -> None:
        """Publish a mount at `target`."""
        label, text = target_label(target), _target_text(volume, readonly)
        if known is None or known.labels.get(label) != text:
            self._keeper.label(key, {label: text})
        self._keeper.bind(key, target)

    def using(self, key: str, target: str) -> AbstractContextManager[None]:
        """Return a context: the mount is not released while a publish call works on it."""
        return self._making.beside(key, target, wait_s=WAIT_S)

    def unpublish(self, volume_id: str, target: str) -> None:
        """Undo a publish; what is not published is fine."""
        mounts = self._keeper.look()
        holder = mounts.holder(target)
        if holder is not None and holder.labels.get("volume") != volume_id:
            raise failed_precondition(f"{target} is where volume {holder.labels.get('volume')} is published")
        self._keeper.unbind(target)
        if holder is not None:
            self._keeper.label(holder.key, {target_label(target): None})
        for mount in mounts.of_volume(volume_id):
            if mount.labels.get("kind") == PUBLISHED and set(targets(mount)) <= {target}:
                self._release_unused(mount)
            elif holder is not None and mount.key == holder.key:
                self.files.forget_writer(mount.labels["credentials"])

    def _release_unused(self, mount: MountState) -> None:
        try:
            with self._making.alone(mount.key):
                now = self._keeper.look().by_key(mount.key)
                if now is not None and not now.targets:
                    self._mounts.release(now)
        except Refused as refusal:
            log.debug("%s stays: %s", mount.key, refusal)  # a publish call is at work on it

    # -- at start ----------------------------------------------------------------------------------------------------

    def repair(self) -> None:
        """Have the keeper repair what is broken, and remove what nobody needs: once, before anything is changed."""
        repairs = self._keeper.reconcile()
        mounts = self._keeper.look()
        now = time.time()
        unused = [
            mount
            for mount in mounts.all
            if mount.labels.get("kind") == PUBLISHED and not mount.targets and now - mount.started_at > FRESH_S
        ]
        for mount in unused:
            self._mounts.release(mount)
        used = {mount.labels.get("credentials", "") for mount in mounts.all if mount not in unused}
        orphans = self.files.remove_orphans(used, now=now)
        log.info(
            "%d mounts are there; repaired %d, dropped %d, detached %d, released %d, removed %d sets of credentials",
            len(mounts.all) - len(unused), len(repairs.repaired), len(repairs.dropped), len(repairs.detached),
            len(unused), len(orphans),
        )  # fmt: skip


def _published(mounts: Mounts, volume_id: str) -> list[str]:
    return [path for mount in mounts.of_volume(volume_id) for path in targets(mount)]


def _excluded(mounts: Mounts, volume: Volume, target: str) -> list[str]:
    """Return where a volume is published that cannot be published at `target` as well: one of both is for one pod."""
    return [
        path
        for mount in mounts.of_volume(volume.volume_id)
        for path in targets(mount)
        if path != target and ONE_POD in (volume.mode, mount.labels.get(target_label(path), "").partition(" ")[0])
    ]


def _target_text(volume: Volume, readonly: bool) -> str:
    return f"{volume.mode} {'ro' if readonly else 'rw'}"


def _note(text: str) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {"stage", "fingerprint", "mode"} <= found.keys() else {}
