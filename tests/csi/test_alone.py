"""`cachefs csi --mode all` on a machine without Kubernetes: it starts a keeper and a node service, and ends them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.keeper.client import KeeperClient
from cachefs.runtime import lock_holder, process_alive, shm_directory
from csi.v1 import csi_pb2
from tests.csi.rig import CALL_S, Client, DriverProcess, capability, put
from tests.support.machine import abort_connections, detach, kill, mounts_below, processes_with, wait_until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a keeper mounts: needs root")

END_S = 20.0


class Machine:
    """Where a driver, its keeper and its node service meet. `close` leaves no process and no mount."""

    def __init__(self, server: S3Server) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="alone-", dir="/tmp"))  # short: a socket's address has 107 bytes
        self.kubelet = self.base / "kubelet"
        self.kubelet.mkdir()
        self.socket = str(self.base / "run" / "keeper.sock")
        self.cache = self.base / "cache"
        self.environment = {**server.environment, "TEST_ALONE": str(self.base)}
        self._server = server
        self._mark = f"TEST_ALONE={self.base}"

    def driver(self, **changes: str) -> DriverProcess:
        """`cachefs csi --mode all`, not yet started."""
        options = {
            "mode": "all", "node-id": "here", "keeper": self.socket, "kubelet-dir": str(self.kubelet),
            "state": f"file://{self.base}/state", "endpoint-url": self._server.endpoint_url,
            "cache-dir": str(self.cache), "cache-size": "64MiB", "shm-size": "32MiB", **changes,
        }  # fmt: skip
        arguments = [f"--{name}={text}" for name, text in options.items()]
        return DriverProcess(self.base / "csi.sock", *arguments, environment=self.environment)

    def pids(self) -> tuple[int, int]:
        """Return keeper and node service, 0 for who is not there."""
        keeper = lock_holder(str(self.base / "run" / "keeper.lock"))
        runner = KeeperClient(self.socket).status().runner if keeper else None
        return keeper, runner.pid if runner else 0

    def processes(self) -> dict[int, list[str]]:
        """Return every process that was started here."""
        return processes_with(self._mark)

    def shm(self) -> str:
        """Return where the shm tier is."""
        return shm_directory("/dev/shm", str(self.cache), os.geteuid())

    def close(self) -> None:
        abort_connections(self.base)
        for place, *_ in reversed(mounts_below(self.base)):
            detach(place)
        for _ in range(3):  # a worker may be starting an agent
            for pid in self.processes():
                kill(pid)
        wait_until(lambda: not self.processes(), END_S, "all processes end")
        shutil.rmtree(self.shm(), ignore_errors=True)
        shutil.rmtree(self.base)


@pytest.fixture
def machine(s3_server: S3Server, s3_bucket: str) -> Iterator[Machine]:
    put(s3_server, s3_bucket, "file")
    found = Machine(s3_server)
    try:
        yield found
    finally:
        found.close()


def end(driver: DriverProcess) -> str:
    """SIGTERM; return the log."""
    assert driver.process is not None
    driver.process.terminate()
    assert driver.process.wait(END_S) == 0
    return driver.log.read_text()


def publish(client: Client, bucket: str, machine: Machine) -> str:
    """Make a volume, stage it, and show it at "target"; return its id."""
    volume = client.create("a", bucket=bucket).volume
    where = {"volume_id": volume.volume_id, "staging_target_path": str(machine.kubelet / "staging")}
    more = {"volume_capability": capability(), "volume_context": dict(volume.volume_context)}
    client.node.NodeStageVolume(csi_pb2.NodeStageVolumeRequest(**where, **more), timeout=CALL_S)
    request = csi_pb2.NodePublishVolumeRequest(**where, **more, target_path=str(machine.kubelet / "target"))
    client.node.NodePublishVolume(request, timeout=CALL_S)
    return str(volume.volume_id)


def withdraw(client: Client, volume: str, machine: Machine) -> None:
    """Take it away from "target", and the mount."""
    target, staging = str(machine.kubelet / "target"), str(machine.kubelet / "staging")
    off = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume, target_path=target)
    client.node.NodeUnpublishVolume(off, timeout=CALL_S)
    away = csi_pb2.NodeUnstageVolumeRequest(volume_id=volume, staging_target_path=staging)
    client.node.NodeUnstageVolume(away, timeout=CALL_S)


@needs_root
def test_it_starts_what_it_needs_and_ends_it(machine: Machine, s3_bucket: str) -> None:
    with machine.driver() as driver, Client(driver.path) as client:
        assert all(machine.pids())
        assert client.identity.Probe(csi_pb2.ProbeRequest(), timeout=CALL_S).ready.value
        volume = publish(client, s3_bucket, machine)
        assert (machine.kubelet / "target" / "file").read_bytes() == b"x"
        withdraw(client, volume, machine)
        assert "keeper and node service stay" not in end(driver)
    wait_until(lambda: not machine.processes(), END_S, "keeper, node service and agent end")
    assert not mounts_below(machine.base)
    assert not os.path.exists(machine.shm())


@needs_root
def test_while_something_is_mounted_they_stay_and_the_next_driver_finds_them(machine: Machine, s3_bucket: str) -> None:
    with machine.driver() as driver:
        both = machine.pids()
        with Client(driver.path) as client:
            volume = publish(client, s3_bucket, machine)
        assert "what is mounted is left (1): keeper and node service stay" in end(driver)
        assert (machine.kubelet / "target" / "file").read_bytes() == b"x"
        driver.start()
        assert machine.pids() == both
        with Client(driver.path) as client:
            withdraw(client, volume, machine)
        end(driver)
    assert machine.pids() == both, "who did not start them does not end them"
    for pid in reversed(both):
        kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(map(process_alive, both)), END_S, "SIGTERM ends them")
    assert not mounts_below(machine.base)


def refused(machine: Machine, **changes: str) -> tuple[int, str]:
    """Start a driver that cannot work; return its code and all that it says."""
    driver = machine.driver(**changes)
    try:
        return driver.launch().wait(END_S), driver.log.read_text()
    finally:
        driver.kill()


def test_a_socket_that_no_keeper_would_make_is_refused(machine: Machine) -> None:
    code, said = refused(machine, keeper=f"{machine.base}/run/other.sock")
    assert code == 2
    assert "run/other.sock: nobody listens there, and a keeper would listen at DIR/keeper.sock" in said
    assert not machine.processes()


def test_a_keeper_that_does_not_start_says_why_and_nothing_stays(machine: Machine) -> None:
    code, said = refused(machine, **{"kubelet-dir": str(machine.base / "missing")})
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith("cachefs: the keeper does not start: ")
    assert "missing" in last or os.geteuid() != 0
    wait_until(lambda: not machine.processes(), END_S, "nothing stays")


@needs_root
def test_a_node_service_that_does_not_start_takes_the_keeper_along(machine: Machine) -> None:
    machine.environment["CACHEFS_GRACE"] = "never"  # which only the node service reads
    code, said = refused(machine)
    assert code == 1, said
    assert said.splitlines()[-1].startswith("cachefs: the node service does not start: ")
    wait_until(lambda: not machine.processes(), END_S, "nothing stays")


@needs_root
def test_where_another_driver_listens_nothing_is_started(machine: Machine) -> None:
    with machine.driver():
        before = set(machine.processes())
        code, said = refused(
            machine,
            **{
                "keeper": f"{machine.base}/run2/keeper.sock",
                "cache-size": "0",
                "shm-size": "0",
                "cache-dir": f"{machine.base}/cache2",
            },
        )
        assert code == 1, said
        assert "another driver listens there" in said.splitlines()[-1]
        assert set(machine.processes()) <= before
