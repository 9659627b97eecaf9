"""`.cachefs` in the root of a mount: hidden, readable, and a plan that is followed."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name, evict_pages

NAMES = [f"train/class-{n % 3}/img-{n:03}" for n in range(90)]
OBJECTS = {name: content(name, 30_000) for name in NAMES}


@pytest.fixture
def engine() -> str:
    """Of `mount`; a test may ask for both."""
    return "channel"


@pytest.fixture
def mount(engine: str, node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    bucket.fill(OBJECTS)
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", f"--engine={engine}")


both_engines = pytest.mark.parametrize("engine", ["channel", "pyfuse3"])


def stats(mount: Mount) -> dict[str, str]:
    lines = (mount.path / ".cachefs/stats").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)


def plan_is(mount: Mount, lines: int) -> Callable[[], bool]:
    return lambda: stats(mount).get("plan.lines") == str(lines)


@both_engines
def test_what_is_in_it(mount: Mount) -> None:
    assert os.listdir(mount.path) == ["train"], "it is in no listing"
    place = mount.path / ".cachefs"
    assert place.is_dir()
    names = {"stats", "config", "plan"} | ({"accesslog"} if "channel" in mount.state()["engine"] else set())
    assert set(os.listdir(place)) == names
    assert stat.S_ISFIFO((place / "plan").stat().st_mode)
    assert (place / "plan").is_symlink()
    listed = subprocess.run(["ls", "-la", str(place)], capture_output=True, text=True, check=True)
    assert listed.stderr == ""
    for wrong in ("nothing", "stats2"):
        assert not (place / wrong).exists()
    assert errno_name(lambda: (place / "new").write_text("x")) in ("EROFS", "ENOENT")
    assert os.listxattr(place / "stats") == []


@both_engines
def test_stats_are_of_now_and_an_open_one_of_its_moment(mount: Mount) -> None:
    first = stats(mount)
    assert first["mount.mountpoint"] == str(mount.path)
    assert int(first["agent.agent_pid"]) == mount.node.agent_pid
    with (mount.path / ".cachefs/stats").open() as kept:
        text = kept.read()
        (mount.path / NAMES[0]).read_bytes()
        time.sleep(0.2)
        assert int(stats(mount)["agent.counters.origin_get_requests"]) > 0
        kept.seek(0)
        assert kept.read() == text
    assert (mount.path / ".cachefs/stats").stat().st_size > 100


def test_the_configuration_can_be_used_again(mount: Mount, bucket: Bucket) -> None:
    text = (mount.path / ".cachefs/config").read_text()
    assert f'# mounted: "{bucket.url}"' in text
    settings = tomllib.loads(text)
    assert settings["cache-dir"] == str(mount.node.cache_dir)
    assert settings["file-mode"] == "0444"
    assert "testsecret" not in text
    place = mount.node.base / "again.toml"
    place.write_text(text)
    done = mount.node.run("doctor", f"--config={place}")
    assert "again.toml" not in done.stderr, done.stderr


def test_it_goes_on_with_other_workers_and_agents(mount: Mount) -> None:
    stats(mount)
    mount.wait_for_worker(mount.kill_worker())
    assert int(stats(mount)["agent.agent_pid"]) == mount.node.agent_pid
    mount.node.wait_for_agent(mount.node.kill_agent())
    agents = mount.node.processes  # for a moment there may be two: one that finds the other there, and ends
    wait_until(lambda: [int(stats(mount).get("agent.agent_pid", 0))] == agents("agent"), 10, "of the next agent")


def test_an_object_of_that_name_is_hidden(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill({".cachefs": b"mine", "a": b"x"})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    assert os.listdir(mount.path) == ["a"]
    assert (mount.path / ".cachefs").is_dir()
    assert os.listdir(mount.path) == ["a"]
    wait_until(lambda: "cannot be seen" in node.full_log(), 10, "and the log says so")


def test_an_object_of_that_name_alone_leaves_an_empty_directory(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put(".cachefs", b"mine")
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    assert os.listdir(mount.path) == []
    assert os.listdir(mount.path) == []


# -- the plan ---------------------------------------------------------------------------------------------------------


@both_engines
def test_a_plan_is_fetched_ahead_in_its_order(mount: Mount, proxy: FaultProxy) -> None:
    order = random.Random(1).sample(NAMES, len(NAMES))
    (mount.path / ".cachefs/plan").write_text("\n".join([*order, "train/nobody", "../x", "train"]) + "\n")
    wait_until(plan_is(mount, len(order) + 3), 15, "the plan is taken")
    assert stats(mount)["plan.unknown"] == "3"
    wait_until(lambda: proxy.count("get") >= 60, 15, "it is fetched before anybody reads")
    for name in order:
        assert (mount.path / name).read_bytes() == OBJECTS[name]
    wait_until(lambda: stats(mount)["plan.finished"] == "True", 10, "readers are through")
    assert proxy.count("get") == len(order), "and nothing twice"


def test_plans_by_number_and_by_absolute_path(mount: Mount) -> None:
    plan = mount.path / ".cachefs/plan"
    plan.write_text(f"listing train/class-1\nindex 0\nindex 29\nindex 30\n{mount.path}/{NAMES[0]}\n/elsewhere\n")
    wait_until(plan_is(mount, 5), 15, "the plan is taken")
    assert stats(mount)["plan.unknown"] == "2"
    plan.write_text("index 0\nindex 89\nindex 90")
    wait_until(plan_is(mount, 3), 15, "the next one takes its place")
    assert stats(mount)["plan.unknown"] == "1"
    plan.write_text("")
    wait_until(lambda: "plan.lines" not in stats(mount), 10, "an empty one takes it away")


def test_programs_that_write_plans(mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n".join(NAMES))
    plan = mount.path / ".cachefs/plan"
    subprocess.run(["cp", str(tmp_path / "list"), str(plan)], check=True, timeout=20)
    wait_until(plan_is(mount, len(NAMES)), 15, "cp")
    subprocess.run(f"head -7 {tmp_path}/list > {plan}", shell=True, check=True, timeout=20)
    wait_until(plan_is(mount, 7), 15, "a shell")


@pytest.mark.expect_warnings("gone")
def test_a_plan_that_is_cut_off_by_the_death_of_the_agent(mount: Mount) -> None:
    with (mount.path / ".cachefs/plan").open("wb", buffering=0) as plan:
        plan.write(b"\n".join(map(str.encode, NAMES)) + b"\n")
        mount.node.wait_for_agent(mount.node.kill_agent())
        assert errno_name(lambda: [plan.write(b"train/x\n" * 4096) for _ in range(100)]) == "EPIPE"
    wait_until(lambda: "plan.reading" in stats(mount), 15, "the next agent reads")
    (mount.path / ".cachefs/plan").write_text("\n".join(NAMES))
    wait_until(plan_is(mount, len(NAMES)), 15, "and takes the next plan")


# -- the log ----------------------------------------------------------------------------------------------------------


def test_the_access_log_streams_while_it_is_read(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(OBJECTS)
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    for _ in range(2):
        time.sleep(0.5)  # the last reader is gone, and this is known
        with subprocess.Popen(["cat", str(mount.path / ".cachefs/accesslog")], stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline().startswith(b"#")
            evict_pages(mount.path / NAMES[0])
            (mount.path / NAMES[0]).read_bytes()
            line = b""
            while b" READ (" not in line:
                line = reader.stdout.readline()
            assert f"pid:{os.getpid()}]".encode() in line
            assert NAMES[0].encode() in line
            reader.kill()
    assert (mount.path / NAMES[1]).read_bytes() == OBJECTS[NAMES[1]]
    assert "Traceback" not in node.full_log()
