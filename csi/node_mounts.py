"""Makes the mounts of a node and takes them away, each with the files of its credentials.

Before a mount is made the agent of the node looks whether the bucket answers, so that wrong keys are a clear refusal
within seconds and no mount that fails later. The plugin never starts an agent: that is the node service's.

INVARIANT: credential files are there before a mount and go after it. A try that failed leaves none behind.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cachefs import errors
from cachefs.agent import launch
from cachefs.config import Config
from cachefs.keeper.client import MountState
from cachefs.keeper.places import own_places
from cachefs.mount.launch import make_plan
from cachefs.runtime import mount_id
from csi import mount_flags
from csi.credentials import CredentialFiles, Credentials
from csi.node_keeper import Keeper, Mounts
from csi.node_requests import Volume
from csi.node_sizes import Sizes
from csi.parameter_table import AuthSource
from csi.parameters import VolumeSpec, parse

log = logging.getLogger(__name__)

CHECK_S = 20.0
PING_S = 2.0
ALIVE_S = 5.0
"""For a sign of life before the agent is asked for more, which may wait for a bucket."""
LEAD_S = 5.0
MOUNT_S = 60.0
MARGIN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What the node service has to know of its node."""

    node_id: str
    config: Config
    """Of the node service's agent: directories, tiers, peers."""
    credentials_dir: str = "/run/cachefs/credentials"
    node_uid: int = 65532
    """Who agent and workers run as."""
    kubelet_dir: str = "/var/lib/kubelet"
    driver_name: str = "cachefs.csi.k8s.io"
    zone: str = ""
    max_volumes: int = 0
    """0: Kubernetes decides."""
    inline_auth: frozenset[AuthSource] = frozenset(AuthSource)
    """What inline volumes, which everybody writes who may make pods, may say as authSource."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of the plugin: only its proxies are looked at, for requests to buckets."""

    def own_place(self, key: str) -> str:
        """Return where the keeper mounts `key`."""
        return f"{own_places(self.kubelet_dir.rstrip('/') or '/', self.driver_name)}/{key}"


