"""What a pod gets that mounts a bucket by itself: a native sidecar, its volumes, and a mount in each container.

    volume NAME            emptyDir; the sidecar shows the file system in its directory "mount" (Bidirectional)
    volume NAME-run        emptyDir; sockets, and where the sidecar mounts before it shows the mount to others
    volume NAME-cache      emptyDir with a limit, or a directory of the node
    volume NAME-shm        emptyDir in memory, at /dev/shm of the sidecar
    container NAME         an init container that stays (restartPolicy Always): `cachefs sidecar`
    in each container      NAME at PATH, subPath "mount", HostToContainer, read-only

Why like this:

* An init container with restartPolicy Always starts before the others, who wait for its startup probe: they find the
  file system mounted. kubelet ends it after all of them, so a Job finishes and a deleted pod reads to its last moment.
  There is no preStop hook, since kubelet runs those at once, while the containers still read: the sidecar unmounts at
  SIGTERM, which comes when they are gone.
* The file system is in a directory of the volume, not its root: kubelet and the runtime look at the root when they
  start the container again, and a root that nobody serves would stop them.
* Bidirectional propagation is allowed to privileged containers only. The sidecar is the only one.

Pure: no file, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
COMMAND = ("cachefs", "sidecar")
CHECK = ("cachefs", "sidecar", "--check")
ROOT = "/cachefs"
"""Where the sidecar has the volume."""
INSIDE = "mount"
"""The directory of the volume in which the file system is."""
CACHE_DIR, RUN_DIR = "/var/cache/cachefs", "/run/cachefs"
BASE_MEMORY_BYTES = 768 * MIB
"""Supervisor, worker, and an agent with its usual --memory-limit of 256MiB, with room to spare; tiers come on top."""
AGENT_MEMORY_BYTES = 256 * MIB
CACHE_BYTES, SHM_BYTES = 20 * GIB, 512 * MIB
"""Sizes of the tiers where nobody says any."""
PROBE_PERIOD_S = 2
NODE_NAME_VARIABLE = "CACHEFS_NODE_NAME"
SECRET_KEYS = ("accessKeyId", "secretAccessKey", "sessionToken")
"""What the keys are called in a Secret, as in those of the CSI driver; the last one may be missing."""
SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What somebody wants in a pod."""

    source: str
    """s3://BUCKET[/PREFIX]"""
    path: str
    """Where the containers see it; absolute."""
    image: str
    name: str = "cachefs"
    containers: tuple[str, ...] = ()
    """Which containers get it; none: all but init containers."""
    arguments: tuple[str, ...] = ()
    """Options of `cachefs mount`, as they are typed."""
    secret: str = ""
    """A Secret with the keys of the bucket."""
    secret_keys: tuple[str, ...] = SECRET_KEYS
    cache_path: str = ""
    """A directory of the node for the cache; empty: an emptyDir."""
    cache_size_bytes: int = CACHE_BYTES
    shm_size_bytes: int = SHM_BYTES
    memory_limit_bytes: int = AGENT_MEMORY_BYTES
    """Of the agent."""
    cpu: str = "500m"
    names_node: bool = False
    """Tell the sidecar the name of the node: it has peers."""
    ready_s: int = 300
    """How long the mount may take to answer, before kubelet starts the sidecar again."""

    @property
    def volume_names(self) -> tuple[str, str, str, str]:
        """The names of the volumes: the file system, sockets, cache, memory."""
        return self.name, f"{self.name}-run", f"{self.name}-cache", f"{self.name}-shm"


