"""`cachefs doctor`: every check can pass and can fail, and its remedy fits."""

from __future__ import annotations

import email.utils
import http.server
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cachefs.cli import checks, doctor, room
from cachefs.cli.checks import FAIL, OK, WARN, Check
from cachefs.cli.load import build_config
from cachefs.config import GIB, MIB, Config, LowLatency, S3Config
from cachefs.errors import AccessDenied, BucketNotFound, CachefsError, CredentialsError, StorageUnavailable, UsageError
from cachefs.mount import kernel, mountinfo
from cachefs.runtime import RuntimeDir, write_state


def config(tmp_path: Path, **options: object) -> Config:
    places = {"cache_dir": str(tmp_path / "cache"), "runtime_dir": str(tmp_path / "run")}
    return build_config({**places, **options}, {})


def outcomes(found: Iterator[Check]) -> dict[str, str]:
    return {check.name: check.outcome for check in found}


def only(found: Iterator[Check]) -> Check:
    [check] = found
    return check


# -- this machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "outcome"),
    [
        ("6.9.0", OK),
        ("6.18.44-generic", OK),
        ("6.8.0-45-generic", WARN),
        ("5.4.0", WARN),
        ("5.3.18", FAIL),
        ("4.19", FAIL),
    ],
)
def test_kernels(release: str, outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "n", release, "v", "m")))
    check = only(checks.check_kernel(config(tmp_path)))
    assert check.outcome == outcome
    assert release in check.text
    assert bool(check.remedy) == (outcome != OK)


def test_fuse_device_and_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> int:
        raise kernel.MountFailure(
            2, "cannot open /dev/fuse: No such file or directory: load the kernel module (modprobe fuse)"
        )

    monkeypatch.setattr(kernel, "open_device", refuse)
    monkeypatch.setattr(kernel, "may_mount", lambda: False)
    monkeypatch.setattr(kernel, "find_fusermount", lambda: None)
    device, right = checks.check_fuse(config(tmp_path))
    assert (device.outcome, device.remedy) == (FAIL, "load the kernel module (modprobe fuse)")
    assert (right.outcome, right.remedy) == (FAIL, "install it: apt-get install fuse3")


def test_allow_other_needs_fuse_conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "may_mount", lambda: False)
    monkeypatch.setattr(kernel, "find_fusermount", lambda: "/bin/fusermount3")
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(checks, "FUSE_CONF", str(conf))
    for text, expected in ((None, FAIL), ("# user_allow_other\n", FAIL), ("mount_max = 9\n user_allow_other \n", None)):
        if text is not None:
            conf.write_text(text)
        found = outcomes(checks.check_fuse(config(tmp_path, allow_other=True)))
        assert found.get("allow other") == expected
    assert "allow other" not in outcomes(checks.check_fuse(config(tmp_path)))


def test_low_latency(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = tmp_path / "dma"
    monkeypatch.setattr(checks, "GUARD_DEVICE", str(device))
    assert only(checks.check_guard(config(tmp_path))).outcome == WARN
    device.write_bytes(b"")
    assert only(checks.check_guard(config(tmp_path))).outcome == OK
    device.unlink()
    assert only(checks.check_guard(config(tmp_path, low_latency=LowLatency.OFF))).outcome == OK


def test_shm(tmp_path: Path) -> None:
    here = "/dev/shm"
    assert only(checks.check_shm(config(tmp_path, shm_size_bytes=16 * MIB, shm_dir=here))).outcome == OK
    assert only(checks.check_shm(config(tmp_path, shm_size_bytes=1 << 60, shm_dir=here))).outcome == FAIL
    assert only(checks.check_shm(config(tmp_path, shm_size_bytes=0))).outcome == WARN
    no_tmpfs = only(checks.check_shm(config(tmp_path, shm_dir="/proc")))
    assert (no_tmpfs.outcome, no_tmpfs.text) == (FAIL, "/proc is proc, not a tmpfs")


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "cgroup_limit", lambda: None)
    assert only(checks.check_memory(config(tmp_path, shm_size_bytes=1 << 50))).outcome == FAIL
    monkeypatch.setattr(room, "cgroup_limit", lambda: 512 * MIB)
    check = only(checks.check_memory(config(tmp_path, shm_size_bytes=64 * MIB)))
    assert check.outcome == WARN
    assert "512 MiB in this container" in check.text
    assert only(checks.check_memory(config(tmp_path, shm_size_bytes=2 * GIB))).outcome == FAIL


