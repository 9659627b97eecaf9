"""How much of a dataset a node holds: from a real agent, through etcd, to `cachefs schedule` and labels of nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cachefs.config import S3Config
from csi.labels import agent_holdings
from csi.workloads.holders import dataset_of, find_holders
from tests.support.etcd_server import EtcdServer
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Node
from tests.support.programs import content, read_and_compare

MIB = 1 << 20
OBJECTS = {"set/large": content("large", 20 * MIB), "other/small": content("small", 3 * MIB)}
OBJECTS |= {f"set/{number}": content(str(number), 3000) for number in range(20)}


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


def test_what_is_read_is_what_the_node_holds(node: Node, bucket: Bucket, etcd: EtcdServer) -> None:
    bucket.fill(OBJECTS)
    endpoint = bucket.server.endpoint_url
    options = [f"--endpoint-url={endpoint}", f"--etcd={etcd.endpoint}", "--peer-insecure", "--node-name=worker-7"]
    mount = node.mount(f"{bucket.url}/set", *options)
    assert agent_holdings(str(node.runtime_dir)) is None, "it was not counted yet"
    read_and_compare(mount.path, {name.removeprefix("set/"): body for name, body in OBJECTS.items() if "set/" in name})
    config = S3Config(source=f"{bucket.url}/set", endpoint_url=endpoint)
    wait_until(lambda: find_holders(config, etcd.settings()) is not None, 15, "the node says what it holds")
    found = find_holders(config, etcd.settings())
    assert found is not None
    [(name, held)] = found.nodes
    assert name == "worker-7"
    whole = sum(len(body) for key, body in OBJECTS.items() if "set/" in key)
    assert whole <= held <= 1.1 * whole, "blocks in both tiers count once"
    assert agent_holdings(str(node.runtime_dir)) == {dataset_of(config): held}

    manifest = node.base / "pod.yaml"
    manifest.write_text("kind: Pod\nmetadata: {name: p}\nspec:\n  containers:\n  - name: a\n    image: b\n")
    done = node.run("schedule", "-f", str(manifest), f"--dataset={config.source}", *options[:2])
    assert done.returncode == 0, done.stderr
    assert "- worker-7" in done.stdout
