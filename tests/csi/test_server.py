"""The server of the driver: its socket, its end, its log, and what becomes of errors. In processes of its own."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.s3_server import S3Server
from cachefs import errors
from cachefs.errors import ConfigError, MountError
from csi import server as server_module
from csi.endpoint import parse_endpoint
from csi.server import Server, clean, sanitized
from csi.status import Code, code_of_kind, status_of
from csi.v1 import csi_pb2, csi_pb2_grpc
from tests.csi.rig import Client, DriverProcess, capability, create_request, served

TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"


class Echo(csi_pb2_grpc.ControllerServicer):
    """Raises what it is told."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def CreateVolume(self, request: Any, context: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.inside.set()
        self.go_on.wait(20)
        return csi_pb2.CreateVolumeResponse()


# -- the socket -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("unix:///csi/csi.sock", "/csi/csi.sock"),
        ("unix:/csi/csi.sock", "/csi/csi.sock"),
        ("UNIX:///a//b/../c.sock", "/a/c.sock"),
        ("unix:////a", "/a"),
    ],
)
def test_endpoints(text: str, path: str) -> None:
    assert parse_endpoint(text) == path


@pytest.mark.parametrize(
    "text",
    ["", "tcp://127.0.0.1:1", "127.0.0.1:80", "/csi.sock", "unix://", "unix:relative", "unix://host", "unix:///dir/",
     "unix:///" + "x" * 120, "unix-abstract:x", "http://x", "unix:///a\0b"],
)  # fmt: skip
def test_endpoints_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint"):
        parse_endpoint(text)


def test_only_its_owner_may_connect(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "csi.sock"
    with served(path, []):
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert status.st_mode & 0o777 == 0o600
    assert not path.exists()


def test_what_is_there_already(tmp_path: Path) -> None:
    path = tmp_path / "csi.sock"
    path.write_text("precious")
    with pytest.raises(MountError, match="no socket"):
        Server(str(path), []).start()
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with served(path, []), pytest.raises(MountError, match="another driver listens"):
        Server(str(path), []).start()


# -- errors and log lines ---------------------------------------------------------------------------------------------


def test_every_error_has_a_code_and_its_text(tmp_path: Path) -> None:
    class Kept(Exception):
        kind, text = "busy", "still bound"

    for error, code in (
        (errors.BucketNotFound("a"), Code.NOT_FOUND),
        (errors.CredentialsError("a"), Code.UNAUTHENTICATED),
        (errors.AccessDenied("a"), Code.PERMISSION_DENIED),
        (errors.StorageUnavailable("a"), Code.UNAVAILABLE),
        (errors.BadBody("a"), Code.UNAVAILABLE),
        (errors.ConfigError("a"), Code.INVALID_ARGUMENT),
        (errors.AlreadyExists("a"), Code.ALREADY_EXISTS),
        (errors.MountError("a"), Code.INTERNAL),
    ):
        assert status_of(error) == (code, "a")
    assert status_of(Kept()) == (Code.FAILED_PRECONDITION, "still bound")
    assert code_of_kind("BucketNotFound") is Code.NOT_FOUND
    assert code_of_kind("CachefsError") is code_of_kind("os") is code_of_kind("nonsense") is Code.INTERNAL
    code, text = status_of(KeyError("hush"))
    assert code is Code.INTERNAL
    assert "hush" not in text


@pytest.mark.expect_warnings("CreateVolume")
def test_an_unforeseen_error_is_internal_and_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(tmp_path / "csi.sock", [Echo(ZeroDivisionError("at line 7"))]) as client:
        code, text = client.refused(client.controller.CreateVolume, create_request("a"))
    assert code is Code.INTERNAL
    assert "at line 7" not in text
    assert "ZeroDivisionError" in text
    assert caplog.text.count("Traceback") == 1
    assert sum("CreateVolume a INTERNAL" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.expect_warnings("CreateVolume")
@pytest.mark.parametrize("kind", [RuntimeError, errors.StorageUnavailable])
def test_no_secret_of_a_request_is_ever_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    token = "eyJhbGciOi.hush"
    tokens = json.dumps({"aws": {"token": token, "expirationTimestamp": "2026-11-23T00:00:00Z"}})
    error = kind(f"the server said: hush-secret is wrong,\nand {token}\tas well")
    request = create_request(
        "a", bucket="abc", secrets={"accessKeyId": "AKIA", "secretAccessKey": "hush-secret"},
        parameters={TOKENS: tokens, "secretKey": "hush-too"},
        volume_capabilities=[capability(flags=["password=hush-flag"])],
    )  # fmt: skip
    with served(tmp_path / "csi.sock", [Echo(error)]) as client:
        _, text = client.refused(client.controller.CreateVolume, request)
    assert "\n" not in text
    everything = text + caplog.text + "".join(record.getMessage() for record in caplog.records)
    assert "hush" not in everything
    assert "bucket: abc" in caplog.text


def test_sanitized_hides_by_what_the_protocol_says() -> None:
    """Every field that is marked csi_secret, of every message there is."""
    marked = 0
    for name, descriptor in csi_pb2.DESCRIPTOR.message_types_by_name.items():
        message = getattr(csi_pb2, name)()
        for field in descriptor.fields:
            if field.GetOptions().Extensions[csi_pb2.csi_secret]:
                marked += 1
                getattr(message, field.name)["key"] = "hush-hush"
                assert "hush" not in sanitized(message)
                assert clean("it is hush-hush", message) == "it is ***"
    assert marked >= 15
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id="v", volume_context={TOKENS: "hush", "bucket": "b"}, readonly=True
    )
    context = f"{{bucket: b, {TOKENS}: ***}}"
    assert sanitized(request) == f"{{volume_id: 'v', readonly: True, volume_context: {context}}}"


def test_frequent_calls_are_logged_when_they_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="csi")
    service = Echo()
    service.go_on.set()
    with served(tmp_path / "csi.sock", [service]) as client:
        client.controller.CreateVolume(create_request("seen"))
        client.refused(client.controller.ControllerGetCapabilities, csi_pb2.ControllerGetCapabilitiesRequest())
        client.refused(client.identity.Probe, csi_pb2.ProbeRequest())
    lines = [record.getMessage() for record in caplog.records if record.name == server_module.__name__]
    assert sum(line.startswith("CreateVolume seen OK") for line in lines) == 1
    assert sum(line.startswith("ControllerGetCapabilities - UNIMPLEMENTED") for line in lines) == 1
    assert not any("{" in line for line in lines), "requests are written at debug level only"


