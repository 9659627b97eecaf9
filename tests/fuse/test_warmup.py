"""`cachefs warmup` on a real mount: everything comes, nothing twice, and what did not come is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import kill, wait_until
from tests.support.mounts import CACHEFS, Bucket, Mount, Node
from tests.support.programs import REPOSITORY, content, evict_pages

MIB = 1 << 20
SMALL = {f"train/class-{n % 4}/img-{n:03}": content(f"small-{n}", 20_000 + n) for n in range(120)}
LARGE = {"big/model.bin": content("model", 9 * MIB + 77), "big/empty": b""}


def run(node: Node, *arguments: str, stdin: bytes | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    command, rest = arguments[0], arguments[1:]
    if stdin is None:
        return node.run(command, f"--runtime-dir={node.runtime_dir}", *rest, **more)
    done = subprocess.run(
        [*CACHEFS, command, f"--runtime-dir={node.runtime_dir}", *rest],
        env=node.environment, cwd=REPOSITORY, input=stdin, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def jobs(node: Node) -> list[dict[str, Any]]:
    return [job for agent in node.status()["agents"] for job in agent["jobs"]]


def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def mount(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    bucket.fill({**SMALL, **LARGE})
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")


def test_everything_comes_and_nothing_twice(mount: Mount, proxy: FaultProxy) -> None:
    node = mount.node
    before = run(node, "warmup", "--check", "--json", str(mount.path))
    assert before.returncode == 1
    assert last(before)["missing_files"] == len(SMALL) + 1
    assert proxy.count("get") == 0

    done = run(node, "warmup", str(mount.path))
    assert done.returncode == 0, done.stderr
    assert "122 files" in done.stdout
    fetched = proxy.count("get")
    assert fetched >= len(SMALL) + 1

    again = run(node, "warmup", "--json", str(mount.path))
    assert again.returncode == 0, again.stderr
    assert last(again)["fetched_bytes"] == 0
    assert last(again)["there_bytes"] == last(again)["bytes"] == sum(map(len, (SMALL | LARGE).values()))
    assert run(node, "warmup", "--check", str(mount.path)).returncode == 0
    for name, body in (SMALL | LARGE).items():
        assert (mount.path / name).read_bytes() == body
    assert proxy.count("get") == fetched, "reads found everything"


def test_paths_and_lists(mount: Mount, proxy: FaultProxy, tmp_path: Path) -> None:
    node = mount.node
    (tmp_path / "link").symlink_to(mount.path / "train")
    some = [name for name in SMALL if "class-1" in name]
    assert run(node, "warmup", str(tmp_path / "link" / "class-1")).returncode == 0
    assert proxy.count("get") == len(some)

    names = [str(mount.path / name) for name in SMALL if "class-2" in name]
    listing = tmp_path / "list"
    listing.write_text("\n".join(names[:10]))
    assert run(node, "warmup", "--list", str(listing)).returncode == 0
    assert proxy.count("get") == len(some) + 10
    done = run(node, "warmup", "--list", "-", "--json", stdin="\n".join(names).encode())
    assert done.returncode == 0, done.stderr
    assert last(done)["files"] == len(names)
    assert proxy.count("get") == len(some) + len(names)


def test_paths_that_make_no_sense(mount: Mount, tmp_path: Path) -> None:
    node = mount.node
    assert run(node, "warmup").returncode == 2
    outside = run(node, "warmup", str(tmp_path))
    assert outside.returncode == 2
    assert "not in a mount" in outside.stderr
    assert run(node, "warmup", "--list", "/nonexistent", str(mount.path)).returncode == 1
    assert run(node, "warmup", "--check", "--background", str(mount.path)).returncode == 2
    stop = run(node, "warmup", "--stop", "nobody")
    assert (stop.returncode, len(stop.stderr.splitlines())) == (1, 1)


def test_what_is_not_there_is_listed_and_the_rest_comes(mount: Mount, bucket: Bucket) -> None:
    node = mount.node
    os.listdir(mount.path / "train/class-0")
    gone = next(name for name in SMALL if "class-0" in name)
    changed = [name for name in SMALL if "class-0" in name][1]
    bucket.delete(gone)
    bucket.put(changed, b"other")
    done = run(node, "warmup", str(mount.path / "train"), str(mount.path / "train/nobody"))
    assert done.returncode == 1
    assert "nobody: it does not exist" in done.stdout
    for name in (gone, changed):
        assert f"{name}: it was deleted or replaced" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("  ")]) == 3
    kept = [name for name in SMALL if name not in (gone, changed)]
    told = run(node, "warmup", "--check", "--json", *(str(mount.path / name) for name in kept))
    assert told.returncode == 0, told.stdout


def test_a_store_that_throttles_is_asked_more_slowly(mount: Mount, proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="get", status=503, code="SlowDown", times=40))
    done = run(mount.node, "warmup", str(mount.path / "train"))
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert run(mount.node, "warmup", "--check", str(mount.path / "train")).returncode == 0


@pytest.mark.slow
def test_objects_that_are_refused_do_not_stop_the_others(mount: Mount, proxy: FaultProxy) -> None:
    refused = next(iter(SMALL))
    proxy.add(Fault(kind="get", status=403, key=lambda key: key == refused))
    done = run(mount.node, "warmup", str(mount.path / "train"))
    assert done.returncode == 1
    assert refused in done.stdout
    check = run(mount.node, "warmup", "--check", "--json", str(mount.path / "train"))
    assert last(check)["missing_files"] == 1
    assert last(check)["examples"][0]["path"] == refused


def test_an_agent_that_is_killed(mount: Mount, proxy: FaultProxy) -> None:
    node = mount.node
    proxy.add(Fault(kind="get", delay_s=0.2))
    command = [*CACHEFS, "warmup", f"--runtime-dir={node.runtime_dir}", str(mount.path)]
    with subprocess.Popen(command, env=node.environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as child:
        wait_until(lambda: proxy.count("get") > 10, 15, "it fetches")
        killed = node.kill_agent()
        _, said = child.communicate(timeout=20)
    assert child.returncode == 1
    assert "the agent ended" in said
    assert len(said.splitlines()) == 1
    proxy.clear()
    node.wait_for_agent(killed)
    wait_until(lambda: node.status()["mounts"][0]["health"] == "ok", 15, "the mount has its agent")
    check = last(run(node, "warmup", "--check", "--json", str(mount.path)))
    done = last(run(node, "warmup", "--json", str(mount.path)))
    assert done["state"] == "done"
    assert done["fetched_bytes"] == check["lost_bytes"], "what was there was left out, and the check told the truth"
    for name, body in (SMALL | LARGE).items():
        assert (mount.path / name).read_bytes() == body


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_ends_stops_its_job(mount: Mount, proxy: FaultProxy, number: int) -> None:
    node = mount.node
    proxy.add(Fault(kind="get", delay_s=0.3))
    command = [*CACHEFS, "warmup", f"--runtime-dir={node.runtime_dir}", str(mount.path)]
    with subprocess.Popen(command, env=node.environment, cwd=REPOSITORY, stderr=subprocess.PIPE) as child:
        wait_until(lambda: proxy.count("get") > 0, 15, "it fetches")
        child.send_signal(number)
        assert child.wait(10) == (130 if number == signal.SIGINT else -number)
    wait_until(lambda: [job["state"] for job in jobs(node)] == ["stopped"], 10, "the job is over")


def test_in_the_background(mount: Mount, proxy: FaultProxy) -> None:
    node = mount.node
    proxy.add(Fault(kind="get", delay_s=0.3))
    began = time.monotonic()
    done = run(node, "warmup", "--background", str(mount.path / "train"))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 5
    (job,) = jobs(node)
    assert job["job"] in done.stdout
    assert job["state"] in ("walking", "fetching")
    assert job["job"] in run(node, "status").stdout
    assert run(node, "warmup", "--stop", job["job"]).returncode == 0
    assert [job["state"] for job in jobs(node)] == ["stopped"]
    proxy.clear()
    assert run(node, "warmup", "--background", str(mount.path / "train")).returncode == 0
    wait_until(lambda: jobs(node)[-1]["state"] == "done", 20, "it is done")
    assert run(node, "warmup", "--check", str(mount.path / "train")).returncode == 0


def test_more_than_the_caches_can_hold(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> None:
    node = make_node(shm_size="16MiB", cache_size="24MiB")
    bucket.fill({f"part-{n:02}": content(f"part-{n}", 2 * MIB) for n in range(20)})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    done = run(node, "warmup", str(mount.path))
    assert done.returncode == 1
    assert "the caches hold 24" in done.stderr
    assert "--force" in done.stderr
    assert proxy.count("get") == 0
    assert run(node, "warmup", "--background", str(mount.path)).returncode == 0
    wait_until(lambda: jobs(node)[-1]["state"] == "failed", 10, "it says so")
    assert "larger than the tiers" in jobs(node)[-1]["error"]
    forced = run(node, "warmup", "--force", "--json", str(mount.path))
    assert forced.returncode == 1
    assert last(forced)["missing_blocks"] > 0, "and what is not there any more is said"
    assert last(forced)["fetched_bytes"] == 40 * MIB


def test_a_full_cache_takes_what_is_warmed_up(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    node = make_node(shm_size="16MiB", cache_size="32MiB")
    bucket.fill({f"{part}/{n:02}": content(f"{part}-{n}", MIB) for n in range(24) for part in ("old", "new")})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    for _ in range(2):
        for path in sorted((mount.path / "old").iterdir()):
            path.read_bytes()
            evict_pages(path)
    assert run(node, "warmup", str(mount.path / "old")).returncode == 0
    done = run(node, "warmup", "--json", str(mount.path / "new"))
    assert done.returncode == 0, last(done)


def test_a_store_that_is_away(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(SMALL)
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--io-timeout=2s")
    proxy.down = True
    done = run(node, "warmup", str(mount.path))
    assert done.returncode == 1
    assert "127.0.0.1" in done.stdout + done.stderr
    proxy.down = False
    kill(node.agent_pid, 0)
    assert run(node, "warmup", str(mount.path)).returncode == 0