def test_limits_of_control_groups(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    root = tmp_path / "fs"
    (root / "a" / "b").mkdir(parents=True)
    membership.write_text("0::/a/b\n")
    assert room.cgroup_limit(str(root), str(membership)) is None
    (root / "a" / "b" / "memory.max").write_text("max\n")
    (root / "a" / "memory.max").write_text("1000\n")
    (root / "memory.max").write_text("2000\n")
    assert room.cgroup_limit(str(root), str(membership)) == 1000
    membership.write_text("5:cpu,memory:/gone\n3:pids:/x\n")
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text("3000\n")
    assert room.cgroup_limit(str(root), str(membership)) == 3000
    assert room.cgroup_limit(str(root), str(tmp_path / "none")) is None


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "ext4"
    monkeypatch.setattr(checks, "file_system_of", lambda path: kind)
    found = outcomes(checks.check_cache_directory(config(tmp_path, cache_size_bytes=16 * MIB)))
    assert found == {"cache directory": OK, "disk space": OK}
    assert list(tmp_path.iterdir()) == [], "nothing is left of the try"
    assert outcomes(checks.check_cache_directory(config(tmp_path, cache_size_bytes=1 << 60)))["disk space"] == WARN
    for kind, expected in (("nfs4", FAIL), ("fuse.s3fs", FAIL), ("overlay", WARN), ("tmpfs", WARN), ("xfs", OK)):  # noqa: B007
        assert outcomes(checks.check_cache_directory(config(tmp_path)))["cache directory"] == expected
    check = only(checks.check_cache_directory(config(tmp_path, cache_dir="/proc/cachefs")))
    assert check.outcome == FAIL
    assert "cannot write to /proc" in check.text


def test_file_systems_come_from_the_mount_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = b"".join(
        b"%d 1 0:%d / %s rw - %s src rw\n" % (number, number, place, kind)
        for number, (place, kind) in enumerate(
            [(b"/", b"ext4"), (b"/mnt", b"xfs"), (b"/mnt", b"nfs"), (b"/mnt/a", b"tmpfs")]
        )
    )
    monkeypatch.setattr(mountinfo, "mounts", lambda: mountinfo.parse_mountinfo(table))
    paths = {"/mnt/x": "nfs", "/mnt/a/b": "tmpfs", "/mnta": "ext4", "/": "ext4", "/mnt": "nfs"}
    assert {path: checks.file_system_of(path) for path in paths} == paths


def test_runtime_directory(tmp_path: Path) -> None:
    assert only(checks.check_runtime_directory(config(tmp_path, runtime_dir="/tmp/short"))).outcome == OK
    assert only(checks.check_runtime_directory(config(tmp_path, runtime_dir="/tmp/" + "x" * 70))).outcome == FAIL
    assert only(checks.check_runtime_directory(config(tmp_path, runtime_dir="/proc/cachefs"))).outcome in (FAIL, OK)


def test_stale_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = b"70 1 0:70 / /mnt/left\\040over rw - fuse.cachefs s3://b rw\n71 1 0:71 / /mnt/other rw - fuse.sshfs x rw\n"
    monkeypatch.setattr(mountinfo, "mounts", lambda: mountinfo.parse_mountinfo(table))
    check = only(checks.check_stale_mounts(config(tmp_path)))
    assert (check.outcome, check.remedy.split(" (")[0]) == (WARN, "cachefs umount /mnt/left over")
    runtime = RuntimeDir(str(tmp_path / "run"))
    write_state(runtime.mount("m", "json"), {"mountpoint": "/mnt/left over", "supervisor_pid": None})
    assert only(checks.check_stale_mounts(config(tmp_path))).outcome == WARN
    monkeypatch.setattr(checks, "is_running", lambda pid: True)
    assert only(checks.check_stale_mounts(config(tmp_path))).outcome == OK


def test_misspelt_variables() -> None:
    environment = {
        "CACHEFS_CACHE_SIZ": "1",
        "CACHEFS_DEBUG": "1",
        "CACHEFS_CACHE_SIZE": "1",
        "CACHEFS_XQ": "",
        "PATH": "",
    }
    check = only(checks.check_variables(environment))
    assert (check.outcome, check.remedy) == (WARN, "did you mean CACHEFS_CACHE_SIZE?")


def test_a_check_that_fails_itself_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "statvfs", broken)
    found = {check.name: check for check in checks.run_host_checks(config(tmp_path, shm_size_bytes=0), {})}
    assert "cannot be checked" in found["cache directory"].text or found["disk space"].outcome == WARN
    assert "open files" in found


# -- the store --------------------------------------------------------------------------------------------------------


class Clock(http.server.BaseHTTPRequestHandler):
    """A store that refuses everybody, and has a time of its own."""

    offset_s: float | None = 0.0

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        if self.offset_s is not None:
            self.send_header("Date", email.utils.formatdate(time.time() + self.offset_s, usegmt=True))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def clock() -> Iterator[type[Clock]]:
    kind = type("OwnClock", (Clock,), {})
    with http.server.HTTPServer(("127.0.0.1", 0), kind) as server:
        kind.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield kind
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("offset_s", "outcome"),
    [(0, OK), (-50, OK), (50, OK), (-300, WARN), (300, WARN), (-1000, FAIL), (1000, FAIL)],
)
def test_clocks(clock: Any, offset_s: float, outcome: str) -> None:
    clock.offset_s = offset_s
    endpoint, skew = doctor.check_endpoint(S3Config(endpoint_url=clock.url))
    assert endpoint.outcome == OK
    assert skew.outcome == outcome
    if outcome != OK:
        assert ("ahead of" if offset_s < 0 else "behind") in skew.text


