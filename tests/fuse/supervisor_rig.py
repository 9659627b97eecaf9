"""Runs real supervisors with the fake worker on real mounts, and cleans up whatever a test leaves behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cachefs.config import CacheConfig, Config, FuseConfig, LogConfig, S3Config
from cachefs.mount import kernel, launch, mountinfo, registry
from cachefs.mount.control import ControlError, ask
from cachefs.runtime import RuntimeDir

ROOT = Path(__file__).resolve().parents[2]
FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> Any:
    """Wait until `condition` is true and return what it returned."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.01)
    return result


class Rig:
    """One directory to mount on, and the supervisors that were started for it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mountpoint = base / "mnt"
        self.behaviour = base / "behaviour"
        self.runtime = RuntimeDir(str(base / "run"))
        self.log = base / "log"
        self.command_prefix = [sys.executable]
        self.supervisors: list[subprocess.Popen[bytes]] = []
        self.mountpoint.mkdir()
        self.behaviour.mkdir()

    def plan(self, **more: Any) -> dict[str, Any]:
        """A plan as `cachefs mount` would write it, with the fake worker."""
        config = Config(
            s3=S3Config(source="s3://bucket/a,b c"),
            cache=CacheConfig(cache_dir=str(self.base / "cache"), runtime_dir=self.runtime.path),
            fuse=FuseConfig(ready_timeout_s=more.pop("ready_timeout_s", 10.0)),
            log=LogConfig(log_level="debug"),
        )
        command = [sys.executable, "-I", "-S", str(FAKE_WORKER), str(self.behaviour)]
        return {**launch.make_plan(config, str(self.mountpoint)), "worker_argv": command, **more}

    def try_to_mount(self, **more: Any) -> dict[str, Any]:
        """Start a supervisor and return its line of readiness."""
        reader, writer = os.pipe()
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [*self.command_prefix, "-m", "cachefs.mount.supervisor", "--ready-fd", str(writer),
                str(self.mountpoint)], stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writer],
                env=ENVIRONMENT, start_new_session=True,
            )  # fmt: skip
        self.supervisors.append(child)
        os.close(writer)
        assert child.stdin is not None
        with child.stdin as stdin:
            stdin.write(json.dumps(self.plan(**more)).encode())
        with open(reader, "rb") as ready:
            assert select.select([ready], [], [], 15)[0], "the supervisor said nothing"
            line: dict[str, Any] = json.loads(ready.readline())
        return line

    def mount(self, **more: Any) -> subprocess.Popen[bytes]:
        """Mount and return the supervisor."""
        assert self.try_to_mount(**more) == {"ok": True}, self.log.read_text()
        return self.supervisors[-1]

    @property
    def pattern(self) -> Path:
        return self.mountpoint / "pattern"

    @property
    def identity(self) -> str:
        return str(self.plan()["mount_id"])

    def ask(self, command: str, timeout_s: float = 10.0, **more: Any) -> dict[str, Any]:
        """Ask the supervisor of the mount at its place."""
        return ask(self.runtime.mount(self.identity, "sock"), {"command": command, **more}, timeout_s)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("status")["status"]
        return status

    def behave(self, name: str, text: str = "") -> None:
        (self.behaviour / name).write_text(text)

    def forget(self, name: str) -> None:
        (self.behaviour / name).unlink()

    def kill_worker(self) -> int:
        """Kill the worker with -9 and return its pid."""
        pid: int = self.status()["worker_pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def started(self) -> list[tuple[int, bool]]:
        """The pid of every worker that was started, and whether it was told to be the first."""
        path = self.behaviour / "started"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), first == "True") for pid, first in (line.split() for line in lines)]

    def is_mounted(self) -> bool:
        return mountinfo.find_mount(str(self.mountpoint)) is not None

    def assert_nothing_left(self) -> None:
        """No mount, no worker, no file of a running mount."""
        assert not self.is_mounted()
        assert [pid for pid, _ in self.started() if _is_fake_worker(pid)] == []
        assert [name for name in os.listdir(f"{self.runtime.path}/mounts") if not name.endswith(".log")] == []
        assert registry.supervisors_of(str(self.mountpoint)) == ()

    def clean_up(self) -> None:
        """Leave nothing behind, whatever state the test ended in."""
        for state in self.runtime.mount_states():
            try:
                ask(self.runtime.mount(state["mount_id"], "sock"), {"command": "unmount", "force": True}, 3)
            except ControlError:
                pass
        while (mount := mountinfo.find_mount(str(self.mountpoint))) is not None:
            kernel.abort_connection(mount.connection)
            kernel.unmount(str(self.mountpoint), detach=True)
        for child in self.supervisors:
            if child.poll() is None:
                child.kill()
            child.wait(5)
        for pid in registry.supervisors_of(str(self.mountpoint)):
            os.kill(pid, signal.SIGKILL)
        for pid, _ in self.started():
            if _is_fake_worker(pid):
                os.kill(pid, signal.SIGKILL)
                registry.wait_for_end(pid, 5)


def _is_fake_worker(pid: int) -> bool:
    return str(FAKE_WORKER).encode() in registry.command_line(pid)


# -- readers ---------------------------------------------------------------------------------------

ONE_READ = "import os, sys; sys.stdout.buffer.write(os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 8192))"


def python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Run `code` in another process: a test that used the mount itself could hang for ever."""
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(child: subprocess.Popen[bytes], timeout_s: float = 10.0) -> bytes:
    out, complaint = child.communicate(timeout=timeout_s)
    assert child.returncode == 0, complaint.decode()
    return out


def read_once(rig: Rig) -> bytes:
    return output(python(ONE_READ, rig.pattern))


def reader_in_worker(rig: Rig) -> subprocess.Popen[bytes]:
    """Return a reader whose READ the worker has taken and does not answer."""
    rig.behave("hold")
    before = taken_reads(rig)
    child = python(ONE_READ, rig.pattern)
    until(lambda: taken_reads(rig) > before)
    return child


def taken_reads(rig: Rig) -> int:
    path = rig.behaviour / "taken"
    return len(path.read_text().splitlines()) if path.exists() else 0


class Holder:
    """A process that holds the mount's file open and reads it on demand."""

    def __init__(self, rig: Rig) -> None:
        code = (
            "import os, sys\nf = os.open(sys.argv[1], os.O_RDONLY)\nprint('open', flush=True)\n"
            "for line in sys.stdin:\n"
            "    try:\n        print(len(os.pread(f, 4096, 0)), flush=True)\n"
            "    except OSError as e:\n        print(-e.errno, flush=True)\n"
        )
        self.child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, str(rig.pattern)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def read(self) -> int:
        """Read a page; returns its length or a negative errno."""
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
