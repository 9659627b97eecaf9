"""A driver in this process at a real unix socket, a driver in a process of its own, and clients for both.

with served(tmp_path / "csi.sock", [Identity(controller=True), controller]) as client:
    volume = client.create("a", bucket="b").volume
    assert client.refused(client.controller.CreateVolume, request) == (Code.INVALID_ARGUMENT, "name: must be given")
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from bench.s3_server import S3Server
from csi.server import Server, Service
from csi.status import Code
from csi.v1 import csi_pb2, csi_pb2_grpc

START_S = 20.0
CALL_S = 30.0
Mode = csi_pb2.VolumeCapability.AccessMode


class Client:
    """The three stubs at one socket. Close it."""

    def __init__(self, path: Path | str) -> None:
        self.channel = grpc.insecure_channel(f"unix:{path}")
        stubs: Any = csi_pb2_grpc  # without types
        self.identity = stubs.IdentityStub(self.channel)
        self.controller = stubs.ControllerStub(self.channel)
        self.node = stubs.NodeStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    @staticmethod
    def refused(call: Any, request: Any) -> tuple[Code, str]:
        """Make a call that has to fail; return its code and text."""
        try:
            answer = call(request, timeout=CALL_S)
        except grpc.RpcError as error:
            return Code(error.code()), error.details()
        raise AssertionError(f"was not refused: {answer}")

    def create(self, name: str, *, capacity: int = 0, limit: int = 0, **more: Any) -> Any:
        """CreateVolume; `more` are parameters, or fields of the request if they are no text."""
        return self.controller.CreateVolume(
            create_request(name, capacity=capacity, limit=limit, **more), timeout=CALL_S
        )

    def delete(self, volume_id: str, secrets: Mapping[str, str] | None = None) -> Any:
        """DeleteVolume."""
        request = csi_pb2.DeleteVolumeRequest(volume_id=volume_id, secrets=secrets or {})
        return self.controller.DeleteVolume(request, timeout=CALL_S)

    def snapshot(self, name: str, volume_id: str, **more: Any) -> Any:
        """CreateSnapshot."""
        request = csi_pb2.CreateSnapshotRequest(name=name, source_volume_id=volume_id, **more)
        return self.controller.CreateSnapshot(request, timeout=CALL_S).snapshot

    def volumes(self) -> list[str]:
        """Return the ids of all volumes."""
        answer = self.controller.ListVolumes(csi_pb2.ListVolumesRequest(), timeout=CALL_S)
        return [entry.volume.volume_id for entry in answer.entries]


def capability(mode: int = Mode.MULTI_NODE_READER_ONLY, *, flags: Sequence[str] = (), fs_type: str = "") -> Any:
    """Return a capability for a mount."""
    mount = csi_pb2.VolumeCapability.MountVolume(fs_type=fs_type, mount_flags=flags)
    return csi_pb2.VolumeCapability(mount=mount, access_mode=Mode(mode=mode))  # type: ignore[arg-type]


def create_request(name: str, *, capacity: int = 0, limit: int = 0, **more: Any) -> Any:
    """Return a CreateVolumeRequest; texts in `more` are parameters, everything else fields of the request."""
    parameters = {key.replace("__", "/"): text for key, text in more.items() if isinstance(text, str)}
    fields: dict[str, Any] = {"volume_capabilities": [capability()]}
    fields |= {key: value for key, value in more.items() if not isinstance(value, str)}
    fields["parameters"] = {**parameters, **fields.get("parameters", {})}
    if capacity or limit:
        fields["capacity_range"] = csi_pb2.CapacityRange(required_bytes=capacity, limit_bytes=limit)
    return csi_pb2.CreateVolumeRequest(name=name, **fields)


def claim(namespace: str, name: str) -> dict[str, str]:
    """Return what the provisioner adds to the parameters (--extra-create-metadata)."""
    return {
        "csi.storage.k8s.io/pvc/namespace": namespace,
        "csi.storage.k8s.io/pvc/name": name,
        "csi.storage.k8s.io/pv/name": f"pvc-{namespace}-{name}",
    }


def from_snapshot(snapshot_id: str) -> Any:
    """Return the source of a volume."""
    return csi_pb2.VolumeContentSource(snapshot=csi_pb2.VolumeContentSource.SnapshotSource(snapshot_id=snapshot_id))


def from_volume(volume_id: str) -> Any:
    """Return the source of a volume."""
    return csi_pb2.VolumeContentSource(volume=csi_pb2.VolumeContentSource.VolumeSource(volume_id=volume_id))


def own(bucket: str, namespace: str, name: str, **more: Any) -> dict[str, Any]:
    """Return what `Client.create` needs for a claim with a prefix of its own."""
    template = more.pop("pathTemplate", "${pvc.namespace}/${pvc.name}")
    return {"bucket": bucket, "pathTemplate": template, "parameters": claim(namespace, name), **more}


def keys_of(server: S3Server, bucket: str) -> list[str]:
    """Return all keys of a bucket."""
    return sorted(found["Key"] for found in server.client().list_objects_v2(Bucket=bucket).get("Contents", []))


def put(server: S3Server, bucket: str, *keys: str) -> None:
    """Write objects of one byte."""
    for key in keys:
        server.client().put_object(Bucket=bucket, Key=key, Body=b"x")


def when_deleted(driver: Client, volume_id: str) -> None:
    """Ask for a deletion as the provisioner does, until it is done."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            driver.delete(volume_id)
            return
        except grpc.RpcError as error:
            if Code(error.code()) is not Code.ABORTED:
                raise
            time.sleep(0.05)
    raise AssertionError("it never was deleted")


@contextlib.contextmanager
def served(path: Path, services: Sequence[Service]) -> Iterator[Client]:
    """Services at a socket, in this process."""
    server = Server(str(path), services)
    server.start()
    try:
        with Client(path) as client:
            yield client
    finally:
        server.stop(5)


class DriverProcess:
    """`cachefs csi` in a process of its own. Leaves no process behind."""

    def __init__(self, path: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.log = path.with_name("driver.log")
        self._arguments = arguments
        self._environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def launch(self) -> subprocess.Popen[bytes]:
        """Start it and do not wait."""
        command = [
            sys.executable,
            "-m",
            "cachefs.cli.main",
            "csi",
            "--endpoint",
            f"unix://{self.path}",
            *self._arguments,
        ]
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "CACHEFS_"))}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**kept, "AWS_EC2_METADATA_DISABLED": "true", **self._environment}, stdout=log, stderr=log
            )
        return self.process

    def start(self) -> None:
        """Start it, and return when it answers."""
        process = self.launch()
        deadline = time.monotonic() + START_S
        while True:
            with Client(self.path) as client:
                try:
                    client.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=2)
                    return
                except grpc.RpcError:
                    pass
            if process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the driver did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def end(self, timeout_s: float = 20.0) -> int:
        """SIGTERM; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)
