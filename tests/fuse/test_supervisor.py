"""The supervisor on a real mount: serving, takeover, crash loops, upgrades, and mounts that cannot be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs.mount import kernel, mountinfo, unmounting
from cachefs.runtime import RuntimeDir
from tests.fuse.fake_worker import pattern
from tests.fuse.supervisor_rig import ONE_READ, Rig, output, python, read_once, reader_in_worker, until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not os.path.exists(kernel.DEVICE) or not kernel.may_mount(), reason="needs root and /dev/fuse"),
]

READER = """
import os, random, sys, time
path, seconds = sys.argv[1], float(sys.argv[2])
descriptor, end, worst, reads = os.open(path, os.O_RDONLY), time.monotonic() + seconds, 0.0, 0
print("open", flush=True)
while time.monotonic() < end:
    page, began = random.randrange(4096), time.monotonic()
    assert os.pread(descriptor, 4096, page * 4096) == bytes([page % 251]) * 4096
    reads, worst = reads + 1, max(worst, time.monotonic() - began)
print(reads, worst)
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.clean_up()


# -- children of others ----------------------------------------------------------------------------

AS_PROCESS_1 = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
subprocess.Popen(["true"])                                   # dead before the supervisor begins
subprocess.Popen(["sh", "-c", "sleep 1; exit 3"])            # as the agent that `cachefs mount --foreground` started
subprocess.Popen(["sh", "-c", "sleep 1.5 & sleep 1.6 & exit"])  # orphans of somebody else
os.execv(sys.argv[1], sys.argv[1:])
"""


def children(parent: int) -> dict[int, str]:
    """The children of a process with their states ("Z": dead, and nobody has taken note)."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if int(ppid) == parent:
                found[int(pid)] = state
    return found


def test_a_supervisor_that_inherits_children_buries_them(rig: Rig) -> None:
    rig.command_prefix = [sys.executable, "-c", AS_PROCESS_1, sys.executable]
    supervisor = rig.mount()
    foreign = set(children(supervisor.pid)) - {rig.status()["worker_pid"]}
    assert len(foreign) >= 3
    killed = rig.kill_worker()  # its own child dies beside them, and is not taken from who waits for it
    until(lambda: rig.status()["state"] == "serving" and rig.status()["worker_pid"] != killed)
    assert "SIGKILL" in rig.status()["last_crash"]["what"]
    until(lambda: set(children(supervisor.pid)) == {rig.status()["worker_pid"]}, 6)
    assert read_once(rig) == pattern(8192, 4096)


# -- serving ---------------------------------------------------------------------------------------


def test_mounts_serves_and_says_so(rig: Rig) -> None:
    supervisor = rig.mount()
    mount = mountinfo.find_mount(str(rig.mountpoint))
    assert mount is not None
    assert (mount.fstype, mount.source) == ("fuse.cachefs", "s3://bucket/a,b c")
    assert {"ro", "nosuid", "nodev"} <= set(mount.options.split(","))
    status = rig.status()
    assert status["state"] == "serving"
    assert status["supervisor_pid"] == supervisor.pid
    assert status["worker_pid"] == rig.started()[0][0]
    assert status["agent_pid"] == 4711
    assert status["connection"] == mount.connection
    assert status["last_crash"] is None
    assert rig.runtime.mount_states() == [status]
    assert read_once(rig) == pattern(8192, 4096)
    assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text().strip() == "4096"


def test_supervisor_is_small_and_idle(rig: Rig) -> None:
    supervisor = rig.mount()
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{supervisor.pid}/status").read_text().splitlines())
    assert int(fields["RssAnon"].split()[0]) < 12 << 10
    assert int(fields["Threads"]) == 1

    def switches() -> int:
        text = Path(f"/proc/{supervisor.pid}/status").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)

    def slept(seconds: float) -> bool:
        before = switches()
        time.sleep(seconds)
        return switches() == before

    assert any(slept(0.5) for _ in range(4))  # the first may still see the end of the start
    held = [os.readlink(f"/proc/{supervisor.pid}/{name}") for name in ("cwd", "root")]
    held += [os.readlink(f"/proc/{supervisor.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{supervisor.pid}/fd")]
    assert not [path for path in held if path.startswith(str(rig.mountpoint))]


