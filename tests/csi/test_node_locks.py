"""Which calls may be at work beside which."""

from __future__ import annotations

import threading

import pytest

from csi.locks import CallLocks
from csi.status import Code, Refused


def test_different_parts_go_beside_each_other_and_the_whole_does_not() -> None:
    locks = CallLocks()
    with locks.beside("v", "a"), locks.beside("v", "b"), locks.alone("w"):
        for second in (locks.alone("v"), locks.beside("v", "a"), locks.beside("w", "a"), locks.alone("w")):
            with pytest.raises(Refused, match="another call is at work on the volume") as caught, second:
                pass
            assert caught.value.code is Code.ABORTED
    with locks.alone("v"), pytest.raises(Refused), locks.beside("v", "a"):
        pass


def test_what_fails_lets_go() -> None:
    locks = CallLocks()
    for _ in range(2):
        with pytest.raises(KeyError), locks.alone("v"):
            raise KeyError
        with pytest.raises(KeyError), locks.beside("v", ""):
            raise KeyError


def test_who_waits_is_next() -> None:
    locks = CallLocks("mount")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locks.alone("v"):
            held.set()
            done.wait(5)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(5)
    threading.Timer(0.1, done.set).start()
    with locks.beside("v", "a", wait_s=5):
        pass
    holder.join()


def test_many_threads_and_one_name() -> None:
    locks = CallLocks()
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locks.alone("v", wait_s=10):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
