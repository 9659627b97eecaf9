"""`cachefs mount`, `umount`, `upgrade` and the mount helper as people run them; only bucket check and worker are not
the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefs.cli import main, mount_helper
from cachefs.errors import BucketNotFound
from cachefs.fuse.protocol import IN_HEADER, Opcode
from cachefs.mount import kernel, launch, mountinfo, registry
from cachefs.mount.control import ControlError
from cachefs.mount.mountpoint import claimed
from tests.fuse.supervisor_rig import ROOT, Rig, until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(not os.path.exists(kernel.DEVICE) or not kernel.may_mount(), reason="needs root and /dev/fuse"),
]
SOURCE = "s3://bucket/prefix"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory with a short name: the path of a socket is limited."""
    with tempfile.TemporaryDirectory(prefix="cfs-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def rig(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(base)
    argv = rig.plan()["worker_argv"]
    make_plan = launch.make_plan
    monkeypatch.setattr(launch, "make_plan", lambda *a, **k: {**make_plan(*a, **k), "worker_argv": argv})
    monkeypatch.setattr("cachefs.agent.launch.check_volume", lambda *_: ["the bucket says hello"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", rig.runtime.path)
    monkeypatch.setenv("CACHEFS_CACHE_DIR", str(base / "cache"))
    monkeypatch.setenv("CACHEFS_SHM_SIZE", "16MiB")
    yield rig
    rig.clean_up()


@pytest.fixture
def cachefs(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out.strip(), err.strip()

    return run


def test_mount_status_upgrade_umount(rig: Rig, cachefs: Command) -> None:
    code, out, err = cachefs("mount", SOURCE, rig.mountpoint, "-o", "noatime,noexec", "--metadata-ttl", "5s")
    assert (code, out, err) == (0, f"{SOURCE} is mounted on {rig.mountpoint}", "cachefs: the bucket says hello")
    mount = mountinfo.find_mount(str(rig.mountpoint))
    assert mount is not None
    assert {"noatime", "noexec", "ro"} <= set(mount.options.split(","))
    status = rig.status()
    assert Path(status["log_file"]).stat().st_mode & 0o777 == 0o600
    assert cachefs("mount", SOURCE, rig.mountpoint) == (
        1,
        "",
        f"cachefs: {rig.mountpoint} is already mounted: {SOURCE}, serving, supervisor pid {status['supervisor_pid']}",
    )
    assert cachefs("upgrade", rig.mountpoint)[0] == 0
    assert rig.status()["worker_pid"] != status["worker_pid"]
    assert cachefs("umount", rig.mountpoint) == (0, f"{rig.mountpoint} is unmounted", "")
    assert cachefs("umount", rig.mountpoint) == (1, "", f"cachefs: {rig.mountpoint} is not mounted")
    assert "not a mount with a running supervisor" in cachefs("upgrade", rig.mountpoint)[2]
    rig.assert_nothing_left()


def test_mount_through_a_symbolic_link(rig: Rig, cachefs: Command) -> None:
    link = rig.base / "link"
    link.symlink_to("mnt")
    assert cachefs("mount", SOURCE, link)[0] == 0
    assert rig.is_mounted()
    assert cachefs("umount", f"{link}/")[0] == 0
    rig.assert_nothing_left()


@pytest.mark.parametrize(
    ("arrange", "code", "words"),
    [
        (lambda rig: rig.mountpoint.rmdir(), 1, "does not exist; create it with: mkdir -p"),
        (lambda rig: (rig.mountpoint.rmdir(), rig.mountpoint.touch()), 1, "is not a directory"),
        (lambda rig: (rig.mountpoint / "x").touch(), 1, "is not empty (it has 'x')"),
        (lambda rig: rig.behave("fatal", "bucket gone\nfor good"), 1, "bucket gone for good"),
        (lambda rig: rig.behave("crash", "no module"), 1, "the worker ended: exit code 3: no module"),
    ],
)
def test_what_cannot_be_mounted_is_one_line(
    rig: Rig, cachefs: Command, arrange: Callable[[Rig], Any], code: int, words: str
) -> None:
    arrange(rig)
    result, out, err = cachefs("mount", SOURCE, rig.mountpoint)
    assert (result, out) == (code, "")
    assert words in err.splitlines()[-1]
    assert len([line for line in err.splitlines() if "hello" not in line]) == 1
    rig.assert_nothing_left()


def test_wrong_bucket_and_wrong_source(rig: Rig, cachefs: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[str]:
        raise BucketNotFound("bucket 'bucket' does not exist at http://127.0.0.1:1")

    monkeypatch.setattr("cachefs.agent.launch.check_volume", refuse)
    assert cachefs("mount", SOURCE, rig.mountpoint)[0::2] == (
        1,
        "cachefs: bucket 'bucket' does not exist at http://127.0.0.1:1",
    )
    assert cachefs("mount", "bucket", rig.mountpoint)[0] == 2
    assert cachefs("mount", SOURCE, rig.mountpoint, "-o", "rw")[0::2] == (
        2,
        "cachefs: -o rw: writing is not offered yet; mount with -o ro",
    )
    assert cachefs("mount", SOURCE, rig.mountpoint, "-o", "cache_sise=1")[0] == 2
    rig.assert_nothing_left()


def test_nonempty_is_allowed_when_it_is_meant(rig: Rig, cachefs: Command) -> None:
    (rig.mountpoint / "x").touch()
    assert cachefs("mount", SOURCE, rig.mountpoint, "-o", "nonempty")[0] == 0
    assert cachefs("umount", rig.mountpoint)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGSTOP, None])
def test_timeout_takes_everything_back(
    rig: Rig, cachefs: Command, number: signal.Signals | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker never gets ready; in the second case its supervisor is stopped as well and must be killed."""
    rig.behave("mute")
    monkeypatch.setattr(launch, "_END_S", 0.5)

    def stop() -> None:
        until(rig.started)
        for pid in registry.supervisors_of(str(rig.mountpoint)):
            os.kill(pid, number or 0)

    stopper = threading.Thread(target=stop)
    stopper.start()
    code, _, err = cachefs("mount", SOURCE, rig.mountpoint, "--ready-timeout", "600ms")
    stopper.join()
    assert code == 1
    assert "was not ready within 0.6 s" in err
    rig.assert_nothing_left()


def test_interrupted_mount_leaves_nothing(rig: Rig, cachefs: Command) -> None:
    rig.behave("mute")

    def interrupt() -> None:
        until(rig.started)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _, said = cachefs("mount", SOURCE, rig.mountpoint)
    thread.join()
    assert code == 130, said
    rig.assert_nothing_left()


def test_two_mounts_of_one_directory_at_once_give_one_mount(rig: Rig, cachefs: Command) -> None:
    with claimed(str(rig.mountpoint), rig.runtime):
        assert "another `cachefs mount`" in cachefs("mount", SOURCE, rig.mountpoint)[2]
    assert cachefs("mount", SOURCE, rig.mountpoint)[0] == 0
    assert cachefs("umount", rig.mountpoint)[0] == 0


def test_busy_umount_and_its_ways_out(rig: Rig, cachefs: Command) -> None:
    assert cachefs("mount", SOURCE, rig.mountpoint)[0] == 0
    holder = subprocess.Popen(["sleep", "60"], cwd=rig.mountpoint)
    try:
        code, _, err = cachefs("umount", rig.mountpoint)
        assert code == 1
        assert f"in use by sleep (pid {holder.pid}): working directory {rig.mountpoint}" in err
        code, out, _ = cachefs("umount", rig.mountpoint, "--lazy")
        assert code == 0
        assert "serves its open files until they are gone" in out
        assert cachefs("umount", rig.mountpoint, "--force")[0] == 0
        rig.assert_nothing_left()
    finally:
        holder.kill()
        holder.wait()


def test_umount_of_foreign_mounts_is_refused(rig: Rig, cachefs: Command) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(rig.mountpoint)], check=True)
    try:
        assert "is a mount of type tmpfs, not of cachefs" in cachefs("umount", rig.mountpoint, "--force")[2]
        assert cachefs("mount", SOURCE, rig.mountpoint)[0] == 0  # an empty volume of a container is a fine place
        assert cachefs("umount", rig.mountpoint)[0] == 0
        assert rig.is_mounted()
    finally:
        subprocess.run(["umount", str(rig.mountpoint)], check=True)


def is_serving(rig: Rig) -> bool:
    """The mount is there a moment before its supervisor listens."""
    try:
        return rig.is_mounted() and rig.status()["state"] == "serving"
    except ControlError:
        return False


def test_foreground_serves_until_the_terminal_says_stop(rig: Rig) -> None:
    code = (
        "import json, sys\nfrom cachefs.cli import main\nfrom cachefs.mount import launch\nmake = launch.make_plan\n"
        "launch.make_plan = lambda *a, **k: {**make(*a, **k), 'worker_argv': json.loads(sys.argv[1])}\n"
        "import cachefs.agent.launch\ncachefs.agent.launch.check_volume = lambda *_: []\nmain.main(sys.argv[2:])"
    )
    arguments = [json.dumps(rig.plan()["worker_argv"]), "mount", SOURCE, str(rig.mountpoint), "--foreground"]
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, env=dict(os.environ))
    rig.supervisors.append(child)
    try:
        until(lambda: is_serving(rig), 15)
        assert rig.status()["supervisor_pid"] == child.pid
        rig.behave("crash", "words of the worker")
        rig.kill_worker()
        until(lambda: rig.status()["state"] == "failed")
        assert "words of the worker" in rig.status()["last_crash"]["what"]
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
        assert child.returncode == 0
        assert b"is served by worker" in err
        assert err.count(b"words of the worker\n") >= 4  # passed on as the worker wrote it
        rig.assert_nothing_left()
    finally:
        child.kill()
        child.communicate()


# -- the mount helper ------------------------------------------------------------------------------


def test_mount_helper_mounts_as_mount_8_calls_it(rig: Rig, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys.env"
    keys.write_text("AWS_ACCESS_KEY_ID=a\n# comment\nexport AWS_SECRET_ACCESS_KEY='b c'\n")
    keys.chmod(0o600)
    options = f"rw,_netdev,nofail,x-systemd.automount,cache_size=64MiB,allow_other,env-file={keys}"
    code = mount_helper.run([SOURCE, str(rig.mountpoint), "-n", "-o", options], "mount.cachefs")
    assert code == 0, capfd.readouterr()
    assert "WARNING: s3://bucket/prefix is mounted read-only" in capfd.readouterr().err
    environ = Path(f"/proc/{rig.status()['worker_pid']}/environ").read_bytes().split(b"\0")
    assert {b"AWS_ACCESS_KEY_ID=a", b"AWS_SECRET_ACCESS_KEY=b c"} <= set(environ)
    assert b"b c" not in Path(f"/proc/{rig.status()['supervisor_pid']}/cmdline").read_bytes()
    subprocess.run(["umount", str(rig.mountpoint)], check=True)
    until(lambda: not registry.supervisors_of(str(rig.mountpoint)))
    rig.assert_nothing_left()


def test_mount_helper_exit_codes(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.run([SOURCE, "/nonexistent/x"], "mount.cachefs") == 32
    assert "mount.cachefs: /nonexistent/x does not exist" in capfd.readouterr().err
    assert mount_helper.run([SOURCE], "mount.cachefs") == 1
    assert mount_helper.run([SOURCE, str(rig.mountpoint), "-o", "no_such"], "mount.cachefs") == 1
    assert mount_helper.run([SOURCE, str(rig.mountpoint), "-fo", "ro"], "mount.cachefs") == 1
    assert mount_helper.run([SOURCE, str(rig.mountpoint), "-f", "-s", "-o", "no_such"], "mount.cachefs") == 0
    assert not rig.is_mounted()


# -- without root ----------------------------------------------------------------------------------


def test_fusermount_mounts_and_unmounts(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel.find_fusermount() is None:
        pytest.skip("fusermount3 is not installed")
    monkeypatch.setattr(kernel, "may_mount", lambda: False)
    place = str(rig.mountpoint)
    device = kernel.mount(kernel.MountOptions("s3://b/a,b\\c", place, read_only=True, allow_other=True))
    try:
        mount = mountinfo.find_mount(place)
        assert mount is not None
        assert (mount.fstype, mount.source) == ("fuse.cachefs", "s3://b/a,b\\c")
        assert IN_HEADER.unpack_from(kernel.read_init(device))[1] == Opcode.INIT
        assert kernel.is_connected(device)
        kernel.unmount(place)
        assert not kernel.is_connected(device)
        with pytest.raises(kernel.MountFailure, match=r"not found|not mounted|Invalid"):
            kernel.unmount(place, detach=True)
    finally:
        os.close(device)
    rig.mountpoint.rmdir()
    with pytest.raises(kernel.MountFailure, match="No such file or directory"):
        kernel.mount(kernel.MountOptions("s3://b", place, read_only=True, allow_other=False))
    rig.mountpoint.mkdir()


def test_user_without_rights_can_mount_and_unmount(rig: Rig) -> None:
    """As nobody, with the Python of the system, which that user may run: the supervisor needs the standard library
    only.
    """
    python = Path("/usr/bin/python3")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    check = "import os, sys; os.listdir(sys.argv[1]); open('/dev/fuse', 'r+b', 0); sys.exit(sys.version_info < (3, 11))"
    if kernel.find_fusermount() is None or not python.exists():
        pytest.skip("needs fusermount3 and a Python of the system")
    if subprocess.run(
        [*as_nobody, str(python), "-c", check, str(ROOT / "cachefs")], check=False, capture_output=True
    ).returncode:
        pytest.skip("the user nobody cannot run this checkout, or may not open /dev/fuse")
    for directory in (rig.base, *rig.base.parents):
        if directory.stat().st_uid == 0 and directory not in (Path("/"), Path("/tmp")):
            directory.chmod(0o755)
    for path in [rig.mountpoint, rig.behaviour, *Path(rig.runtime.path).rglob("*"), Path(rig.runtime.path)]:
        os.chown(path, 65534, 65534)
    rig.command_prefix = [*as_nobody, str(python)]
    argv = [str(python), *rig.plan()["worker_argv"][1:]]
    supervisor = rig.mount(worker_argv=argv, python=str(python))
    mount = mountinfo.find_mount(str(rig.mountpoint))
    assert mount is not None
    assert mount.is_cachefs
    read = [
        *as_nobody,
        str(python),
        "-c",
        "import sys; print(len(open(sys.argv[1], 'rb').read(4096)))",
        str(rig.pattern),
    ]
    for _ in range(2):
        assert subprocess.run(read, check=True, capture_output=True, timeout=10).stdout.strip() == b"4096"
        rig.kill_worker()
    supervisor.terminate()
    assert supervisor.wait(5) == 0
    rig.assert_nothing_left()
