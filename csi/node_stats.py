"""How a mount is: figures for NodeGetVolumeStats, and whether something is wrong with it.

What is asked, nearest first: the keeper (is there a worker, does it come back), the kernel (does the mount answer
statvfs(2)), the agent (does the store answer). A mount that hangs takes a thread of its own with it, never the call:
the thread stays until the mount answers or ends, and until then nobody asks that mount again.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from cachefs import errors
from cachefs.agent import launch, messages
from cachefs.config import CacheConfig
from cachefs.keeper.client import MountState
from cachefs.mount import mountinfo
from cachefs.runtime import mount_id
from csi.status import worded

PROBE_S = 3.0
AGENT_S = 3.0
SHARED_S = 1.0
RESTART_S = 30.0
"""A mount that comes back within this time is as it should be."""
_SERVING = frozenset({"serving"})
_PASSING = frozenset({"starting", "restarting", "waiting"})


@dataclass(frozen=True, slots=True)
class Figures:
    """What statvfs(2) says: bytes and inodes."""

    total_bytes: int = 0
    used_bytes: int = 0
    total_inodes: int = 0
    used_inodes: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a mount is well, and what to say about it."""

    figures: Figures
    abnormal: bool
    text: str


class _Question:
    """One statvfs(2) in a thread."""

    def __init__(self, path: str) -> None:
        self.over = threading.Event()
        self.found: os.statvfs_result | None = None
        self.error = 0
        self._path = path

    def run(self) -> None:
        try:
            self.found = os.statvfs(self._path)
        except OSError as error:
            self.error = error.errno or errno.EIO
        finally:
            self.over.set()


class Probe:
    """Asks mounts for their figures. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Question] = {}
        """Questions that were not answered yet, by what they ask."""

    def ask(self, path: str, timeout_s: float = PROBE_S) -> tuple[Figures | None, str]:
        """Return the figures of the mount at `path`, or None and why there are none. Never takes much longer."""
        with self._lock:
            question = self._open.get(path)
            if question is not None and question.over.is_set():
                question = None
            if question is None:
                question = self._open[path] = _Question(path)
                threading.Thread(target=question.run, name="csi-statvfs", daemon=True).start()
        if not question.over.wait(timeout_s):
            return None, f"the mount does not answer (statvfs waits for more than {timeout_s:g} s)"
        with self._lock:
            if self._open.get(path) is question:
                del self._open[path]
        if question.found is None:
            gone = question.error in (errno.ENOTCONN, errno.ECONNABORTED)
            return None, "the mount is dead" if gone else f"the mount fails: {os.strerror(question.error)}"
        return _figures(question.found), ""


def _figures(found: os.statvfs_result) -> Figures:
    return Figures(
        found.f_blocks * found.f_frsize,
        (found.f_blocks - found.f_bfree) * found.f_frsize,
        found.f_files,
        max(0, found.f_files - found.f_ffree),
    )


class Examiner:
    """Finds out how mounts are. Any thread."""

    def __init__(self, cache: CacheConfig, node_id: str) -> None:
        self._cache = cache
        self._node_id = node_id
        self._probe = Probe()
        self._asking = threading.Lock()
        self._said: tuple[float, dict[str, Any] | errors.CachefsError] = (-math.inf, {})
        """What the agent said last, or why it did not, and when (monotonic): kubelet asks for all volumes at once."""
        self._lock = threading.Lock()
        self._restless: dict[str, float] = {}
        """Since when (monotonic) a mount is not serving, as far as somebody has asked."""

    def examine(self, mount: MountState, path: str, *, has_node_service: bool) -> Health:
        """Return how the mount is that is bound to `path`. Takes a few seconds at most."""
        unwell = self._of_keeper(mount, has_node_service=has_node_service)
        if unwell:
            return Health(Figures(), True, unwell)
        if mount.state not in _SERVING:
            return Health(Figures(), False, f"the mount is {mount.state}; readers wait")
        visible = {found.mountpoint for found in mountinfo.mounts() if found.is_cachefs}
        figures: Figures | None = None
        if path in visible:
            figures, why = self._probe.ask(path)
            if figures is None:
                return Health(Figures(), True, f"{why}: see the logs of the node's cachefs-node pod")
        elif mount.mountpoint in visible:
            return Health(Figures(), True, f"nothing is mounted at {path} any more: delete the pod that uses it")
        return self._with_agent(mount, figures or Figures())

    def _of_keeper(self, mount: MountState, *, has_node_service: bool) -> str:
        if mount.state == "failed":
            why = f": {mount.last_crash}" if mount.last_crash else ""
            return f"the worker of the mount crashed too often{why}; see the logs of the node's cachefs-node pod"
        with self._lock:
            if mount.state in _SERVING:
                self._restless.pop(mount.key, None)
                return ""
            since = self._restless.setdefault(mount.key, time.monotonic())
        waits_s = time.monotonic() - since
        if mount.state not in _PASSING:
            return f"the mount is {mount.state}"
        if waits_s < RESTART_S:
            return ""
        reason = "" if has_node_service else f": the node service of {self._node_id} is not running"
        return f"the mount is {mount.state} for {waits_s:.0f} s{reason}; see the node's cachefs-node pod"

    def _with_agent(self, mount: MountState, figures: Figures) -> Health:
        try:
            origin = self._origin(mount)
        except errors.CachefsError as error:
            return Health(
                figures, True, f"the agent of the node does not answer, only what is cached is served: {error}"
            )
        if not origin:
            return Health(figures, False, "mounted; its worker has no connection to the agent of the node now")
        if origin.get("failing"):
            why = worded(str(origin.get("last_error") or "no reason given"))
            return Health(figures, True, f"the bucket does not answer: {why}")
        return Health(figures, False, "mounted, and the bucket answers")

    def _origin(self, mount: MountState) -> dict[str, Any]:
        """Return what the agent says of the store of a mount; {} while the worker is not attached."""
        with self._asking:
            said_at, status = self._said
            if time.monotonic() - said_at > SHARED_S:
                status = self._ask_agent()
                self._said = (time.monotonic(), status)
        if isinstance(status, errors.CachefsError):
            raise errors.AgentUnavailable(str(status)) from status
        attached = status.get("mounts", {}).get(mount_id(mount.mountpoint), {})
        origin: dict[str, Any] = status.get("volumes", {}).get(attached.get("volume_id"), {}).get("origin", {})
        return origin

    def _ask_agent(self) -> dict[str, Any] | errors.CachefsError:
        """Silence is an answer too: else each of those who wait for it here would wait once more."""
        try:
            return agent_status(self._cache)
        except errors.CachefsError as error:
            return error

    def forget(self, keys: set[str]) -> None:
        """Remember only these mounts."""
        with self._lock:
            for key in set(self._restless) - keys:
                del self._restless[key]


def agent_status(cache: CacheConfig, timeout_s: float = AGENT_S) -> dict[str, Any]:
    """Return what the agent of the node says of itself. Raises AgentUnavailable."""
    answer = launch.ask(launch.running_agent(cache, timeout_s), messages.Status(id=1), timeout_s)
    if not isinstance(answer, messages.StatusReply):
        raise errors.AgentUnavailable("the agent answered something else")
    return answer.status