class NodeMounts:
    """Makes and releases mounts. Any thread; calls BLOCK, and raise Refused, CachefsError and KeeperError."""

    def __init__(self, settings: NodeSettings, keeper: Keeper, files: CredentialFiles, sizes: Sizes) -> None:
        self._settings = settings
        self._keeper = keeper
        self._files = files
        self._sizes = sizes
        # The plugin's own keys, if it has any, are nobody's business here.
        self._proxies = {name: text for name, text in settings.environment.items() if name.lower().endswith("_proxy")}

    def make(
        self, mounts: Mounts, key: str, volume: Volume, credentials: Credentials, name: str,
        labels: Mapping[str, str], left_s: float | None,
    ) -> None:  # fmt: skip
        """Make a mount and return when it serves. What was written for a try that failed is removed."""
        if not mounts.has_node_service:
            raise self._keeper.node_service_missing()
        environment = credentials.environment(self._files.directory(name))
        size = self._sizes.now(volume.volume_id, volume.spec.capacity_bytes)
        all_labels = {**labels, **_labels(volume, credentials, name, environment), "capacity": str(size)}
        self._files.write(name, credentials, now=time.time())
        try:
            self._mount(key, volume, credentials.identity, environment, all_labels, left_s)
        except BaseException:
            self._take_back(name, key)
            raise

    def ask_again(self, mount: MountState, volume: Volume, left_s: float | None) -> None:
        """Return when a mount serves that is being made, or that has failed: that one gets another worker."""
        labels = mount.labels
        environment: dict[str, str] = json.loads(labels["environment"])
        self._mount(mount.key, volume, labels.get("identity", ""), environment, labels, left_s)

    def _mount(
        self, key: str, volume: Volume, identity: str, environment: Mapping[str, str],
        labels: Mapping[str, str], left_s: float | None,
    ) -> None:  # fmt: skip
        config = self._config(volume.spec, identity, volume.group)
        deadline = time.monotonic() + (MOUNT_S if left_s is None else max(1.0, min(MOUNT_S, left_s - MARGIN_S)))
        place = self._settings.own_place(key)
        mounted_at_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        plan = make_plan(config, place, flags=volume.spec.mount_options.flags, mounted_at_s=mounted_at_s)
        self._check(config, environment, place, mounted_at_s, deadline)
        left = max(1.0, deadline - time.monotonic())
        self._keeper.mount(key, plan, environment, volume.fingerprint, labels, left)

    def _take_back(self, name: str, key: str) -> None:
        """Remove the credential files of a mount that was not made. Never raises."""
        try:
            self._forget_files(name, key, self._keeper.look())
        except errors.CachefsError as error:
            log.warning("the credential files %s stay until the next start: %s", name, error)

    def _forget_files(self, name: str, key: str, mounts: Mounts) -> None:
        """Remove credential files that no mount uses but `key`, if that is gone."""
        if mounts.by_key(key) is not None or any(mount.labels.get("credentials") == name for mount in mounts.all):
            return
        if self._files.stage(name):
            self._files.remove_keys(name)
        else:
            self._files.remove(name)

    def _check(
        self, config: Config, environment: Mapping[str, str], place: str, mounted_at_s: float, deadline: float
    ) -> None:
        """Let the agent that runs look at the bucket. Raises what is wrong with it; soon, if it is the agent."""
        try:
            launch.ping(config.cache, ALIVE_S)
        except errors.AgentUnavailable as error:
            raise self._agent_silent(error) from error
        timeout_s = max(1.0, min(CHECK_S, deadline - time.monotonic()))
        try:
            notices = launch.check_running(
                config, {**self._proxies, **environment}, mount_id(place), place,
                timeout_s=timeout_s, mounted_at_s=mounted_at_s, own_environment=not environment,
            )  # fmt: skip
        except errors.AgentUnavailable as error:
            if isinstance(error.__cause__, TimeoutError) and launch.answers(config.cache, PING_S):
                raise errors.StorageUnavailable(
                    f"{config.s3.source} gave no answer within {timeout_s:.0f} s: check the endpoint and the network"
                ) from error
            raise self._agent_silent(error) from error
        for notice in notices:
            log.info("%s: %s", config.s3.source, notice)

    def _agent_silent(self, error: errors.AgentUnavailable) -> errors.AgentUnavailable:
        return errors.AgentUnavailable(
            f"the agent of node {self._settings.node_id} does not answer: look at its cachefs-node pod ({error})"
        )

    def _config(self, spec: VolumeSpec, identity: str, group: int | None) -> Config:
        """Return the configuration of a mount: files are root's, unless somebody says otherwise."""
        config = spec.config(self._settings.config)
        fuse = config.fuse
        gid = group if group is not None else max(fuse.gid, 0)
        fuse = dataclasses.replace(fuse, uid=max(fuse.uid, 0), gid=gid)
        return dataclasses.replace(config, fuse=fuse, s3=dataclasses.replace(config.s3, identity=identity))

    def renew(self, mount: MountState, credentials: Credentials) -> None:
        """Write what is new of the credentials of a mount, and let the agent use them for its volume at once."""
        name = mount.labels["credentials"]
        if credentials.files and self._files.write(name, credentials, now=time.time()):
            log.info("new credentials for volume %s", mount.labels.get("volume"))
            self._lead(mount)

    def _lead(self, mount: MountState) -> None:
        """Make the keys of this mount those by which the agent reads what it shares with other mounts.

        Mounts with one identity share a client of the store, which has the files of the newest of them: when those go,
        or others are newer, it has to be told. That it cannot be told now is no failure of the call.
        """
        labels = mount.labels
        try:
            kept = json.loads(labels["parameters"])
            spec = parse(kept["context"]).with_flags(mount_flags.parse(kept["flags"]))
            group = int(labels["group"]) if labels.get("group") else None
            config = self._config(spec, labels.get("identity", ""), group)
            launch.check_running(
                config, {**self._proxies, **json.loads(labels["environment"])},
                mount_id(mount.mountpoint), mount.mountpoint,
                timeout_s=LEAD_S, mounted_at_s=time.clock_gettime(time.CLOCK_BOOTTIME),
            )  # fmt: skip
        except (errors.CachefsError, ValueError, KeyError) as error:
            log.warning("the agent does not use the credentials of volume %s yet: %s", labels.get("volume"), error)

    def release(self, mount: MountState) -> None:
        """Take a mount away, and its credential files if no other has them."""
        for target in mount.targets:
            self._keeper.unbind(target.path)
        self._keeper.unmount(mount.key)
        name = mount.labels.get("credentials", "")
        if not name:
            return
        mounts = self._keeper.look()
        self._forget_files(name, mount.key, mounts)
        heir = next((m for m in mounts.all if m.labels.get("identity") == mount.labels.get("identity") != ""), None)
        if heir is not None and heir.labels.get("credentials") != name:
            self._lead(heir)


def _labels(volume: Volume, credentials: Credentials, name: str, environment: Mapping[str, str]) -> dict[str, str]:
    return {
        "volume": volume.volume_id,
        "group": group_text(volume.group),
        "auth": str(volume.spec.auth_source),
        "identity": credentials.identity,
        "credentials": name,
        "parameters": volume.parameters,
        "environment": json.dumps(environment),
    }


def group_text(group: int | None) -> str:
    """Return a group as a label has it."""
    return "" if group is None else str(group)
