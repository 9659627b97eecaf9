"""Mounts of one bucket with the credentials of different people (`s3.identity`) share nothing that was fetched."""

from __future__ import annotations

import os
import time

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages

BODIES = {f"d/{number}": content(f"{number}", 30_000) for number in range(5)} | {"large": content("large", 2 << 20)}


def mount_as(node: Node, bucket: Bucket, proxy: FaultProxy, identity: str, name: str) -> Mount:
    options = [f"--endpoint-url={proxy.endpoint_url}", "--prefetch=off", f"--identity={identity}"]
    return node.mount(bucket.url, *options, name=name)


def read_all(mount: Mount) -> None:
    for key, body in BODIES.items():
        evict_pages(mount.path / key)
        assert (mount.path / key).read_bytes() == body


def asked(proxy: FaultProxy) -> dict[str, int]:
    """How often each object was asked for since the last time."""
    found = {key: proxy.count("get", key) for key in BODIES}
    proxy.forget()
    return found


def test_two_identities_share_nothing(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(BODIES)
    first = mount_as(node, bucket, proxy, "one", "first")
    read_all(first)
    cost = asked(proxy)
    assert min(cost.values()) >= 1
    second = mount_as(node, bucket, proxy, "two", "second")
    assert proxy.count("list") >= 1  # names are asked for anew
    read_all(second)
    assert asked(proxy) == cost
    same = mount_as(node, bucket, proxy, "one", "same")
    read_all(same)
    read_all(second)
    assert sum(asked(proxy).values()) == 0
    assert len(node.processes("agent")) == 1
    inodes = [os.stat(mount.path / "large").st_ino for mount in (first, second, same)]
    assert inodes[0] == inodes[2] != inodes[1]


def test_nobody_reads_with_the_keys_or_from_the_cache_of_another(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(BODIES)
    node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", name="nobody in particular")
    read_all(mount_as(node, bucket, proxy, "one", "first"))
    right = dict(node.environment)
    node.environment["AWS_SECRET_ACCESS_KEY"] = "wrong"
    place = node.base / "second"
    place.mkdir()
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--identity=two", place=place)
    assert done.returncode != 0
    assert "the secret key is wrong" in done.stderr
    assert not os.path.ismount(place)
    node.environment.clear()
    node.environment.update(right)
    read_all(mount_as(node, bucket, proxy, "one", "third"))


def test_keys_that_are_taken_away_end_reads_of_their_owner_only(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """The keys of both come from files, as the CSI plugin writes them."""
    bucket.fill(BODIES)
    mounts = []
    files = []
    keys = {name: node.environment.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in ("one", "two"):
        file = node.base / f"credentials-{name}"
        file.write_text(
            f"[default]\naws_access_key_id={keys['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key={keys['AWS_SECRET_ACCESS_KEY']}\n"
        )
        node.environment["AWS_SHARED_CREDENTIALS_FILE"] = str(file)
        files.append(file)
        mounts.append(mount_as(node, bucket, proxy, name, name))
    read_all(mounts[0])
    assert os.listdir(mounts[1].path / "d")
    files[1].write_text("[default]\naws_access_key_id=test\naws_secret_access_key=revoked\n")
    time.sleep(1.2)  # files are looked at once a second
    for name in ("d/0", "d/1", "large"):
        with pytest.raises(PermissionError):
            (mounts[1].path / name).read_bytes()
    read_all(mounts[0])