def test_a_store_without_a_clock(clock: Any) -> None:
    clock.offset_s = None
    assert only(doctor.check_endpoint(S3Config(endpoint_url=clock.url))).outcome == OK


def test_endpoints_that_do_not_answer() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused = only(doctor.check_endpoint(S3Config(endpoint_url=f"http://127.0.0.1:{port}")))
    assert (refused.outcome, refused.remedy) == (FAIL, "nothing listens there: check host and port of --endpoint-url")
    unknown = only(doctor.check_endpoint(S3Config(endpoint_url="http://no-such-host.invalid")))
    assert (unknown.outcome, unknown.remedy.split(":")[0]) == (FAIL, "the name cannot be resolved")


def test_an_endpoint_that_is_silent_or_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        silent = only(doctor.check_endpoint(S3Config(endpoint_url=f"http://127.0.0.1:{port}", connect_timeout_s=0.1)))
        assert (silent.outcome, silent.remedy.split(" ")[1]) == (FAIL, "firewall")

        def babble() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 ftp ready\r\n")

        server.settimeout(5)
        server.accept()[0].close()  # the one that gave up
        thread = threading.Thread(target=babble)
        thread.start()
        babbling = only(doctor.check_endpoint(S3Config(endpoint_url=f"http://127.0.0.1:{port}")))
        tls = only(doctor.check_endpoint(S3Config(endpoint_url=f"https://127.0.0.1:{port}")))
        thread.join()
    assert (babbling.outcome, babbling.remedy.split(":")[0]) == (FAIL, "what listens there does not speak HTTP")
    assert (tls.outcome, tls.remedy.split("?")[0]) == (FAIL, "is it https")


def test_where_requests_go() -> None:
    assert doctor.endpoint_of(S3Config()) == "https://s3.us-east-1.amazonaws.com"
    assert doctor.endpoint_of(S3Config(region="eu-west-1")) == "https://s3.eu-west-1.amazonaws.com"
    assert doctor.endpoint_of(S3Config(endpoint_url="http://h:1")) == "http://h:1"


def test_an_endpoint_that_is_down_is_not_asked_for_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_source", lambda *_: pytest.fail("asked"))
    s3 = S3Config(source="s3://bucket", endpoint_url="http://127.0.0.1:1")
    assert [check.outcome for check in doctor.run_store_checks(s3, {})] == [FAIL]
    assert list(doctor.run_store_checks(S3Config(), {})) == []


def test_a_directory_as_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    assert only(doctor.run_store_checks(S3Config(source=f"file://{tmp_path}"), {})).outcome == OK
    missing = only(doctor.run_store_checks(S3Config(source=f"file://{tmp_path}/none"), {}))
    assert missing.outcome == FAIL
    assert only(doctor.run_store_checks(S3Config(source="gopher://x"), {})).remedy.startswith("name it as s3://")


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (UsageError("x"), "s3://BUCKET"),
        (BucketNotFound("x"), "bucket's name"),
        (CredentialsError("x"), "AWS_ACCESS_KEY_ID"),
        (AccessDenied("x"), "s3:ListBucket"),
        (StorageUnavailable("x"), "CACHEFS_DEBUG"),
    ],
)
def test_every_refusal_has_its_remedy(error: CachefsError, word: str) -> None:
    assert word in doctor._source_remedy(error)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("a", OK, "fine", "not shown"), Check("b", WARN, "so\x1b so", "do this")]
    monkeypatch.setattr(doctor, "run_host_checks", lambda *_: iter(found))
    runner = CliRunner()
    outcome = runner.invoke(doctor.doctor, [], standalone_mode=False)
    assert outcome.return_value == 0
    assert "ok    a                  fine\nwarn  b                  so\\x1b so\n" in outcome.output
    assert "-> do this\n1 ok, 1 warnings, 0 failed" in outcome.output
    assert "not shown" not in outcome.output

    found.append(Check("c", FAIL, "broken", "mend it"))
    outcome = runner.invoke(doctor.doctor, ["--json"], standalone_mode=False)
    assert outcome.return_value == 1
    document = json.loads(outcome.output)
    assert document["ok"] is False
    assert document["checks"][2] == {"name": "c", "outcome": "fail", "text": "broken", "remedy": "mend it"}


def test_a_wrong_configuration_is_a_finding(tmp_path: Path) -> None:
    check = only(checks.check_configuration(config(tmp_path, block_size_bytes=3 * MIB)))
    assert check.outcome == FAIL
    assert "--block-size 3MiB" in check.text


def test_all_checks_run_on_this_machine(tmp_path: Path) -> None:
    found = list(checks.run_host_checks(config(tmp_path), {}))
    assert len({check.name for check in found}) >= 12
    assert not [check for check in found if "cannot be checked" in check.text]
