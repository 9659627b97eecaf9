"""Nodes that mount a manifest, or with an identity, are peers of those who do the same and of nobody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.test_manifests import BODIES, LARGE, pin
from tests.support.etcd_server import EtcdServer
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node

KEY = ".cachefs/snapshots/s1"
NAMES = [*BODIES, "large"]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def options(etcd: EtcdServer, bucket: Bucket, proxy: FaultProxy, tmp_path: Path) -> list[str]:
    """What all nodes of this test's own cluster are mounted with."""
    bucket.fill({**BODIES, "large": LARGE})
    pin(bucket)
    secret = tmp_path / "secret"
    secret.write_text("correct horse battery staple\n")
    secret.chmod(0o600)
    return [
        f"--endpoint-url={proxy.endpoint_url}",
        f"--etcd={etcd.endpoint}",
        f"--cluster={bucket.name}",
        f"--peer-secret-file={secret}",
        "--prefetch=off",
    ]


def holders(node: Node) -> list[set[str]]:
    """Who has which volume, as this node sees it."""
    return sorted((set(names) for names in node.status()["agents"][0]["cluster"]["volumes"].values()), key=sorted)


def read_all(mount: Mount) -> None:
    for name in NAMES:
        assert (mount.path / name).read_bytes() == (LARGE if name == "large" else BODIES[name])


@pytest.mark.slow
def test_a_manifest_is_shared_by_those_who_mount_it(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str], proxy: FaultProxy
) -> None:
    one, two, three = make_node(), make_node(), make_node()
    pinned = [
        node.mount(bucket.url, *options, f"--manifest={KEY}", f"--node-name={name}")
        for node, name in ((one, "one"), (two, "two"))
    ]
    bucket.put("data/new", b"new")
    live = three.mount(bucket.url, *options, "--consistency=immutable", "--node-name=three")
    for node in (one, two):
        wait_until(lambda node=node: {"one", "two"} in holders(node), 10, "both hold the pinned volume")  # type: ignore[misc]
    wait_until(lambda: {"three"} in holders(three), 10, "one node holds the bucket itself")
    proxy.forget()
    for mount in pinned:
        read_all(mount)
        assert "new" not in os.listdir(mount.path / "data")
    assert {key: proxy.count("get", key) for key in BODIES} == dict.fromkeys(BODIES, 1)
    assert proxy.count("list") == 0
    assert "new" in os.listdir(live.path / "data")


def test_identities_are_no_peers_of_each_other(
    make_node: Callable[..., Node], bucket: Bucket, options: list[str], proxy: FaultProxy
) -> None:
    nodes = make_node(), make_node(), make_node()
    mounts = [
        node.mount(bucket.url, *options, f"--identity={identity}", f"--node-name={name}")
        for node, identity, name in zip(nodes, ("mine", "mine", "yours"), ("one", "two", "three"), strict=True)
    ]
    for node in nodes[:2]:
        wait_until(lambda node=node: {"one", "two"} in holders(node), 10, "both hold the volume")  # type: ignore[misc]
    wait_until(lambda: {"three"} in holders(nodes[2]), 10, "the third has one of its own")
    proxy.forget()
    for mount in mounts[:2]:
        read_all(mount)
    assert {key: proxy.count("get", key) for key in BODIES} == dict.fromkeys(BODIES, 1)
    read_all(mounts[2])
    assert {key: proxy.count("get", key) for key in BODIES} == dict.fromkeys(BODIES, 2)
