"""A volume that has grown shows so wherever it is staged anew: its context says how large it was at first."""

from __future__ import annotations

import time
from contextlib import closing

from cachefs.config import PeerConfig
from csi.etcd_records import EtcdRecords, settings_of
from csi.node_sizes import TIMEOUT_S
from csi.records import VOLUMES
from csi.volumes import Made, State, Volume, volume_id_of
from tests.csi.node_fixtures import FakeNode, fake
from tests.csi.node_rig import KubeletVolume
from tests.csi.rig import Client, DriverProcess
from tests.support.etcd_server import EtcdServer

__all__ = ["fake"]

FIRST, GROWN = 1000, 5000
VOLUME = Volume(
    volume_id=volume_id_of("a"), name="a", parameters={"bucket": "bucket-1"}, made=Made.DATASET, owned=False,
    prefix="", capacity_bytes=GROWN, first_capacity_bytes=FIRST, state=State.READY,
)  # fmt: skip


def size(fake: FakeNode, volume_id: str = VOLUME.volume_id) -> int:
    """Stage a volume with the context that it was made with; return how large it shows itself."""
    volume = fake.volume(volume_id, VOLUME.context)
    volume.stage()
    found = volume.stats(volume.staging).usage[0].total
    volume.unstage()
    return int(found)


def test_records_that_are_reached_say_how_large_a_volume_is(fake: FakeNode) -> None:
    assert size(fake) == FIRST, "nobody knows better"
    with EtcdServer() as etcd:
        settings = settings_of(PeerConfig(etcd=etcd.endpoint, cluster="sizes"))
        with closing(EtcdRecords(settings, timeout_s=TIMEOUT_S)) as records:
            records.put(VOLUMES, VOLUME.volume_id, VOLUME.record())
            fake.restart_plugin(records)
            assert size(fake) == GROWN
            assert size(fake, "static") == FIRST
            assert size(fake, volume_id_of("deleted meanwhile")) == FIRST
            etcd.pause()
            try:
                began = time.monotonic()
                assert size(fake) == FIRST
                assert time.monotonic() - began < 5 * TIMEOUT_S
            finally:
                etcd.resume()
            began = time.monotonic()
            assert size(fake) == FIRST, "records that did not answer are left alone for a while"
            assert time.monotonic() - began < TIMEOUT_S


def test_records_that_cannot_be_read_hold_nobody_up(fake: FakeNode) -> None:
    with EtcdServer() as etcd:
        settings = settings_of(PeerConfig(etcd=etcd.endpoint, cluster="sizes"))
        with closing(EtcdRecords(settings, timeout_s=TIMEOUT_S)) as records:
            records.put(VOLUMES, VOLUME.volume_id, {"volume_id": "of another version"})
            fake.restart_plugin(records)
            assert size(fake) == FIRST


def test_the_plugin_of_a_node_asks_the_etcd_of_its_peers(fake: FakeNode) -> None:
    settings = fake.settings
    with EtcdServer() as etcd:
        peers = settings_of(PeerConfig(etcd=etcd.endpoint, cluster="sizes"))
        with closing(EtcdRecords(peers)) as records:
            records.put(VOLUMES, VOLUME.volume_id, VOLUME.record())
        arguments = [
            "--mode=node", "--node-id=node-a", f"--keeper={fake.keeper.path}", f"--kubelet-dir={settings.kubelet_dir}",
            f"--credentials-dir={settings.credentials_dir}", f"--runtime-dir={settings.config.cache.runtime_dir}",
            f"--cache-dir={settings.config.cache.cache_dir}", "--shm-size=0", f"--etcd={etcd.endpoint}",
            "--cluster=sizes", "--peer-insecure",
        ]  # fmt: skip
        with DriverProcess(fake.base / "own.sock", *arguments) as driver, Client(driver.path) as client:
            volume = KubeletVolume(client.node, settings.kubelet_dir, VOLUME.volume_id, VOLUME.context)
            volume.stage()
            assert volume.stats(volume.staging).usage[0].total == GROWN
            volume.unstage()
