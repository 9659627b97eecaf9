"""Very many mounts, with tiny workers: what the keeper costs, and that it forgets nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.keeper.client import KeeperError
from tests.keeper.rig import KubeletNode
from tests.support.machine import kill, wait_until

MOUNTS = 200
MAX_ANONYMOUS_KIB = 20 << 10


def anonymous_kib(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])


def mount_all(node: KubeletNode, count: int) -> None:
    plan = node.plan("s3://bucket")
    failures: list[KeeperError] = []

    def some(first: int) -> None:
        for number in range(first, count, 8):
            try:
                node.client.mount(
                    f"v{number}", plan, environment={}, fingerprint="f", labels={"volume": f"v{number}"}, timeout_s=90
                )
                for pod in range(2):
                    node.client.bind(f"v{number}", str(node.target(f"pod-{number}-{pod}")), read_only=True)
            except KeeperError as error:
                failures.append(error)

    threads = [threading.Thread(target=some, args=[first]) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_hundred_mounts_in_a_small_keeper(make_node: Callable[..., KubeletNode], tmp_path: Path) -> None:
    node = make_node()
    keeper = node.start_keeper()
    node.start_service(behaviour=tmp_path)
    print(f"without mounts: {anonymous_kib(keeper.pid)} KiB")
    mount_all(node, MOUNTS)
    states = node.status().mounts
    assert [state.state for state in states] == ["serving"] * MOUNTS
    assert all(len(state.targets) == 2 for state in states)
    print(f"with {MOUNTS} mounts: {anonymous_kib(keeper.pid)} KiB")
    assert anonymous_kib(keeper.pid) < MAX_ANONYMOUS_KIB

    workers = {state.key: state.worker_pid for state in states}
    kill(keeper.pid)
    keeper.wait()
    keeper = node.start_keeper()

    def all_replaced() -> bool:
        found = node.status().mounts
        return len(found) == MOUNTS and all(
            state.state == "serving" and state.worker_pid not in (None, workers[state.key]) for state in found
        )

    wait_until(all_replaced, 60, f"all are back {node.logs()[-2000:]}")
    assert node.read(node.target("pod-7-1") / "pattern")[:4096] == bytes(4096)
    print(f"after a restart: {anonymous_kib(keeper.pid)} KiB")
    assert anonymous_kib(keeper.pid) < MAX_ANONYMOUS_KIB
    for state in node.status().mounts:
        assert node.client.unmount(state.key, force=True)
    wait_until(lambda: not node.status().mounts, 30, "all are gone")
    assert node.mounted() == []
    wait_until(lambda: not node.processes("fake_worker"), 10, "all workers have ended")
