"""The commands as people use (and misuse) them: one clear line, the right exit code, nothing left behind (M5)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import kill, mounts_below, wait_until
from tests.support.mounts import CACHEFS, Bucket, Mount, Node
from tests.support.programs import REPOSITORY, content, errno_name


@pytest.fixture
def place(node: Node) -> Path:
    """An empty directory to mount on."""
    directory = node.base / "mnt"
    directory.mkdir()
    return directory


def assert_refused(
    node: Node, done: subprocess.CompletedProcess[str], *said: str, code: int = 1, agents: int = 1
) -> None:
    """One line that says all of `said`, the exit code, and nothing left (an agent ends when it is idle)."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("cachefs: ")
    for text in said:
        assert text.lower() in lines[0].lower(), lines[0]
    assert "Traceback" not in node.full_log()
    assert not [mount for mount in mounts_below(node.base) if mount[2].startswith("fuse")]
    assert not node.processes("supervisor")
    assert not node.processes("worker")
    assert list((node.runtime_dir / "mounts").glob("*.json")) == []
    assert list((node.runtime_dir / "mounts").glob("*.sock")) == []
    assert len(node.processes("agent")) <= agents


# -- mounts that cannot be --------------------------------------------------------------------------------------------


def test_m5_no_such_bucket(node: Node, proxy: FaultProxy, place: Path) -> None:
    done = node.try_mount("s3://no-such-bucket-here", f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert_refused(node, done, "no-such-bucket-here", "not exist")


@pytest.mark.parametrize(("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_m5_wrong_keys(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path, variable: str, value: str) -> None:
    node.environment[variable] = value
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert_refused(node, done)
    assert "testsecret" not in done.stderr + node.full_log()
    assert "Signature=" not in node.full_log()


def test_m5_no_keys_at_all(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    del node.environment["AWS_ACCESS_KEY_ID"], node.environment["AWS_SECRET_ACCESS_KEY"]
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert_refused(node, done, "credentials")


def test_m5_endpoint_refuses_connections(node: Node, place: Path) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        started = time.monotonic()
        endpoint = f"--endpoint-url=http://127.0.0.1:{port}"
        done = node.try_mount("s3://bucket", endpoint, "--io-timeout=3s", place=place)
    assert time.monotonic() - started < 15
    assert_refused(node, done, f"127.0.0.1:{port}")


def test_m5_endpoint_never_answers(node: Node, place: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        endpoint = f"--endpoint-url=http://127.0.0.1:{port}"
        limits = ("--request-timeout=1s", "--connect-timeout=1s", "--io-timeout=3s", "--ready-timeout=10s")
        done = node.try_mount("s3://bucket", endpoint, *limits, place=place)
    assert time.monotonic() - started < 20
    assert_refused(node, done, f"127.0.0.1:{port}")


def test_m5_endpoint_is_no_s3(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    proxy.add(Fault(status=404, code="NotHere"))
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert_refused(node, done)


def test_m5_listing_is_forbidden(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    proxy.add(Fault(kind="list", status=403))
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert_refused(node, done, bucket.name)


def test_m5_mount_point_is_missing(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=node.base / "missing")
    assert_refused(node, done, "missing", agents=0)
    assert not (node.base / "missing").exists()


def test_m5_mount_point_is_a_file(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    (node.base / "file").write_text("x")
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=node.base / "file")
    assert_refused(node, done, "not a directory", agents=0)


def test_m5_mount_point_is_not_empty(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    (place / "something").write_text("x")
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert_refused(node, done, "not empty", agents=0)
    assert (place / "something").read_text() == "x"


def test_mounting_over_files_is_possible_when_it_is_meant(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    (node.base / "mnt").mkdir()
    (node.base / "mnt/below").write_text("x")
    bucket.put("above", b"y")
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "-o", "nonempty")
    assert os.listdir(mount.path) == ["above"]
    mount.umount()
    assert os.listdir(mount.path) == ["below"]


def test_m5_mount_point_is_busy(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", b"x")
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=mount.path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "mounted" in done.stderr
    assert (mount.path / "file").read_bytes() == b"x", "the first mount goes on"
    assert mount.status()["health"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bucket"], "s3://"),
        (["s3://"], "bucket"),
        (["ftp://host/x"], "ftp"),
        (["s3://UPPER_case!/x"], "bucket"),
        (["s3://bucket", "--shm-size=banana"], "shm-size"),
        (["s3://bucket", "--block-size=3MiB"], "block-size"),
        (["s3://bucket", "--consistency=sometimes"], "consistency"),
        (["s3://bucket", "--metadata-ttl=-1s"], "metadata-ttl"),
        (["s3://bucket", "--no-read-only"], "writ"),
        (["s3://bucket", "-o", "rw"], "writ"),
        (["s3://bucket", "--no-such-option"], "no-such-option"),
        (["s3://bucket", "--config=/nonexistent.toml"], "nonexistent.toml"),
        (["s3://bucket", "--memory-limit=1MiB"], "memory-limit"),
        (["s3://bucket", "--read-ahead=8GiB"], "--read-ahead 8GiB: must be at most 1GiB"),
        (["s3://bucket", "--uid=4294967295"], "--uid 4294967295"),
        (["s3://bucket", f"--runtime-dir=/tmp/{'x' * 90}"], "at most 74 bytes"),
        (["s3://bucket", "-o", "config=relative.toml"], "must be an absolute path"),
    ],
)
def test_m5_what_cannot_be_meant_is_exit_code_2(node: Node, place: Path, arguments: list[str], said: str) -> None:
    done = node.try_mount(arguments[0], *arguments[1:], place=place)
    assert_refused(node, done, said, code=2)


def test_m5_ctrl_c_while_mounting(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    proxy.add(Fault(stall=True))
    command = [*CACHEFS, "mount", *node.options, f"--endpoint-url={proxy.endpoint_url}", bucket.url, str(place)]
    with subprocess.Popen(command, env=node.environment, cwd=REPOSITORY, stderr=subprocess.PIPE) as child:
        wait_until(lambda: proxy.count() > 0, 15, "the mount asks the store")
        child.send_signal(2)
        assert child.wait(10) == 130
    assert not [mount for mount in mounts_below(node.base) if mount[2].startswith("fuse")]
    assert not node.processes("supervisor")
    proxy.clear()
    wait_until(lambda: not node.processes(), 15, "nothing goes on")


def test_a_failed_mount_can_be_tried_again_at_once(node: Node, bucket: Bucket, proxy: FaultProxy, place: Path) -> None:
    bucket.put("file", b"x")
    proxy.down = True
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    assert node.try_mount(bucket.url, endpoint, "--io-timeout=2s", place=place).returncode == 1
    proxy.down = False
    assert (node.mount(bucket.url, endpoint).path / "file").read_bytes() == b"x"


# -- a mount that is there --------------------------------------------------------------------------------------------


@pytest.fixture
def mount(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount of one file."""
    bucket.put("dir/file", content("file", 1_500_000))
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")


def test_status_json(mount: Mount) -> None:
    (mount.path / "dir/file").read_bytes()
    document = mount.node.status()
    assert sorted(document) == ["agents", "keeper", "mounts", "version"]
    assert document["keeper"] is None, "there is none on this node"
    [found], [agent] = document["mounts"], document["agents"]
    assert found["mountpoint"] == str(mount.path)
    assert found["source"] == mount.state()["source"]
    assert found["health"] == "ok"
    assert found["problems"] == []
    assert found["supervisor_pid"] in mount.node.processes("supervisor")
    assert found["worker_pid"] in mount.node.processes("worker")
    assert found["agent_pid"] == agent["agent_pid"] == mount.node.agent_pid
    assert found["restarts"] == 0
    assert found["last_crash"] is None
    for name in ("shm", "disk"):
        tier = agent["tiers"][name]
        assert tier["state"] == "on"
        assert 0 <= tier["used_bytes"] <= tier["limit_bytes"]
    assert agent["counters"]["origin_bytes"] >= 1_500_000
    assert agent["counters"]["origin_requests"] >= 2
    assert 0 < agent["rss_anon_bytes"] < agent["memory_limit_bytes"]
    assert agent["mount_ids"] == [found["mount_id"]]
    wait_until(lambda: mount.status()["counters"].get("fuse_reads", 0) > 0, 5, "the worker reports what it counted")


def test_status_for_people(mount: Mount) -> None:
    runtime = f"--runtime-dir={mount.node.runtime_dir}"
    done = mount.node.run("status", runtime)
    assert done.returncode == 0
    assert str(mount.path) in done.stdout
    assert mount.node.run("status", runtime, str(mount.path)).returncode == 0
    other = mount.node.run("status", runtime, "/somewhere/else")
    assert other.returncode == 1
    assert "/somewhere/else" in other.stderr


def test_status_never_waits_for_a_hanging_agent(mount: Mount) -> None:
    agent = mount.node.agent_pid
    kill(agent, 19)
    try:
        started = time.monotonic()
        assert mount.status()["health"] == "degraded"
        assert time.monotonic() - started < 5
    finally:
        kill(agent, 18)


def test_status_of_nothing(node: Node) -> None:
    assert node.status()["mounts"] == []
    assert not node.runtime_dir.exists(), "asking makes no directories"


def test_doctor(mount: Mount) -> None:
    options = [o for o in mount.node.options if not o.startswith("--log")]
    done = mount.node.run("doctor", "--json", *options)
    document = json.loads(done.stdout)
    checks = document if isinstance(document, list) else document["checks"]
    assert {check["name"] for check in checks} >= {"kernel", "fuse device", "shm tier", "cache directory"}
    assert {check["outcome"] for check in checks} <= {"ok", "warn", "fail"}
    assert all(check["remedy"] for check in checks if check["outcome"] != "ok")


def test_doctor_looks_at_the_bucket(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    options = [*node.options[:4], f"--endpoint-url={proxy.endpoint_url}"]
    good = node.run("doctor", *options, bucket.url)
    assert "Traceback" not in good.stdout + good.stderr
    assert proxy.count("list") > 0
    bad = node.run("doctor", *options, "s3://no-such-bucket-here")
    assert bad.returncode == 1
    assert "no-such-bucket-here" in bad.stdout + bad.stderr
    assert not node.processes()


def test_umount_of_a_busy_mount_names_the_holder(mount: Mount) -> None:
    holder = subprocess.Popen(["sleep", "60"], cwd=mount.path / "dir")
    try:
        done = mount.try_umount()
        assert done.returncode == 1
        assert str(holder.pid) in done.stderr
        assert "sleep" in done.stderr
        assert mount.is_mounted
        assert (mount.path / "dir/file").stat().st_size == 1_500_000
    finally:
        holder.kill()
        holder.wait()
    mount.umount()


def test_lazy_umount_serves_open_files_until_they_are_closed(mount: Mount, bucket: Bucket) -> None:
    with (mount.path / "dir/file").open("rb") as file:
        assert file.read(10) == content("file", 1_500_000)[:10]
        mount.umount("--lazy")
        time.sleep(0.3)
        assert file.read() == content("file", 1_500_000)[10:]
    wait_until(lambda: not mount.node.processes("supervisor") and not mount.node.processes("worker"), 5, "it ends")


def test_forced_umount_fails_those_who_read(mount: Mount) -> None:
    with (mount.path / "dir/file").open("rb") as file:
        file.read(10)
        mount.umount("--force")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert errno_name(lambda: os.pread(file.fileno(), 100, 1_400_000)) in ("ENOTCONN", "ECONNABORTED", "EIO")
    wait_until(lambda: not mount.node.processes("supervisor") and not mount.node.processes("worker"), 5, "it ends")


def test_umount_of_what_is_not_a_mount(node: Node, place: Path) -> None:
    for wrong in (place, node.base / "missing"):
        done = node.run("umount", f"--runtime-dir={node.runtime_dir}", str(wrong))
        assert done.returncode == 1
        assert str(wrong) in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_umount_leaves_nothing(mount: Mount) -> None:
    (mount.path / "dir/file").read_bytes()
    mount.umount()
    assert not mount.node.processes("supervisor")
    assert not mount.node.processes("worker")
    wait_until(lambda: not mount.node.processes("agent"), 10, "an idle agent ends by itself")
    assert not mount.node.shm_directory.exists()
    assert list((mount.node.runtime_dir / "mounts").glob("*.json")) == []
    assert list((mount.node.runtime_dir / "mounts").glob("*.sock")) == []


def test_upgrade_of_what_is_not_a_mount(node: Node, place: Path) -> None:
    done = node.run("upgrade", f"--runtime-dir={node.runtime_dir}", str(place))
    assert done.returncode == 1
    assert str(place) in done.stderr


def test_no_secret_is_written_anywhere(mount: Mount) -> None:
    secret = b"testsecret"
    for path in (*mount.node.runtime_dir.rglob("*"), *mount.node.cache_dir.rglob("*")):
        if path.is_file():
            assert secret not in path.read_bytes(), path
    for pid in mount.node.processes():
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
