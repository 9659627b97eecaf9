"""Mounts of a manifest: what was pinned stays, whatever happens to the bucket (F5 of docs/SEMANTICS.md)."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from cachefs.config import S3Config
from cachefs.store.admin import BucketAdmin
from cachefs.store.manifest import Header
from cachefs.store.manifest_writer import write_manifest
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages

KEY = ".cachefs/snapshots/s1"
BODIES = {f"data/{number:02d}": content(f"{number}", 40_000) for number in range(12)}
LARGE = content("large", 3 << 20)


def pin(bucket: Bucket, prefix: str = "", key: str = KEY) -> None:
    """Write a manifest of what is in the bucket now."""
    config = S3Config(source=bucket.url, endpoint_url=bucket.server.endpoint_url)
    with BucketAdmin(config, bucket.server.environment) as admin:
        raw = io.BytesIO()
        write_manifest(raw, Header(bucket=bucket.name, prefix=prefix, created_ns=1), admin.objects(prefix))
        admin.put(key, raw.getvalue())


def mount_pinned(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str, key: str = KEY, name: str) -> Mount:
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", f"--manifest={key}", *options, name=name)


def tree(mount: Mount) -> dict[str, bytes]:
    return {str(path.relative_to(mount.path)): path.read_bytes() for path in mount.path.rglob("*") if path.is_file()}


@pytest.fixture
def filled(bucket: Bucket) -> Bucket:
    bucket.fill({**BODIES, "large": LARGE})
    pin(bucket)
    return bucket


def test_a_snapshot_stays_as_it_was(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    filled.put("data/new", b"new")
    filled.put("data/03", b"other bytes")
    filled.delete("data/05")
    pinned = mount_pinned(node, filled, proxy, name="pinned")
    asked = proxy.count("list")
    assert sorted(os.listdir(pinned.path)) == ["data", "large"]
    assert sorted(os.listdir(pinned.path / "data")) == [key.removeprefix("data/") for key in BODIES]
    for name in ("data/03", "data/05"):
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)) as raised:
            (pinned.path / name).read_bytes()
        assert raised.value.errno == errno.ESTALE
        assert (pinned.path / name).stat().st_size == len(BODIES[name])
    for name in BODIES.keys() - {"data/03", "data/05"}:
        assert (pinned.path / name).read_bytes() == BODIES[name]
    assert (pinned.path / "large").read_bytes() == LARGE
    assert not (pinned.path / "data/new").exists()
    assert proxy.count("list") == asked
    live = node.mount(filled.url, f"--endpoint-url={proxy.endpoint_url}", name="live")
    assert (live.path / "data/new").read_bytes() == b"new"
    assert (live.path / "data/03").read_bytes() == b"other bytes"
    assert not (live.path / "data/05").exists()
    assert (pinned.path / "data/04").read_bytes() == BODIES["data/04"]


def test_it_shares_blocks_with_the_bucket_itself(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    live = node.mount(filled.url, f"--endpoint-url={proxy.endpoint_url}", "--prefetch=off", name="live")
    assert tree(live) == {**BODIES, "large": LARGE}
    proxy.forget()
    pinned = mount_pinned(node, filled, proxy, "--prefetch=off", name="pinned")
    assert tree(pinned) == {**BODIES, "large": LARGE}
    assert {request.key for request in proxy.requests if request.kind == "get"} <= {KEY}
    assert node.processes("agent") == [node.agent_pid]


def test_what_is_hidden_in_a_mount_stays_hidden(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    live = node.mount(filled.url, f"--endpoint-url={proxy.endpoint_url}", name="live")
    assert sorted(os.listdir(live.path)) == ["data", "large"]
    assert "snapshots" not in os.listdir(live.path / ".cachefs")
    assert not (live.path / ".cachefs/snapshots").exists()


def test_small_files_come_in_bulk(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    pinned = mount_pinned(node, filled, proxy, name="pinned")
    filled.put("data/03", b"other bytes")
    done = node.run("warmup", f"--runtime-dir={node.runtime_dir}", str(pinned.path / "data"))
    assert done.returncode == 1
    assert "data/03: it was deleted or replaced in the store" in done.stdout + done.stderr
    proxy.forget()
    for name in BODIES.keys() - {"data/03"}:
        assert (pinned.path / name).read_bytes() == BODIES[name]
    assert proxy.count("get") == 0


def test_it_survives_the_agent_and_needs_no_store_for_names(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    pinned = mount_pinned(node, filled, proxy, name="pinned")
    assert (pinned.path / "data/01").read_bytes() == BODIES["data/01"]
    inode = (pinned.path / "data/01").stat().st_ino
    filled.delete(KEY)
    proxy.down = True
    other = node.wait_for_agent(node.kill_agent())
    wait_until(lambda: pinned.status()["health"] == "ok", 10, "the new agent is found")
    evict_pages(pinned.path / "data/01")
    assert (pinned.path / "data/01").read_bytes() == BODIES["data/01"]
    assert (pinned.path / "data/01").stat().st_ino == inode
    assert sorted(os.listdir(pinned.path / "data")) == [key.removeprefix("data/") for key in BODIES]
    proxy.down = False
    assert (pinned.path / "data/02").read_bytes() == BODIES["data/02"]
    assert node.agent_pid == other


def test_a_manifest_that_is_replaced_is_another_volume(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    first = mount_pinned(node, filled, proxy, name="first")
    filled.put("data/new", b"new")
    pin(filled)
    second = mount_pinned(node, filled, proxy, name="second")
    assert not (first.path / "data/new").exists()
    assert (second.path / "data/new").read_bytes() == b"new"
    assert not (first.path / "data/new").exists()


def test_what_cannot_be_mounted_is_said(node: Node, filled: Bucket, proxy: FaultProxy, tmp_path: Path) -> None:
    place = node.base / "mnt"
    place.mkdir()
    filled.put("damaged", b"cachefs manifest 1 {}")
    filled.put("foreign", b"P6 640 480")
    filled.put("empty", b"")
    pin(filled, "data/", "of-data")

    def refusal(*options: str, source: str = filled.url) -> str:
        done = node.try_mount(source, f"--endpoint-url={proxy.endpoint_url}", *options, place=place)
        assert done.returncode != 0
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    assert "'missing'" in refusal("--manifest=missing")
    assert "no such object" in refusal("--manifest=missing")
    assert "no whole manifest" in refusal("--manifest=damaged")
    assert "no whole manifest (it is something else)" in refusal("--manifest=foreign")
    assert "no whole manifest (it is empty)" in refusal("--manifest=empty")
    assert "immutable" in refusal(f"--manifest={KEY}", "--consistency=ttl")
    assert "there is nothing of 'other/'" in refusal("--manifest=of-data", source=f"{filled.url}/other")
    assert "only a bucket" in refusal(f"--manifest={KEY}", source=f"file://{tmp_path}")
    part = node.mount(f"{filled.url}/data", f"--endpoint-url={proxy.endpoint_url}", "--manifest=of-data")
    assert (part.path / "07").read_bytes() == BODIES["data/07"]
