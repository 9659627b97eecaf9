"""The supervisor's parts without a mount: loop, journal, control socket, crash history, kernel versions, state file."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.config import Config, as_plain
from cachefs.mount import journal as journal_module
from cachefs.mount import kernel
from cachefs.mount.control import Caller, ControlError, ControlServer, ask
from cachefs.mount.crashes import BACKOFF_S, WINDOW_S, CrashHistory
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop
from cachefs.mount.mountpoint import claimed
from cachefs.mount.publication import ReadyLine, StateFile
from cachefs.mount.registry import command_line, wait_for_end
from cachefs.runtime import RuntimeDir


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file in the place of stderr."""
    path = tmp_path / "stderr"
    with path.open("ab") as file:
        monkeypatch.setattr(journal_module, "STDERR", file.fileno())
        yield path


# -- crash history ---------------------------------------------------------------------------------


def test_the_fifth_crash_within_a_minute_is_too_many() -> None:
    history = CrashHistory()
    assert [history.record(float(n)) for n in range(6)] == [*BACKOFF_S, None, None]
    history.clear()
    assert history.record(6.0) == 0.0


def test_old_crashes_are_forgotten() -> None:
    history = CrashHistory()
    assert [history.record(n * WINDOW_S) for n in range(20)] == [0.0] * 20


@given(st.lists(st.floats(0, 200), max_size=40).map(sorted))
def test_gives_up_exactly_when_five_fall_into_a_minute(times: list[float]) -> None:
    history = CrashHistory()
    for index, now in enumerate(times):
        recent = sum(now - time < WINDOW_S for time in times[: index + 1])
        assert (history.record(now) is None) == (recent >= 5)


# -- kernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "expected"),
    [("6.9.0", True), ("6.18.44-fc-v669", True), ("7.0-rc1", True), ("6.8.12", False), ("5.15.0-91-generic", False)],
)
def test_kernels_with_resend(release: str, expected: bool) -> None:
    assert kernel.supports_resend(release) is expected


def test_strange_kernel_release_counts_as_old() -> None:
    assert not kernel.supports_resend("weird")


def test_missing_device_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(kernel.MountFailure, match="No such file or directory: load the kernel module"):
        kernel.check_rights()
    monkeypatch.setattr(kernel, "DEVICE", "/dev/null")
    monkeypatch.setattr(kernel, "may_mount", lambda: False)
    monkeypatch.setattr(kernel, "find_fusermount", lambda: None)
    for call in (kernel.check_rights, lambda: kernel.unmount("/nonexistent")):
        with pytest.raises(kernel.MountFailure, match="needs root, or the program fusermount3"):
            call()


def test_connection_that_does_not_exist_cannot_be_aborted() -> None:
    before = os.listdir("/tmp")
    with pytest.raises(kernel.MountFailure, match="abort"):
        kernel.abort_connection(999_999)
    assert [name for name in os.listdir("/tmp") if "fusectl" in name and name not in before] == []


# -- loop ------------------------------------------------------------------------------------------


def test_loop_calls_back_in_order_and_survives_errors(stderr: Path) -> None:
    loop = Loop(Journal("info", as_json=False))
    seen: list[Any] = []
    reader, writer = os.pipe()

    def readable() -> None:
        seen.append(os.read(reader, 10))
        loop.unwatch(reader)
        raise RuntimeError("an error of ours")

    loop.watch(reader, readable)

    def late() -> None:
        seen.append("late")
        loop.stop()

    def first() -> None:
        seen.append("right")
        loop.cancel("never")
        os.write(writer, b"x")

    loop.after("late", 0.05, late)
    loop.after("never", 0.01, lambda: seen.append("never"))
    loop.after("replaced", 0.0, lambda: seen.append("wrong"))
    loop.after("replaced", 0.0, first)
    loop.run()
    assert seen == ["right", b"x", "late"]
    assert "RuntimeError: an error of ours at" in stderr.read_text()
    loop.close()
    os.close(reader)
    os.close(writer)


