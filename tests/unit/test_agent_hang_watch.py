"""Whether an agent shows a sign of life, on real sockets."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs.agent.launch import silent_listener
from cachefs.runtime import lock_holder


@contextmanager
def listening(path: Path, backlog: int = 8) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        yield listener


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Path]:
    """A lock that this process holds."""
    path = tmp_path / "lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def test_nobody_listens(tmp_path: Path) -> None:
    assert silent_listener(str(tmp_path / "sock"), "", 0.1) == 0
    with listening(tmp_path / "sock"):
        pass
    assert silent_listener(str(tmp_path / "sock"), "", 0.1) == 0


def test_one_who_does_not_react_is_named(tmp_path: Path) -> None:
    with listening(tmp_path / "sock"):
        assert silent_listener(str(tmp_path / "sock"), "", 0.1) == os.getpid()


@pytest.mark.parametrize("answer", [b"something", b""], ids=["an answer", "a hang-up"])
def test_any_reaction_will_do(tmp_path: Path, answer: bytes) -> None:
    with listening(tmp_path / "sock") as listener:

        def react() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.send(answer)

        thread = threading.Thread(target=react)
        thread.start()
        assert silent_listener(str(tmp_path / "sock"), "", 10) == 0
        thread.join()


def test_where_there_is_no_room_the_lock_says_who_it_is(tmp_path: Path, lock: Path) -> None:
    with listening(tmp_path / "sock", backlog=0), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(tmp_path / "sock"))
        assert silent_listener(str(tmp_path / "sock"), str(lock), 0.1) == os.getpid()


def test_locks_that_nobody_holds(tmp_path: Path, lock: Path) -> None:
    assert lock_holder(str(lock)) == os.getpid()
    (tmp_path / "other").touch()
    assert lock_holder(str(tmp_path / "other")) == 0
    assert lock_holder(str(tmp_path / "none")) == 0
