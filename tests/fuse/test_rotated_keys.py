"""Keys that are replaced under a live mount, as those jobs do that renew them every hour: R6 of docs/SEMANTICS.md."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.memory_s3 import MemoryS3
from tests.support.machine import wait_until
from tests.support.mounts import Mount, Node
from tests.support.programs import errno_name

FILES = 40


class Keys:
    """A file of keys, and the server that takes one of them."""

    def __init__(self, server: MemoryS3, path: Path) -> None:
        self.server = server
        self.path = path

    def write(self, access_key: str) -> None:
        self.path.write_text(
            f"[default]\naws_access_key_id={access_key}\naws_secret_access_key=s\naws_session_token=t\n"
        )

    def end(self) -> None:
        """The time of all keys but NEW is over."""
        self.server.access_key = "NEW/"


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    with MemoryS3() as server:
        for number in range(FILES):
            server.store.put(f"d/{number}", b"x" * 1000)
        made = Keys(server, tmp_path / "credentials")
        made.write("OLD")
        yield made


@pytest.fixture
def mount(keys: Keys) -> Iterator[Mount]:
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(keys.path), "AWS_EC2_METADATA_DISABLED": "true"}
    with Node(environment) as node:
        made = node.mount(
            f"s3://{keys.server.bucket}", f"--endpoint-url={keys.server.endpoint_url}", "--metadata-ttl=1h"
        )
        assert sorted(path.name for path in (made.path / "d").iterdir()) == sorted(map(str, range(FILES)))
        yield made


def read(mount: Mount, number: int) -> str:
    return errno_name(lambda: (mount.path / f"d/{number}").read_bytes())


def test_r6_keys_that_were_replaced_in_time_are_used(mount: Mount, keys: Keys) -> None:
    assert read(mount, 0) == ""
    keys.write("NEW")
    keys.end()
    assert [read(mount, number) for number in range(1, 9)] == [""] * 8


def test_r6_keys_that_are_replaced_late_are_used_as_soon_as_they_are_there(mount: Mount, keys: Keys) -> None:
    assert read(mount, 0) == ""
    keys.end()
    assert read(mount, 1) == "EACCES"
    keys.write("NEW")
    time.sleep(1.1)
    assert read(mount, 1) == ""


def test_an_upgrade_finds_keys_anew(mount: Mount, keys: Keys) -> None:
    assert read(mount, 0) == ""
    keys.end()
    assert read(mount, 1) == "EACCES"
    keys.write("NEW")
    done = mount.node.run("upgrade", f"--runtime-dir={mount.node.runtime_dir}", str(mount.path))
    assert done.returncode == 0, done.stderr
    wait_until(lambda: read(mount, 2) == "", 5, "the new keys are used")
