"""How much memory and CPU the processes of a system take, sampled from /proc while it is read from."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

Roles = dict[str, list[int]]
"""Process numbers by what they are, e.g. {"supervisor": [41], "worker": [43]}."""

_KIB = 1024
_INTERVAL_S = 0.25
_REFRESH_EVERY = 8  # samples: finding the processes walks all of /proc, which must not show in the measurement


def session_members(session: int) -> list[int]:
    """Return every living process of a session (a daemon started in its own session, with all its children)."""
    members = []
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        fields = _stat_fields(pid)
        if fields and fields[3] == str(session) and fields[0] != "Z":
            members.append(pid)
    return members


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, ppid, pgrp, session, ... (empty when the process is gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (init may be slow to reap orphans)."""
    return _stat_fields(pid)[:1] not in ([], ["Z"])


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far (0 when it is gone)."""
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def resident(pid: int) -> dict[str, int]:
    """Bytes of RssAnon, RssFile and RssShmem of a process (zeros when it is gone)."""
    found = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * _KIB
    return found


def proportional(pid: int) -> int:
    """PSS of a process: its share of shared pages. Walks its page tables, so never while something is timed."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * _KIB
    except OSError:
        pass
    return 0


class MemorySampler:
    """Samples the processes that `roles` names four times a second and keeps the peaks. Context manager.

    INVARIANT: `peaks` only grow. Keys: "anon", "rss", "pss" for the sum, and "anon.<role>" for each role.
    """

    def __init__(self, roles: Callable[[], Roles]) -> None:
        self._roles = roles
        self._pids: Roles = {}
        self._count = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self.peaks: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def sample(self, *, with_pss: bool = False) -> dict[str, int]:
        """Take one sample and return it."""
        now: dict[str, int] = {"anon": 0, "rss": 0}
        if self._count % _REFRESH_EVERY == 0:
            self._pids = self._roles()
        self._count += 1
        for role, pids in self._pids.items():
            sizes = [resident(pid) for pid in pids]
            anon = sum(size["RssAnon"] for size in sizes)
            now[f"anon.{role}"] = anon
            now["anon"] += anon
            now["rss"] += sum(sum(size.values()) for size in sizes)
            if with_pss:
                now["pss"] = now.get("pss", 0) + sum(proportional(pid) for pid in pids)
        for name, value in now.items():
            self.peaks[name] = max(value, self.peaks.get(name, 0))
        return now

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self.sample()
