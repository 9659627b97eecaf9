"""`cachefs evict`, `pin` and `unpin` on a real mount."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.fuse.test_warmup import jobs, last, run
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages

MIB = 1 << 20
OBJECTS = {f"{part}/{n:02}": content(f"{part}-{n}", MIB) for n in range(12) for part in ("a", "b")}


def missing(mount: Mount, name: str) -> int:
    return int(last(run(mount.node, "warmup", "--check", "--json", str(mount.path / name)))["missing_blocks"])


def pinned(node: Node) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run(node, "pin", "--show", "--json").stdout)["pins"]
    return found


@pytest.fixture
def mount(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> Mount:
    bucket.fill(OBJECTS)
    node = make_node(shm_size="16MiB", cache_size="20MiB", idle_timeout="20s")
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")


def test_evicted_files_are_fetched_again(mount: Mount, proxy: FaultProxy) -> None:
    node = mount.node
    assert run(node, "warmup", str(mount.path / "a"), str(mount.path / "b/00")).returncode == 0
    done = run(node, "evict", str(mount.path / "a"))
    assert done.returncode == 0, done.stderr
    assert "12 blocks of 12 files" in done.stdout
    assert missing(mount, "a") == 12
    assert missing(mount, "b/00") == 0
    fetched = proxy.count("get")
    assert (mount.path / "a/03").read_bytes() == OBJECTS["a/03"]
    assert proxy.count("get") == fetched + 1


@pytest.mark.slow
def test_what_is_evicted_does_not_come_back_from_the_queue_for_the_disk(mount: Mount) -> None:
    assert run(mount.node, "warmup", str(mount.path / "a")).returncode == 0
    assert run(mount.node, "evict", str(mount.path / "a")).returncode == 0
    time.sleep(3)
    assert missing(mount, "a") == 12


def test_pinned_files_stay_also_after_the_agent_was_killed(mount: Mount) -> None:
    node = mount.node
    assert run(node, "warmup", str(mount.path / "a")).returncode == 0
    done = run(node, "pin", str(mount.path / "a"))
    assert done.returncode == 0, done.stderr
    (pin,) = pinned(node)
    assert (pin["path"], pin["files"], pin["until"]) == (str(mount.path / "a"), 12, None)
    refused = run(node, "evict", str(mount.path / "a/01"))
    assert refused.returncode == 1
    assert "a/01: it is pinned" in refused.stdout

    node.wait_for_agent(node.kill_agent())
    wait_until(lambda: node.status()["mounts"][0]["health"] == "ok", 15, "the mount has its agent")
    for _ in range(3):
        for n in range(12):
            assert (mount.path / f"b/{n:02}").read_bytes() == OBJECTS[f"b/{n:02}"]
            evict_pages(mount.path / f"b/{n:02}")
    assert missing(mount, "a") == 0
    assert len(pinned(node)) == 1

    let_go = run(node, "unpin", str(mount.path))
    assert let_go.returncode == 0, let_go.stderr
    assert pinned(node) == []
    assert run(node, "unpin", str(mount.path)).returncode == 1
    assert run(node, "evict", str(mount.path / "a")).returncode == 0


def test_too_much_cannot_be_pinned(mount: Mount) -> None:
    done = run(mount.node, "pin", str(mount.path))
    assert done.returncode == 1
    assert "may take" in done.stderr
    assert pinned(mount.node) == []
    assert jobs(mount.node)[-1]["state"] == "failed"


@pytest.mark.slow
def test_a_pin_ends(mount: Mount) -> None:
    node = mount.node
    assert run(node, "warmup", str(mount.path / "a/00")).returncode == 0
    assert run(node, "pin", "--for", "1s", str(mount.path / "a/00")).returncode == 0
    assert pinned(node)[0]["until"] > 0
    wait_until(lambda: pinned(node) == [], 10, "it is over")
    wait_until(lambda: run(node, "evict", str(mount.path / "a/00")).returncode == 0, 20, "and is let go of")
    assert run(node, "pin", "--for", "never", str(mount.path / "a/00")).returncode == 2
    assert "nothing is pinned" in run(node, "pin").stdout
