"""How others ask the keeper of the node: plain sockets, standard library only. Everything BLOCKS.

    keeper = KeeperClient("/run/cachefs/keeper.sock")
    keeper.mount("volume-1", plan, environment={}, fingerprint="...", labels={}, timeout_s=60)
    keeper.bind("volume-1", "/var/lib/kubelet/pods/.../mount", read_only=True)

One connection per request, so an object can be used by any number of threads.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cachefs.mount.control import socket_address

SLACK_S = 5.0
"""How much longer than the keeper may take we wait for its answer."""


class KeeperError(Exception):
    """The keeper refused, or nobody answered. The text is one line for a person.

    `kind`: "unavailable" (no keeper, no node service, or not in time), "exists" (something else is there), "busy" (it
    is still bound), "usage" (the request cannot be used), "missing" (no such mount), or the name of a class in
    `cachefs.errors` ("MountError", "AccessDenied", "BucketNotFound", ...).
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


@dataclass(frozen=True, slots=True)
class Bind:
    """A bind mount of a mount."""

    path: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class MountState:
    """One mount of the keeper."""

    key: str
    mountpoint: str
    state: str
    """starting, serving, restarting, failed, unmounting, or waiting (for a node service)."""
    fingerprint: str
    labels: Mapping[str, str]
    targets: tuple[Bind, ...]
    worker_pid: int | None
    worker_version: str | None
    restarts: int
    last_crash: str | None
    connection: int | None
    """Number of the FUSE connection."""
    started_at: float
    """Seconds since 1970."""
    source: str


@dataclass(frozen=True, slots=True)
class Runner:
    """The node service."""

    pid: int
    version: str
    connected: bool


@dataclass(frozen=True, slots=True)
class KeeperStatus:
    """The keeper and all of its mounts."""

    version: str
    runner: Runner | None
    mounts: tuple[MountState, ...]

    def find(self, key: str) -> MountState | None:
        """Return the mount that a key names (not one that is leaving)."""
        return next((mount for mount in self.mounts if mount.key == key and mount.state != "unmounting"), None)


@dataclass(frozen=True, slots=True)
class Repairs:
    """What a repair has done, by key or path."""

    repaired: tuple[str, ...]
    dropped: tuple[str, ...]
    detached: tuple[str, ...]


class KeeperClient:
    """Asks the keeper that listens at `socket_path`. Every method raises KeeperError."""

    def __init__(self, socket_path: str, timeout_s: float = 30.0) -> None:
        self._path = socket_path
        self._timeout_s = timeout_s

    def mount(
        self,
        key: str,
        plan: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        fingerprint: str,
        labels: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        """Have a mount made, and return when it is served. `plan` is of `cachefs.mount.launch.make_plan`, its mount
        point does not matter. If there is one with this key and fingerprint already, that is it; with another
        fingerprint: kind "exists". Over `timeout_s` seconds: "unavailable"; a mount that was begun goes on, and who
        asks again joins.
        """
        request = {
            "key": key,
            "plan": dict(plan),
            "environment": dict(environment),
            "fingerprint": fingerprint,
            "labels": dict(labels),
            "timeout_s": timeout_s,
        }
        self._ask("mount", request, timeout_s + SLACK_S)

    def unmount(self, key: str, *, force: bool = False) -> bool:
        """Take a mount away; False: there was none. Kind "busy" while it is bound somewhere; `force` takes its binds
        away as well. Files that are open are served until they are closed.
        """
        return bool(self._ask("unmount", {"key": key, "force": force})["found"])

    def bind(self, key: str, target: str, *, read_only: bool) -> None:
        """Bind a mount to a directory below the keeper's root, which is made if it is missing. Done already: fine.
        Kinds: "missing", "usage" (the path may not be used), "exists" (something else is mounted there).
        """
        self._ask("bind", {"key": key, "target": target, "read_only": read_only})

    def unbind(self, target: str) -> bool:
        """Detach what is bound to a directory, and remove the directory; False: nothing was there."""
        return bool(self._ask("unbind", {"target": target})["found"])

    def label(self, key: str, labels: Mapping[str, str | None]) -> None:
        """Set labels of a mount, and remove those that are None."""
        self._ask("label", {"key": key, "labels": dict(labels)})

    def status(self, timeout_s: float | None = None) -> KeeperStatus:
        """Return what the keeper has; it waits for nobody to say so."""
        reply = self._ask("status", {}, timeout_s)
        runner = reply.get("runner")
        return KeeperStatus(
            version=str(reply["version"]),
            runner=Runner(int(runner["pid"]), str(runner["version"]), bool(runner["connected"])) if runner else None,
            mounts=tuple(_mount_state(state) for state in reply["mounts"]),
        )

    def reconcile(self) -> Repairs:
        """Have everything repaired that can be, and return what was done."""
        reply = self._ask("reconcile", {})
        return Repairs(*(tuple(reply[name]) for name in ("repaired", "dropped", "detached")))

    def _ask(self, command: str, request: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        line = json.dumps({"command": command, **request}).encode() + b"\n"
        received = bytearray()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout_s or self._timeout_s)
                with socket_address(self._path) as address:
                    connection.connect(address)
                connection.sendall(line)
                while not received.endswith(b"\n"):
                    piece = connection.recv(64 << 10)
                    if not piece:
                        raise KeeperError("unavailable", f"the keeper at {self._path} hung up: it is being restarted")
                    received += piece
            reply = json.loads(received)
        except FileNotFoundError as error:
            raise self._nobody("there is no such socket") from error
        except TimeoutError as error:
            raise self._nobody("no answer in time") from error
        except (OSError, ValueError) as error:
            raise self._nobody(str(error)) from error
        if not isinstance(reply, dict):
            raise self._nobody("its answer makes no sense")
        if not reply.get("ok"):
            raise KeeperError(str(reply.get("kind", "unavailable")), str(reply.get("text", "no reason given")))
        return reply

    def _nobody(self, why: str) -> KeeperError:
        return KeeperError(
            "unavailable", f"no keeper at {self._path} ({why}): look at the cachefs-keeper pod of this node"
        )


def _mount_state(state: Mapping[str, Any]) -> MountState:
    known: dict[str, Any] = {name: state.get(name) for name in MountState.__slots__}
    targets = tuple(Bind(str(each["path"]), bool(each["read_only"])) for each in state["targets"])
    return MountState(**{**known, "targets": targets})