def volumes(wanted: Sidecar) -> dict[str, dict[str, Any]]:
    """Return the volumes by name."""
    shown, run, cache, memory = wanted.volume_names
    built: dict[str, dict[str, Any]] = {name: {"name": name, "emptyDir": {}} for name in (shown, run)}
    if wanted.cache_path:
        built[cache] = {"name": cache, "hostPath": {"path": wanted.cache_path, "type": "DirectoryOrCreate"}}
    elif wanted.cache_size_bytes:
        # kubelet evicts a pod whose emptyDir exceeds its limit; metadata comes on top of --cache-size
        limit = quantity(wanted.cache_size_bytes + wanted.cache_size_bytes // 10 + GIB)
        built[cache] = {"name": cache, "emptyDir": {"sizeLimit": limit}}
    else:
        built[cache] = {"name": cache, "emptyDir": {"sizeLimit": quantity(GIB)}}  # metadata only
    if wanted.shm_size_bytes:
        limit = quantity(_tmpfs_bytes(wanted))
        built[memory] = {"name": memory, "emptyDir": {"medium": "Memory", "sizeLimit": limit}}
    return built


def container(wanted: Sidecar) -> dict[str, Any]:
    """Return the sidecar."""
    shown, run, cache, memory = wanted.volume_names
    base = BASE_MEMORY_BYTES + max(0, wanted.memory_limit_bytes - AGENT_MEMORY_BYTES)
    needed = quantity(base + (_tmpfs_bytes(wanted) if wanted.shm_size_bytes else 0))
    mounts: list[dict[str, Any]] = [
        {"name": shown, "mountPath": ROOT, "mountPropagation": "Bidirectional"},
        {"name": run, "mountPath": RUN_DIR},
        {"name": cache, "mountPath": CACHE_DIR},
    ]
    if wanted.shm_size_bytes:
        mounts.append({"name": memory, "mountPath": "/dev/shm"})  # noqa: S108 - the sidecar's own tmpfs
    built: dict[str, Any] = {
        "name": wanted.name,
        "image": wanted.image,
        "restartPolicy": "Always",
        "command": list(COMMAND),
        "args": [wanted.source, place(), f"--cache-dir={CACHE_DIR}", *wanted.arguments],
        "env": environment(wanted),
        "securityContext": {"privileged": True, "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False},
        "resources": {"requests": {"cpu": wanted.cpu, "memory": needed}, "limits": {"memory": needed}},
        "volumeMounts": mounts,
        "startupProbe": {
            "exec": {"command": [*CHECK, place()]},
            "periodSeconds": PROBE_PERIOD_S,
            "timeoutSeconds": 10,
            "failureThreshold": max(1, wanted.ready_s // PROBE_PERIOD_S),
        },
        # `kubectl describe pod` then shows why a mount failed
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if not built["env"]:
        del built["env"]
    return built


def environment(wanted: Sidecar) -> list[dict[str, Any]]:
    """Return the variables of the sidecar."""
    variables: list[dict[str, Any]] = []
    if wanted.secret:
        for at, (name, key) in enumerate(zip(SECRET_VARIABLES, wanted.secret_keys, strict=False)):
            reference: dict[str, Any] = {"name": wanted.secret, "key": key}
            if at == 2:
                reference["optional"] = True  # keys that do not expire have no token
            variables.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    if wanted.names_node:
        field = {"fieldRef": {"fieldPath": "spec.nodeName"}}
        variables.append({"name": NODE_NAME_VARIABLE, "valueFrom": field})
    return variables


def volume_mount(wanted: Sidecar) -> dict[str, Any]:
    """Return what a container gets that reads."""
    return {
        "name": wanted.name,
        "mountPath": wanted.path,
        "subPath": INSIDE,
        "mountPropagation": "HostToContainer",
        "readOnly": True,
    }


def place() -> str:
    """Return where the file system is in the sidecar."""
    return f"{ROOT}/{INSIDE}"


def is_ours(found: Mapping[str, Any]) -> bool:
    """Whether a container is a sidecar that was made here."""
    command = found.get("command")
    return isinstance(command, Sequence) and tuple(command) == COMMAND


def quantity(size_bytes: int) -> str:
    """Write bytes as Kubernetes does, rounded up to a MiB: "1408Mi", "20Gi"."""
    mebibytes = -(-size_bytes // MIB)
    return f"{mebibytes >> 10}Gi" if mebibytes and mebibytes % 1024 == 0 else f"{mebibytes}Mi"


def _tmpfs_bytes(wanted: Sidecar) -> int:
    """The tmpfs of the shm tier: its budget is kept to the byte, but small files lie beside it."""
    return wanted.shm_size_bytes + wanted.shm_size_bytes // 16 + 16 * MIB
