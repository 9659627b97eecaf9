"""The guards of tests/conftest.py catch what they are there for: a suite of guilty tests must fail, with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

GUILTY = """
import logging, os, socket, threading, time, warnings
import pytest

log = logging.getLogger("cachefs.somewhere")

def test_warning():
    log.warning("disk tier is full")

@pytest.mark.expect_warnings("something else")
def test_other_warning():
    log.error("disk tier is full")

@pytest.mark.expect_warnings("tier is full")
def test_expected_warning():
    log.warning("disk tier is full")

@pytest.mark.expect_warnings
def test_any_warning():
    log.error("anything")

def test_foreign_warning():
    logging.getLogger("cachefsish").warning("not ours")

def test_descriptor():
    os.open("/etc/passwd", os.O_RDONLY)

def test_closed_descriptor():
    os.close(os.open("/etc/passwd", os.O_RDONLY))

def test_thread():
    threading.Thread(target=time.sleep, args=(4,), daemon=True, name="sleeper").start()

def test_network():
    with socket.socket() as s:
        s.connect(("192.0.2.1", 80))

def test_network_ipv6():
    with socket.socket(socket.AF_INET6) as s:
        s.connect_ex(("2001:db8::1", 80))

def test_loopback():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass

def test_python_warning():
    warnings.warn("deprecated", DeprecationWarning)

def test_environment():
    assert not [name for name in os.environ if name.startswith("CACHEFS_")]
    assert "AWS_PROFILE" not in os.environ
"""
FAIL = {
    "test_warning": "WARNING cachefs.somewhere: disk tier is full",
    "test_other_warning": "ERROR cachefs.somewhere: disk tier is full",
    "test_descriptor": r"left behind: descriptor \d+ \(/etc/passwd\)",
    "test_thread": "left behind: thread sleeper",
    "test_network": "tests do not talk to 192.0.2.1",
    "test_network_ipv6": "tests do not talk to 2001:db8::1",
    "test_python_warning": "DeprecationWarning: deprecated",
}
PASS = {
    "test_expected_warning", "test_any_warning", "test_foreign_warning", "test_closed_descriptor", "test_loopback",
    "test_environment",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("guilty") / "unit"
    directory.mkdir()
    (directory / "test_guilty.py").write_text(GUILTY)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", "pyproject.toml", "--rootdir", str(directory),
            "-rA", "--tb=short", "-p", "no:cacheprovider", str(directory),
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/usr/bin:/bin", "CACHEFS_CACHE_SIZE": "1", "AWS_PROFILE": "work", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("name", FAIL)
def test_the_guilty_fail(report: str, name: str) -> None:
    assert re.search(rf"^(FAILED|ERROR) .*::{name}\b", report, re.MULTILINE), report
    assert re.search(FAIL[name], report)


@pytest.mark.parametrize("name", sorted(PASS))
def test_the_innocent_pass(report: str, name: str) -> None:
    assert re.search(rf"^PASSED .*::{name}$", report, re.MULTILINE), report
    assert not re.search(rf"^(FAILED|ERROR) .*::{name}\b", report, re.MULTILINE), report
