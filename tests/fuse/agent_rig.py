"""What tests of the life of agents share: a mount with something cached, and something in the way of agents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachefs.runtime import RuntimeDir
from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages

MIB = 1 << 20
OBJECTS = {name: content(name, MIB + 77) for name in ("cached", "later", "last")}


def mount_objects(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str, name: str = "mnt") -> Mount:
    """Mount a bucket that holds `OBJECTS`, with all names known and "cached" cached."""
    bucket.fill(OBJECTS)
    options = ("--metadata-ttl=forever", *options)
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", *options, name=name)
    assert (mount.path / "cached").read_bytes() == OBJECTS["cached"]
    assert sorted(os.listdir(mount.path)) == sorted(OBJECTS)
    return mount


def reads_right(mount: Mount, name: str) -> bool:
    """Read an object without the kernel's pages."""
    evict_pages(mount.path / name)
    return (mount.path / name).read_bytes() == OBJECTS[name]


def agent_file(node: Node, suffix: str) -> Path:
    """A file of the node's agent in the runtime directory."""
    return Path(RuntimeDir(str(node.runtime_dir)).agent(str(node.cache_dir), suffix))


@contextmanager
def no_agent_can_start(node: Node) -> Iterator[None]:
    """The next agent finds something in its way, whatever it tries."""
    lock = agent_file(node, "lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    try:
        yield
    finally:
        lock.rmdir()