# -- survival --------------------------------------------------------------------------------------


def test_reader_survives_kills_without_error_and_without_a_long_stall(rig: Rig) -> None:
    rig.mount()
    reader = python(READER, rig.pattern, 2.0)
    for _ in range(3):
        time.sleep(0.4)
        rig.kill_worker()
    reads, worst = output(reader).split()[1:]
    assert int(reads) > 100
    assert float(worst) < 1.0
    assert rig.status()["restarts"] == 3
    assert [first for _, first in rig.started()] == [True, False, False, False]


def test_read_that_was_taken_is_answered_by_the_next_worker(rig: Rig) -> None:
    rig.mount()
    reader = reader_in_worker(rig)
    rig.forget("hold")
    rig.kill_worker()
    assert output(reader) == pattern(8192, 4096)
    assert rig.status()["last_crash"]["what"] == "killed by signal SIGKILL"


def test_without_resend_the_taken_read_fails_and_all_others_go_on(rig: Rig) -> None:
    rig.mount(without_resend=True)
    for _ in range(2):
        reader = reader_in_worker(rig)
        rig.forget("hold")
        rig.kill_worker()
        _, complaint = reader.communicate(timeout=5)
        assert reader.returncode == 1
        assert b"Software caused connection abort" in complaint
        assert read_once(rig) == pattern(8192, 4096)
    assert "no RESEND before Linux 6.9" in rig.log.read_text()
    rig.ask("unmount")
    assert rig.supervisors[-1].wait(5) == 0


def test_first_worker_killed_before_it_answered_init_is_replaced_by_another_first(rig: Rig) -> None:
    rig.behave("abort-once")
    rig.mount()
    assert [first for _, first in rig.started()] == [True, True]
    assert rig.status()["restarts"] == 1
    assert read_once(rig) == pattern(8192, 4096)


def test_crash_loop_ends_in_eio_and_an_upgrade_gets_out(rig: Rig) -> None:
    rig.mount()
    waiting = reader_in_worker(rig)
    rig.behave("crash", "the reason of it all")
    rig.kill_worker()
    _, complaint = waiting.communicate(timeout=10)
    assert b"Input/output error" in complaint
    status = rig.status()
    assert (status["state"], status["worker_pid"]) == ("failed", None)
    assert "exit code 3" in status["last_crash"]["what"]
    assert "the reason of it all" in status["last_crash"]["what"]
    log = [line for line in rig.log.read_text().splitlines() if " ERROR " in line]
    assert len(log) == 1
    assert f"cachefs upgrade {rig.mountpoint}" in log[0]
    second = python(ONE_READ, rig.pattern)
    assert b"Input/output error" in second.communicate(timeout=5)[1]

    refused = rig.ask("upgrade")
    assert not refused["ok"]
    assert "the reason of it all" in refused["text"]
    assert rig.status()["state"] == "failed"
    rig.forget("crash")
    rig.forget("hold")
    assert rig.ask("upgrade", version="2.0") == {"ok": True, "version": "2.0"}
    assert (rig.status()["state"], rig.status()["version"]) == ("serving", "2.0")
    assert read_once(rig) == pattern(8192, 4096)
    rig.kill_worker()  # the old crashes are forgotten
    assert read_once(rig) == pattern(8192, 4096)


def test_failed_mount_can_be_unmounted(rig: Rig) -> None:
    rig.mount()
    rig.behave("crash")
    rig.kill_worker()
    until(lambda: rig.status()["state"] == "failed")
    assert unmounting.unmount(str(rig.mountpoint), rig.runtime) == f"{rig.mountpoint} is unmounted"
    assert rig.supervisors[-1].wait(5) == 0
    rig.assert_nothing_left()


def test_upgrade_under_load_loses_nothing(rig: Rig) -> None:
    rig.mount()
    reader = python(READER, rig.pattern, 1.5)
    for number in range(3):
        time.sleep(0.2)
        before = rig.status()["worker_pid"]
        assert rig.ask("upgrade", python=sys.executable, version=f"1.{number}")["ok"]
        assert rig.status()["worker_pid"] != before
    assert float(output(reader).split()[2]) < 1.0
    assert rig.status()["restarts"] == 0
    assert len([pid for pid, _ in rig.started() if os.path.exists(f"/proc/{pid}")]) == 1


