"""`cachefs agent` as a service manager runs it: in the foreground, once per cache directory, until SIGTERM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.cli import status

COMMAND = [sys.executable, "-m", "cachefs.cli.main", "agent", "--shm-size=16MiB", "--cache-size=64MiB"]


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # a socket's address has 107 bytes
        yield Path(short)


def options(base: Path) -> list[str]:
    return [f"--runtime-dir={base}/run", f"--cache-dir={base}/cache", f"--shm-dir={base}/shm"]


def test_from_start_to_end(base: Path) -> None:
    (base / "shm").mkdir()
    with subprocess.Popen([*COMMAND, *options(base), "--log-format=json"], stderr=subprocess.PIPE, text=True) as agent:
        try:
            deadline = time.monotonic() + 20
            while not (agents := status.collect(f"{base}/run")["agents"]) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert [known["agent_pid"] for known in agents] == [agent.pid]
            assert agents[0]["tiers"]["disk"]["state"] == "on"
            assert tuple(agents[0]) == status.AGENT_KEYS
            assert status.render(status.collect(f"{base}/run"))[0].startswith(f"AGENT {agent.pid} of {base}/cache")

            second = subprocess.run([*COMMAND, *options(base)], capture_output=True, text=True, timeout=30, check=False)
            assert second.returncode == 1
            assert second.stderr == f"cachefs: an agent serves {base}/cache already\n"

            agent.send_signal(signal.SIGTERM)
            _, written = agent.communicate(timeout=20)
        finally:
            agent.kill()
    assert agent.returncode == 0
    assert {json.loads(line)["role"] for line in written.splitlines()} == {"agent"}
    assert status.collect(f"{base}/run")["agents"] == []
    assert list((base / "shm").iterdir()) == []


def test_what_cannot_be_served(base: Path) -> None:
    for place in ("--runtime-dir=/proc/none", "--shm-dir=/nonexistent", "--cache-dir=/dev/null"):
        done = subprocess.run(
            [*COMMAND, *options(base)[1:2], place], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("cachefs: ")
        assert done.stderr.count("\n") == 1
