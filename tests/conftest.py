"""What every suite shares: tests fail on unexpected warnings and leaks, stay on this machine, and print what hangs.

* A WARNING (or worse) that cachefs logs in this process fails the test, unless it is marked
  ``@pytest.mark.expect_warnings`` (any) or ``@pytest.mark.expect_warnings("part of the message", ...)`` (only these).
* Tests below tests/unit must give back every descriptor and end every thread that they started.
* Connections that leave the loopback interface fail; AWS_* and CACHEFS_* of the shell are not seen.
* ``@pytest.mark.fuse`` tests are skipped, with the reason, where nothing can be mounted.
* One real S3 server (`s3_server`) for the whole run, started when the first test asks for it.
* Hypothesis: profile "dev" (50 examples), "ci" with CI=true (100), HYPOTHESIS_PROFILE=nightly (1000).
"""

from __future__ import annotations

import faulthandler
import gc
import ipaddress
import logging
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.servers import s3_bucket, s3_server

__all__ = ["s3_bucket", "s3_server"]

OUR_LOGGERS = re.compile(r"(cachefs|metadata|peer|csi)(\.|$)")
LEAK_GRACE_S = 2.0
"""How long threads and descriptors of something that was just closed may take to go."""
_LASTING = re.compile(r"/dev/(null|urandom|random|pts/\d+|tty)$|/proc/|anon_inode:inotify")
"""Descriptors that the interpreter or a library opens once and keeps."""
_LASTING_THREADS = re.compile(r"Trio thread|trio_pool|pytest_timeout|pydevd|ThreadPoolExecutor|matplotlib")

_SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large]  # two busy cores are no reason to fail
settings.register_profile("dev", max_examples=50, deadline=None, print_blob=True, suppress_health_check=_SUPPRESSED)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=100, derandomize=False)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Register our marker, isolate the environment, and show all stacks on SIGUSR1."""
    config.addinivalue_line(
        "markers",
        "expect_warnings(*parts): our warnings that contain one of the parts (none: any) are fine",
    )
    for name in list(os.environ):
        if name.startswith(("AWS_", "CACHEFS_")):
            del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = "/nonexistent/aws"
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell in the background (`make test &`) has it ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that mount where nothing can be mounted."""
    if item.get_closest_marker("fuse") is not None:
        reason = _why_no_mounts()
        if reason:
            pytest.skip(reason)


def _why_no_mounts() -> str:
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no right to open /dev/fuse"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "neither root nor fusermount3"
    return ""


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_unexpected_warnings(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    marker = request.node.get_closest_marker("expect_warnings")
    expected: tuple[str, ...] = marker.args if marker else ()
    if marker and not expected:
        return
    unexpected = [
        f"{record.levelname} {record.name}: {record.getMessage()}"
        for when in ("setup", "call")
        for record in caplog.get_records(when)
        if record.levelno >= logging.WARNING
        and OUR_LOGGERS.match(record.name)
        and not any(part in record.getMessage() for part in expected)
    ]
    if unexpected:
        shown = "\n".join(unexpected[:20])
        pytest.fail(
            f"{len(unexpected)} unexpected warnings (mark the test expect_warnings if they belong there):\n{shown}"
        )


# -- leaks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.parent.name != "unit":
        yield
        return
    descriptors, threads = _descriptors(), _threads()
    yield
    deadline = time.monotonic() + LEAK_GRACE_S
    while (left := _leaked(descriptors, threads)) and time.monotonic() < deadline:
        gc.collect()  # what only a cycle keeps alive is no leak
        time.sleep(0.01)
    if left:
        pytest.fail("left behind: " + ", ".join(left))


def _leaked(descriptors: dict[int, str], threads: set[threading.Thread]) -> list[str]:
    opened = [
        f"descriptor {number} ({target})"
        for number, target in _descriptors().items()
        if descriptors.get(number) != target and not _LASTING.search(target)
    ]
    return opened + [f"thread {thread.name}" for thread in _threads() - threads]


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listdir itself used
    return found


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not _LASTING_THREADS.match(thread.name)}


# -- network ----------------------------------------------------------------------------------------------------------


class NetworkForbidden(RuntimeError):
    """A test wanted to leave this machine. No OSError, so that code that retries connections cannot swallow it."""


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    patched = pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        patched.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
    yield
    patched.undo()


def _guarded(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
            raise NetworkForbidden(f"tests do not talk to {address[0]}")
        return connect(self, address)

    return guarded


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