def test_loop_gets_signals(stderr: Path) -> None:
    loop = Loop(Journal("info", as_json=False))
    seen: list[int] = []
    before = signal.getsignal(signal.SIGUSR2)

    def caught(number: int) -> None:
        seen.append(number)
        loop.stop()

    try:
        loop.catch_signals((signal.SIGUSR2,), caught)
        loop.after("kill", 0, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        loop.run()
    finally:
        signal.signal(signal.SIGUSR2, before)
        loop.close()
    assert seen == [signal.SIGUSR2]


# -- journal ---------------------------------------------------------------------------------------


def test_lines_are_one_line_in_both_formats(stderr: Path) -> None:
    Journal("info", as_json=False).warning("two\nlines \x1b[31m \udcff")
    Journal("info", as_json=True).error("two\nlines")
    Journal("warning", as_json=True).info("not important enough")
    text, line = stderr.read_text().splitlines()
    assert text.endswith(f"WARNING supervisor[{os.getpid()}] cachefs.mount.supervisor: two\\nlines \\x1b[31m \\udcff")
    assert json.loads(line)["message"] == "two\nlines"
    assert json.loads(line)["level"] == "error"


def test_writing_never_blocks_and_says_what_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(journal_module, "STDERR", writer)
    journal = Journal("info", as_json=False)
    journal.write(bytes(1 << 20))
    received = 0
    os.set_blocking(reader, False)
    try:
        while piece := os.read(reader, 1 << 20):
            received += len(piece)
    except BlockingIOError:
        pass
    journal.info("after")
    text = os.read(reader, 1 << 16).decode()
    assert text.startswith(f"({(1 << 20) - received} bytes of log were lost")
    assert text.endswith("after\n")
    os.close(reader)
    journal.info("nobody reads this")
    os.close(writer)


def test_reads_back_what_was_written_since(stderr: Path) -> None:
    journal = Journal("info", as_json=False)
    journal.write(b"before\n")
    start = journal_module.stderr_size()
    journal.write(b"after\n" * 3)
    assert journal_module.read_back(start, 1000) == b"after\n" * 3
    assert journal_module.read_back(start, 6) == b"after\n"
    assert journal_module.read_back(start + 1000, 6) == b""


def test_log_that_grew_is_cut_at_a_line_and_goes_on(stderr: Path) -> None:
    journal = Journal("info", as_json=False)
    journal.write(b"".join(b"line %06d\n" % number for number in range(1000)))
    journal_module.shorten_stderr(1 << 20, 100)
    assert stderr.stat().st_size == 12_000
    journal_module.shorten_stderr(4096, 100)
    journal.write(b"after\n")
    assert stderr.read_bytes().splitlines() == [b"line %06d" % number for number in range(992, 1000)] + [b"after"]


# -- control socket --------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path, stderr: Path) -> Iterator[Callable[..., ControlServer]]:
    """Run control servers in a thread."""
    started: list[tuple[ControlServer, Loop, threading.Thread, int]] = []

    def start(path: str, answer: Callable[[dict[str, Any], Caller], None]) -> ControlServer:
        loop = Loop(Journal("info", as_json=False))
        server = ControlServer(path, loop, answer)
        reader, writer = os.pipe()

        def end() -> None:
            loop.unwatch(reader)
            os.close(reader)
            server.close()
            loop.stop()

        loop.watch(reader, end)
        thread = threading.Thread(target=loop.run)
        thread.start()
        started.append((server, loop, thread, writer))
        return server

    yield start
    for _, loop, thread, writer in started:
        os.close(writer)
        thread.join()
        loop.close()


def test_request_and_answer(serve: Callable[..., ControlServer], tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    serve(path, lambda request, caller: caller.answer({"ok": True, "echo": request}))
    assert ask(path, {"command": "x" * 200_000}, 5)["echo"] == {"command": "x" * 200_000}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_paths_longer_than_a_socket_address(serve: Callable[..., ControlServer], tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    path = str(directory / "s.sock")
    server = serve(path, lambda _, caller: caller.answer({"ok": True}))
    assert ask(path, {}, 5) == {"ok": True}
    server.rename("t")
    assert ask(str(directory / "t.sock"), {}, 5) == {"ok": True}


@pytest.mark.parametrize("raw", [b"not json\n", b"[1]\n", b"\xff\n", b'"x"\n'])
def test_nonsense_is_refused(serve: Callable[..., ControlServer], tmp_path: Path, raw: bytes) -> None:
    path = str(tmp_path / "s")
    serve(path, lambda _, caller: caller.answer({"ok": True}))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(raw)
        assert json.loads(connection.recv(1000))["kind"] == "usage"


def test_endless_requests_and_silent_callers_do_not_keep_others_out(
    serve: Callable[..., ControlServer], tmp_path: Path
) -> None:
    path = str(tmp_path / "s")
    serve(path, lambda _, caller: caller.answer({"ok": True}))
    with socket.socket(socket.AF_UNIX) as endless:
        endless.connect(path)
        with pytest.raises(OSError, match=r"pipe|reset"):
            endless.sendall(bytes(8 << 20))
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for connection in silent:
        connection.connect(path)
    assert ask(path, {}, 5) == {"ok": True}
    for connection in silent:
        connection.close()
    assert ask(path, {}, 5) == {"ok": True}


def test_late_answer_and_caller_who_went_away(serve: Callable[..., ControlServer], tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    callers: list[Caller] = []

    def answer(request: dict[str, Any], caller: Caller) -> None:
        if request.get("wait"):
            callers.append(caller)
        else:
            for waiting in callers:
                waiting.answer({"ok": True, "late": True})
            caller.answer({"ok": True})

    serve(path, answer)
    with pytest.raises(ControlError, match="timed out"):
        ask(path, {"wait": True}, 0.05)
    assert ask(path, {}, 5) == {"ok": True}


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="does not answer"):
        ask(str(tmp_path / "s"), {}, 1)
    with pytest.raises(ControlError, match="does not answer"):
        ask(str(tmp_path / ("x" * 200) / "s"), {}, 1)


def test_new_server_replaces_the_socket_of_a_dead_one_and_the_old_leaves_it_alone(
    serve: Callable[..., ControlServer], tmp_path: Path, stderr: Path
) -> None:
    path = str(tmp_path / "s.sock")
    loop = Loop(Journal("info", as_json=False))
    old = ControlServer(path, loop, lambda *_: None)
    serve(path, lambda _, caller: caller.answer({"ok": True, "new": True}))
    old.close()
    loop.close()
    assert ask(path, {}, 5) == {"ok": True, "new": True}


# -- state, readiness, claims ----------------------------------------------------------------------


def a_state(tmp_path: Path) -> StateFile:
    plan = {"mount_id": "m", "mountpoint": "/m", "source": "s3://b", "version": "1", "config": as_plain(Config())}
    return StateFile(RuntimeDir(str(tmp_path / "run")), plan, Journal("info", as_json=False))


def test_state_file_is_rewritten_moved_and_removed(tmp_path: Path, stderr: Path) -> None:
    state = a_state(tmp_path)
    state.update(state="serving")
    assert json.loads(Path(state.path).read_text())["state"] == "serving"
    before = os.stat(state.path).st_ino
    state.update(state="serving")
    assert os.stat(state.path).st_ino == before
    state.move("m-1")
    assert [path.name for path in (tmp_path / "run" / "mounts").iterdir()] == ["m-1.json"]
    state.remove()
    assert list((tmp_path / "run" / "mounts").iterdir()) == []


def test_state_file_of_a_successor_is_left_alone(tmp_path: Path, stderr: Path) -> None:
    state = a_state(tmp_path)
    state.update(state="serving")
    Path(state.path).write_text(json.dumps({"supervisor_pid": 1}))
    state.remove()
    assert Path(state.path).exists()


def test_ready_line_is_sent_once(stderr: Path) -> None:
    reader, writer = os.pipe()
    ready = ReadyLine(writer, Journal("info", as_json=False))
    ready.fail("BucketNotFound", "no bucket")
    ready.succeed()
    assert json.loads(os.read(reader, 1000)) == {"ok": False, "kind": "BucketNotFound", "text": "no bucket"}
    assert os.read(reader, 1000) == b""
    assert "no bucket" in stderr.read_text()
    os.close(reader)


def test_claim_is_exclusive_and_leaves_nothing(tmp_path: Path) -> None:
    from cachefs.errors import MountError

    runtime = RuntimeDir(str(tmp_path / "run"))
    with (
        claimed("/m", runtime),
        pytest.raises(MountError, match="another `cachefs mount` of /m"),
        claimed("/m", runtime),
    ):
        pass
    with claimed("/m", runtime):
        pass
    assert list((tmp_path / "run" / "mounts").iterdir()) == []


def test_claims_of_many_at_once_never_overlap(tmp_path: Path) -> None:
    from cachefs.errors import MountError

    runtime = RuntimeDir(str(tmp_path / "run"))
    inside, worst, refused = 0, 0, 0
    guard = threading.Lock()
    deadline = time.monotonic() + 60

    def contend(turns: int) -> None:
        nonlocal inside, worst, refused
        while turns and time.monotonic() < deadline:
            try:
                with claimed("/m", runtime):
                    with guard:
                        inside += 1
                        worst = max(worst, inside)
                    time.sleep(0.0005)  # somebody else comes meanwhile
                    with guard:
                        inside -= 1
                    turns -= 1
            except MountError:
                with guard:
                    refused += 1
        assert turns == 0, "a claim that nobody holds is refused"

    with ThreadPoolExecutor(4) as pool:
        for ended in [pool.submit(contend, 25) for _ in range(4)]:
            ended.result()
    assert worst == 1
    assert refused > 0


def test_waiting_for_a_process_that_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert wait_for_end(pid, 5)  # a zombie has ended
    os.waitpid(pid, 0)
    assert wait_for_end(pid, 0)
    assert command_line(pid) == []
    assert not wait_for_end(os.getpid(), 0.01)
