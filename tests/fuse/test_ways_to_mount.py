"""In the foreground, through fstab's helper, and with a configuration file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
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