def test_what_kubelet_publishes_again_is_not_logged_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Node(csi_pb2_grpc.NodeServicer):
        def NodePublishVolume(self, request: Any, context: Any) -> Any:
            return csi_pb2.NodePublishVolumeResponse()

        def NodeUnpublishVolume(self, request: Any, context: Any) -> Any:
            return csi_pb2.NodeUnpublishVolumeResponse()

    caplog.set_level("INFO", logger="csi")
    publish = csi_pb2.NodePublishVolumeRequest(volume_id="v", target_path="/a")
    with served(tmp_path / "csi.sock", [Node()]) as client:
        for _ in range(3):
            client.node.NodePublishVolume(publish)
        client.node.NodePublishVolume(csi_pb2.NodePublishVolumeRequest(volume_id="v", target_path="/b"))
        client.node.NodeUnpublishVolume(csi_pb2.NodeUnpublishVolumeRequest(volume_id="v", target_path="/a"))
        client.node.NodePublishVolume(publish)
    lines = [record.getMessage() for record in caplog.records if record.name == server_module.__name__]
    assert sum(line.startswith("NodePublishVolume v OK") for line in lines) == 3


def test_many_calls_that_wait_leave_room_for_others(tmp_path: Path) -> None:
    service = Echo()
    with served(tmp_path / "csi.sock", [service]) as client:
        waiting = [client.controller.CreateVolume.future(create_request(f"v{n}")) for n in range(150)]
        assert service.inside.wait(20)
        assert client.refused(client.controller.DeleteVolume, csi_pb2.DeleteVolumeRequest())[0] is Code.UNIMPLEMENTED
        service.go_on.set()
        for each in waiting:
            each.result(20)