def test_upgrade_that_cannot_prepare_changes_nothing(rig: Rig) -> None:
    rig.mount()
    before = rig.status()
    rig.behave("fatal", "no such bucket")
    reply = rig.ask("upgrade", version="9")
    assert not reply["ok"]
    assert "no such bucket" in reply["text"]
    assert rig.status() == before
    wrong: dict[str, Any]
    for wrong in ({"python": 1}, {"env": []}, {"env": {"A": 1}}):
        assert "must" in rig.ask("upgrade", **wrong)["text"]
    assert read_once(rig) == pattern(8192, 4096)


def test_worker_that_dies_during_an_upgrade_is_replaced_by_the_new_one(rig: Rig) -> None:
    rig.mount()
    rig.behave("mute")
    upgrade = python(
        "import sys; sys.path.insert(0, sys.argv[1]); from cachefs.mount.control import ask\n"
        "print(ask(sys.argv[2], {'command': 'upgrade', 'version': '2'}, 10))",
        Path(__file__).parents[2], rig.runtime.mount(rig.identity, "sock"),
    )  # fmt: skip
    until(lambda: len(rig.started()) == 2)
    assert rig.ask("upgrade") == {"ok": False, "kind": "busy", "text": "another upgrade is running"}
    rig.kill_worker()
    until(lambda: rig.status()["state"] == "restarting")
    rig.forget("mute")
    assert b"'ok': True" in output(upgrade)
    assert read_once(rig) == pattern(8192, 4096)
    assert len(rig.started()) == 2 or rig.status()["restarts"] == 1


# -- mounts that cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "text", "kind", "words"),
    [
        ("fatal", "bucket x does not exist", "BucketNotFound", "bucket x does not exist"),
        ("crash", "ImportError: no lead", "MountError", "exit code 3: ImportError: no lead"),
        ("abort", "", "MountError", "again and again"),
        ("mute", "", "MountError", "not ready within 0.5 s"),
    ],
)
def test_first_worker_that_cannot_serve_ends_the_mount(
    rig: Rig, behaviour: str, text: str, kind: str, words: str
) -> None:
    rig.behave(behaviour, text)
    line = rig.try_to_mount(ready_timeout_s=0.5 if behaviour == "mute" else 10.0)
    assert (line["ok"], line["kind"]) == (False, kind)
    assert words in line["text"]
    assert rig.supervisors[-1].wait(5) == 1
    rig.assert_nothing_left()


def test_mountpoint_that_is_gone_is_one_clear_line(rig: Rig) -> None:
    rig.mountpoint.rmdir()
    line = rig.try_to_mount()
    assert rig.supervisors[-1].wait(5) == 1
    assert line["text"] == f"cannot mount on {rig.mountpoint}: No such file or directory"
    rig.mountpoint.mkdir()
    rig.assert_nothing_left()


def test_second_supervisor_refuses_a_mounted_directory(rig: Rig) -> None:
    rig.mount()
    line = rig.try_to_mount(runtime_dir=str(rig.base / "other"))
    assert "already mounted: s3://bucket/a,b c" in line["text"]
    assert read_once(rig) == pattern(8192, 4096)


def test_runtime_directory_on_a_full_disk_costs_the_state_file_only(rig: Rig, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=True)
    try:
        RuntimeDir(str(small))
        rig.runtime.path = str(small)
        (small / "filler").write_bytes(b"")
        supervisor = rig.mount(runtime_dir=str(small))
        with (small / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        rig.kill_worker()
        assert read_once(rig) == pattern(8192, 4096)
        assert rig.status()["restarts"] == 1
        assert rig.ask("unmount")["ok"]
        assert supervisor.wait(5) == 0
        assert "No space left on device; the mount goes on without it" in rig.log.read_text()
    finally:
        rig.clean_up()
        subprocess.run(["umount", "-l", str(small)], check=True)
