"""Every way in which a mount ends: politely, lazily, by force, by signal, by others, and without a supervisor."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs.errors import MountError
from cachefs.mount import kernel, mountinfo, unmounting
from cachefs.mount.mountpoint import prepare_mountpoint
from tests.fuse.fake_worker import pattern
from tests.fuse.supervisor_rig import Holder, Rig, read_once, reader_in_worker, until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not os.path.exists(kernel.DEVICE) or not kernel.may_mount(), reason="needs root and /dev/fuse"),
]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.clean_up()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    opened: list[Holder] = []
    yield opened
    for holder in opened:
        holder.close()


# -- the end ---------------------------------------------------------------------------------------


def test_busy_unmount_names_the_holder_and_changes_nothing(rig: Rig, holders: list[Holder]) -> None:
    rig.mount()
    holders.append(Holder(rig))
    with pytest.raises(MountError) as caught:
        unmounting.unmount(str(rig.mountpoint), rig.runtime)
    assert f"(pid {holders[0].child.pid}): file {rig.pattern}" in str(caught.value)
    assert rig.status()["state"] == "serving"
    assert holders[0].read() == 4096
    holders[0].close()
    assert unmounting.unmount(str(rig.mountpoint), rig.runtime) == f"{rig.mountpoint} is unmounted"
    assert rig.supervisors[0].wait(1) == 0
    rig.assert_nothing_left()


def test_lazy_unmount_serves_open_files_beside_the_next_mount(rig: Rig, holders: list[Holder]) -> None:
    rig.mount()
    holders.append(Holder(rig))
    line = unmounting.unmount(str(rig.mountpoint), rig.runtime, lazy=True)
    assert f"supervisor {rig.supervisors[0].pid} serves its open files" in line
    assert not rig.is_mounted()
    assert holders[0].read() == 4096
    (first,) = rig.runtime.mount_states()
    os.kill(first["worker_pid"], signal.SIGKILL)  # it is restarted as ever
    assert holders[0].read() == 4096

    prepare_mountpoint(str(rig.mountpoint), rig.runtime, nonempty=False, notify=print)
    rig.mount()
    assert {state["supervisor_pid"] for state in rig.runtime.mount_states()} == {s.pid for s in rig.supervisors}
    assert read_once(rig) == pattern(8192, 4096)
    holders[0].close()
    assert rig.supervisors[0].wait(5) == 0
    assert rig.status()["supervisor_pid"] == rig.supervisors[1].pid
    unmounting.unmount(str(rig.mountpoint), rig.runtime)
    rig.assert_nothing_left()


def test_forced_unmount_fails_the_readers_and_ends_everything(rig: Rig, holders: list[Holder]) -> None:
    rig.mount()
    holders.append(Holder(rig))
    waiting = reader_in_worker(rig)
    assert unmounting.unmount(str(rig.mountpoint), rig.runtime, force=True) == f"{rig.mountpoint} is unmounted"
    assert holders[0].read() == -errno.ENOTCONN
    assert waiting.communicate(timeout=5)[1]
    rig.supervisors[0].wait(1)
    rig.assert_nothing_left()


def test_forced_unmount_ends_a_detached_mount(rig: Rig, holders: list[Holder]) -> None:
    rig.mount()
    holders.append(Holder(rig))
    subprocess.run(["umount", "-l", str(rig.mountpoint)], check=True)
    with pytest.raises(MountError, match=f"supervisor {rig.supervisors[0].pid} still serves open files"):
        unmounting.unmount(str(rig.mountpoint), rig.runtime)
    assert holders[0].read() == 4096
    unmounting.unmount(str(rig.mountpoint), rig.runtime, force=True)
    assert holders[0].read() == -errno.ENOTCONN
    rig.supervisors[0].wait(1)
    rig.assert_nothing_left()


def test_sigterm_serves_open_files_on_and_a_second_one_ends_them(rig: Rig, holders: list[Holder]) -> None:
    supervisor = rig.mount()
    holders.append(Holder(rig))
    supervisor.terminate()
    until(lambda: not rig.is_mounted())
    assert holders[0].read() == 4096
    assert f"(pid {holders[0].child.pid}): file {rig.pattern}" in rig.log.read_text()
    supervisor.terminate()
    assert supervisor.wait(5) == 0
    assert holders[0].read() == -errno.ENOTCONN
    rig.assert_nothing_left()


@pytest.mark.slow
def test_sigterm_gives_open_files_ten_seconds(rig: Rig, holders: list[Holder]) -> None:
    supervisor = rig.mount()
    holders.append(Holder(rig))
    began = time.monotonic()
    supervisor.terminate()
    time.sleep(8)
    assert holders[0].read() == 4096
    assert supervisor.wait(10) == 0
    assert 9.5 < time.monotonic() - began < 13
    rig.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts(rig: Rig, number: signal.Signals) -> None:
    supervisor = rig.mount()
    supervisor.send_signal(signal.SIGHUP)
    supervisor.send_signal(number)
    assert supervisor.wait(5) == 0
    rig.assert_nothing_left()


def test_unmount_by_somebody_else_ends_the_supervisor(rig: Rig) -> None:
    supervisor = rig.mount()
    subprocess.run(["umount", str(rig.mountpoint)], check=True)
    assert supervisor.wait(5) == 0
    rig.assert_nothing_left()


def test_aborted_connection_leaves_no_dead_mount(rig: Rig) -> None:
    supervisor = rig.mount()
    kernel.abort_connection(rig.status()["connection"])
    assert supervisor.wait(5) == 0
    rig.assert_nothing_left()


# -- without a supervisor --------------------------------------------------------------------------


def test_killed_supervisor_leaves_a_serving_worker_that_umount_ends(rig: Rig) -> None:
    supervisor = rig.mount()
    worker: int = rig.status()["worker_pid"]
    supervisor.kill()
    supervisor.wait(5)
    assert read_once(rig) == pattern(8192, 4096)
    with pytest.raises(
        MountError, match=rf"already mounted: .* supervisor is gone and worker {worker} still serves it"
    ):
        prepare_mountpoint(str(rig.mountpoint), rig.runtime, nonempty=False, notify=print)
    assert unmounting.unmount(str(rig.mountpoint), rig.runtime) == f"{rig.mountpoint} is unmounted"
    rig.assert_nothing_left()


@pytest.mark.parametrize("force", [False, True])
def test_dead_mount_can_be_unmounted(rig: Rig, force: bool, holders: list[Holder]) -> None:
    dead_mount(rig)
    assert unmounting.unmount(str(rig.mountpoint), rig.runtime, force=force) == f"{rig.mountpoint} is unmounted"
    rig.assert_nothing_left()


def test_dead_mount_is_cleared_by_the_next_one(rig: Rig) -> None:
    dead_mount(rig)
    notices: list[Any] = []
    place = prepare_mountpoint(str(rig.mountpoint), rig.runtime, nonempty=False, notify=notices.append)
    assert place == str(rig.mountpoint)
    assert len(notices) == 1
    assert "dead mount of an earlier life" in notices[0]
    rig.assert_nothing_left()


def dead_mount(rig: Rig) -> None:
    """Kill supervisor and worker with -9: what an out-of-memory killer can leave."""
    supervisor = rig.mount()
    worker: int = rig.status()["worker_pid"]
    supervisor.kill()
    supervisor.wait(5)
    os.kill(worker, signal.SIGKILL)
    until(lambda: mountinfo.probe(str(rig.mountpoint), 2) is mountinfo.Answer.DEAD)


def test_silent_mount_is_reported_and_force_gets_rid_of_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = rig.mount()
    worker: int = rig.status()["worker_pid"]
    supervisor.kill()
    supervisor.wait(5)
    os.kill(worker, signal.SIGSTOP)
    monkeypatch.setattr("cachefs.mount.mountpoint._PROBE_S", 0.3)
    with pytest.raises(
        MountError, match=f"it does not answer; take it away with: cachefs umount --force {rig.mountpoint}"
    ):
        prepare_mountpoint(str(rig.mountpoint), rig.runtime, nonempty=False, notify=print)
    assert unmounting.unmount(str(rig.mountpoint), rig.runtime, force=True) == f"{rig.mountpoint} is unmounted"
    rig.assert_nothing_left()


def test_stopped_supervisor_needs_force(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = rig.mount()
    supervisor.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("cachefs.mount.registry._ASK_S", 0.3)
    with pytest.raises(MountError, match="does not answer; use --force"):
        unmounting.unmount(str(rig.mountpoint), rig.runtime)
    unmounting.unmount(str(rig.mountpoint), rig.runtime, force=True, timeout_s=0.2)
    assert not rig.is_mounted()
    supervisor.send_signal(signal.SIGCONT)
    supervisor.wait(5)
    rig.assert_nothing_left()