def test_running_calls_end_before_the_server_does(tmp_path: Path) -> None:
    service = Echo()
    server = Server(str(tmp_path / "csi.sock"), [service])
    server.start()
    with Client(tmp_path / "csi.sock") as client:
        running = client.controller.CreateVolume.future(create_request("a"))
        assert service.inside.wait(20)
        ending = threading.Thread(target=server.stop, args=(20.0,))
        ending.start()
        time.sleep(0.1)
        assert client.refused(client.controller.CreateVolume, create_request("b"))[0] is Code.UNAVAILABLE
        service.go_on.set()
        running.result(20)
        ending.join(20)
    assert not (tmp_path / "csi.sock").exists()


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_survives_its_own_death(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    """kill -9, a stale socket, another process on the same records, SIGTERM; nothing secret in any of it."""
    path = tmp_path / "csi.sock"
    arguments = ("--mode", "controller", "--state", f"file://{tmp_path}/state", "--log-level", "debug",
                 "--log-format", "json", "--endpoint-url", s3_server.endpoint_url)  # fmt: skip
    with DriverProcess(path, *arguments, environment=s3_server.environment) as driver:
        with Client(path) as client:
            volume = client.create("a", bucket=s3_bucket, secrets={"accessKeyId": "x", "secretAccessKey": "hush-hush"})
        driver.kill()
        assert path.exists()
        driver.start()
        with Client(path) as client:
            assert client.volumes() == [volume.volume.volume_id]
            client.delete(volume.volume.volume_id)
            assert client.identity.Probe(csi_pb2.ProbeRequest()).ready.value
        assert driver.end() == 0
        assert not path.exists()
        lines = driver.log.read_text()
    assert "hush" not in lines
    assert s3_server.secret_key not in lines
    for line in lines.splitlines():
        assert json.loads(line)["role"] == "csi"
    assert any("CreateVolume a OK" in line for line in lines.splitlines())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--endpoint", "tcp://127.0.0.1:1", "--mode", "controller"), "only unix sockets are offered"),
        (("--mode", "node"), "--node-id must be given"),
        (("--mode", "controller", "--state", "etcd"), "--state etcd needs --etcd"),
        (("--mode", "controller", "--state", "s3://x"), "must be file:///DIR or etcd"),
        (("--mode", "controller", "--driver-name", "a b"), "--driver-name a b"),
        (("--mode", "node", "--node-id", "n", "--topology"), "--topology needs --zone"),
        (("--mode", "controller", "--grace", "forever"), "is not a time up to an hour"),
    ],
)  # fmt: skip
def test_what_was_typed_wrong_is_one_line(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    driver = DriverProcess(tmp_path / "csi.sock", "--state", f"file://{tmp_path}/state", *arguments)
    assert driver.launch().wait(20) == 2
    said = driver.log.read_text()
    assert text in said
    assert said.startswith("cachefs: ")
    assert said.count("\n") == 1


def test_sigterm_in_the_middle_of_a_call(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    path = tmp_path / "csi.sock"
    with DriverProcess(
        path, "--mode", "controller", "--state", f"file://{tmp_path}/state", "--grace", "300ms",
        "--endpoint-url", "http://127.0.0.1:9", environment=s3_server.environment,
    ) as driver, Client(path) as client, socket.create_server(("127.0.0.1", 0)) as silent:  # fmt: skip
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        running = client.controller.CreateVolume.future(create_request("a", bucket="some-bucket", endpoint=endpoint))
        with silent.accept()[0]:  # the driver waits for a store that says nothing
            started = time.monotonic()
            assert driver.end() == 0
            assert time.monotonic() - started < 5
        with pytest.raises(grpc.RpcError):
            running.result(5)


def test_the_generated_modules_are_those_of_the_protocol() -> None:
    root = Path(__file__).resolve().parents[2]
    assert (
        subprocess.run([root / ".venv/bin/python", root / "scripts/csi-stubs", "--check"], check=False).returncode == 0
    )
    assert os.access(root / "scripts/csi-stubs", os.X_OK)
