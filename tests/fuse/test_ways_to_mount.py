"""In the foreground, through fstab's helper, and with a configuration file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.machine import ALONE, wait_until
from tests.support.mounts import CACHEFS, Bucket, Mount, Node
from tests.support.programs import REPOSITORY

HELPER = (sys.executable, "-c", "import sys; from cachefs.cli.mount_helper import main; sys.exit(main())")


@pytest.fixture
def place(node: Node) -> Path:
    """An empty directory to mount on."""
    directory = node.base / "mnt"
    directory.mkdir()
    return directory


def test_foreground(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    bucket.put("file", b"x")
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    command = [*CACHEFS, "mount", *node.options, "--foreground", endpoint, bucket.url, str(place)]
    with subprocess.Popen(
        command, env=node.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        mount = Mount(node, place)
        wait_until(lambda: mount.state().get("state") == "serving", 20, "the mount serves")
        assert (place / "file").read_bytes() == b"x"
        assert child.poll() is None
        assert child.pid == mount.supervisor_pid
        child.terminate()
        _, complaints = child.communicate(timeout=15)
    assert child.returncode == 0
    assert b"supervisor[" in complaints
    assert not mount.is_mounted
    assert not node.processes("worker")


def test_the_helper_of_fstab(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    """As mount(8) calls it: SOURCE DIR -o options, in an environment without keys."""
    bucket.put("file", b"x")
    keys = node.base / "keys.env"
    keys.write_text("".join(f"{name}={value}\n" for name, value in node.environment.items() if name.startswith("AWS")))
    keys.chmod(0o600)
    environment = {name: value for name, value in node.environment.items() if not name.startswith("AWS")}
    words = [option.removeprefix("--") for option in node.options]
    words += [
        f"endpoint-url={proxy.endpoint_url}",
        f"env-file={keys}",
        "ro",
        "_netdev",
        "nofail",
        "noauto",
        "x-systemd.a=b",
    ]
    helper = [*HELPER, bucket.url, str(place), "-o", ",".join(words)]
    done = subprocess.run(
        helper, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    node.mounts.append(Mount(node, place))
    assert (place / "file").read_bytes() == b"x"


def test_the_helper_of_fstab_refuses_with_one_line(node: Node, place: Path) -> None:
    helper = [*HELPER, "s3://bucket", str(place), "-o", "no-such-option=1"]
    done = subprocess.run(helper, env=node.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no-such-option" in done.stderr


def test_a_configuration_file(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", b"x")
    (node.base / "c.toml").write_text(
        f'endpoint-url = "{proxy.endpoint_url}"\nfile-mode = "0400"\nmetadata-ttl = "1h"\n'
    )
    mount = node.mount(bucket.url, f"--config={node.base}/c.toml")
    assert os.stat(mount.path / "file").st_mode & 0o777 == 0o400


def test_a_configuration_file_of_an_fstab_line(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    bucket.put("file", b"x")
    (node.base / "c.toml").write_text(f'endpoint-url = "{proxy.endpoint_url}"\nfile-mode = "0400"\n')
    words = [*(option.removeprefix("--") for option in node.options), f"config={node.base}/c.toml", "ro"]
    helper = [*HELPER, bucket.url, str(place), "-o", ",".join(words)]
    done = subprocess.run(helper, env=node.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    node.mounts.append(Mount(node, place))
    assert os.stat(place / "file").st_mode & 0o777 == 0o400


LET_GO = "umount -c -i -l -a -t fuse.cachefs 2>/dev/null\n"
"""A new mount name space has copies of all mounts: those of other tests must not live as long as it does."""

MOUNT_8 = (
    LET_GO
    + """
sbin=$(readlink -f /sbin); base=$1; place=$2; shift 2
mkdir -p "$base/over" && mount -t tmpfs tmpfs "$base/over" && mkdir "$base/over/u" "$base/over/w" &&
mount -t overlay overlay -o "lowerdir=$sbin,upperdir=$base/over/u,workdir=$base/over/w" "$sbin" || exit 77
cp "$base/helper" "$sbin/mount.fuse.cachefs"
trap 'umount "$place" 2>/dev/null' EXIT
fstab() { mount -T "$base/fstab" "$@" 2>&1; echo "= $?"; }
fstab -a
cat "$place/file"; echo
fstab -a
fstab -o remount "$place"
CACHEFS_RUNTIME_DIR="$base/run" mount -o remount,ro "$place" 2>&1; echo "= $?"
fstab -o remount,cache-size=300MiB "$place"
umount "$place"; echo "= $?"
"""
)


def test_fstab_through_mount_8(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path, needs_root: None) -> None:
    """The real mount(8), in a mount name space of its own where it finds our helper."""
    bucket.put("file", b"content")
    helper = node.base / "helper"
    helper.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{HELPER[2]}" "$@"\n')
    helper.chmod(0o755)
    words = [*(option.removeprefix("--") for option in node.options), f"endpoint-url={proxy.endpoint_url}"]
    (node.base / "fstab").write_text(f"{bucket.url} {place} fuse.cachefs ro,_netdev,nofail,{','.join(words)} 0 0\n")
    command = ["unshare", "-m", "sh", "-c", ALONE + MOUNT_8, "sh", str(node.base), str(place)]
    done = subprocess.run(
        command, env=node.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == 77:
        pytest.skip(f"no overlay over /sbin: {done.stderr}")
    first, read, again, remounted, by_place, refused, outcome, ended = done.stdout.splitlines()
    assert [first, read, again, remounted, by_place, ended] == ["= 0", "content", "= 0", "= 0", "= 0", "= 0"], done
    assert "remounting cannot change cache-size from 512MiB to 300MiB; unmount it and mount it again" in refused
    assert outcome == "= 32"
    wait_until(lambda: not node.processes(), 15, "nothing is left")


CONTAINER = (
    LET_GO
    + """
place=$1; size=$2; shift 2
mount -t tmpfs -o "size=$size" tmpfs /dev/shm || exit 77
"$@" || exit $?
cat "$place/file"; echo
umount "$place"
"""
)


@pytest.mark.parametrize(
    ("size", "said"), [("64m", "--shm-size is 32MiB here: half of /dev/shm"), ("1m", "the shm tier is off: half of")]
)
def test_defaults_work_in_a_container(
    node: Node, bucket: Bucket, proxy: FaultProxy, place: Path, needs_root: None, size: str, said: str
) -> None:
    """Its /dev/shm is small, and nobody gave a size."""
    bucket.put("file", b"content")
    options = [option for option in node.options if "-size" not in option and "shm" not in option]
    command = [*CACHEFS, "mount", *options, f"--endpoint-url={proxy.endpoint_url}", bucket.url, str(place)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", ALONE + CONTAINER, "sh", str(place), size, *command],
        env=node.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert done.stdout.splitlines()[-1] == "content"
    wait_until(lambda: not node.processes(), 15, "nothing is left")
