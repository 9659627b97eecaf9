"""What is written to the kernel about names, and by whom."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cachefs.fuse import kernel_names, notifier
from cachefs.fuse.kernel_names import KernelNames
from cachefs.fuse.protocol import all_names_expired, name_expired
from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO
from metadata.store import MetadataWriter
from tests.support.tree import Clock, ask_name


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    """A pipe that keeps messages apart, in the place of the device: (to read, to write)."""
    ends = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    made.put("v/file", b"one")
    made.put("v/d/below", b"x")
    return made


def written(end: int) -> list[bytes]:
    found = []
    try:
        while message := os.read(end, 4096):
            found.append(message)
    except BlockingIOError:
        pass
    return found


def test_the_messages_are_those_of_the_kernel() -> None:
    assert name_expired(7, b"name").hex() == (
        "25000000" "03000000" "0000000000000000" "0700000000000000" "04000000" "01000000" "6e616d6500"
    )  # fmt: skip
    assert all_names_expired().hex() == "10000000080000000000000000000000"


def test_the_notifier_writes_message_by_message(device: tuple[int, int]) -> None:
    messages = [name_expired(ROOT_INO, bytes([number]) * number) for number in range(1, 14)]
    command = [sys.executable, "-I", "-S", str(notifier.__file__)]
    done = subprocess.run(command, input=b"".join(messages), stdout=device[1], check=False)
    assert done.returncode == 0
    assert written(device[0]) == messages


def test_the_notifier_says_what_the_kernel_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(notifier.__file__)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, input=name_expired(1, b"a"), stdout=full, check=False)
    assert done.returncode == errno.ENOSPC
    for nonsense in (b"", b"abc", bytes(4), b"\xff" * 9):
        with open(os.devnull, "wb") as null:
            assert subprocess.run(command, input=nonsense, stdout=null, check=False).returncode == 0


async def test_a_name_that_leads_elsewhere_is_let_go_once(
    writer: MetadataWriter, store: MemoryStore, clock: Clock, device: tuple[int, int]
) -> None:
    names = KernelNames(device[1], writer.reader)
    dentry = writer.reader.dentry(ROOT_INO, b"file")
    assert dentry is not None
    await names.let_go(dentry.ino)
    assert written(device[0]) == [], "it is still what it was"
    store.put("v/file", b"other")
    ask_name(writer, store, ROOT_INO, b"file", clock)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(names.let_go, dentry.ino)
    assert written(device[0]) == [name_expired(ROOT_INO, b"file")]


async def test_nobody_waits_for_long_and_what_was_not_begun_is_tried_again(
    writer: MetadataWriter, store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, device: tuple[int, int]
) -> None:
    names = KernelNames(device[1], writer.reader)
    lost = []
    for number in range(kernel_names.MAX_AT_ONCE + 1):
        dentry = writer.reader.dentry(ROOT_INO, b"file")
        assert dentry is not None
        lost.append(dentry.ino)
        store.put("v/file", b"x" * (10 + number))
        ask_name(writer, store, ROOT_INO, b"file", clock)
    monkeypatch.setattr(kernel_names, "PATIENCE_S", 0.3)
    with monkeypatch.context() as patch:
        slow = (
            sys.executable,
            "-c",
            "import sys, time; time.sleep(1.5); sys.stdout.buffer.write(sys.stdin.buffer.read())",
        )
        patch.setattr(kernel_names, "_NOTIFIER", slow)
        with trio.fail_after(1.4):
            async with trio.open_nursery() as nursery:
                for ino in lost[:-1]:
                    nursery.start_soon(names.let_go, ino)
                await trio.sleep(0.1)
                nursery.start_soon(names.let_go, lost[-1])
        assert written(device[0]) == []
        await trio.sleep(2.0)
    assert len(written(device[0])) == kernel_names.MAX_AT_ONCE, "they went on"
    await names.let_go(lost[-1])
    assert len(written(device[0])) == 1


async def test_all_names_are_let_go_at_once(writer: MetadataWriter, device: tuple[int, int]) -> None:
    names = KernelNames(device[1], writer.reader)
    names.note_top()
    await names.let_go_of_all()
    assert written(device[0]) == [all_names_expired()]


async def test_a_kernel_without_epochs_is_told_the_names_at_the_top(
    writer: MetadataWriter, device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = KernelNames(device[1], writer.reader)

    def refuse(_descriptor: int, _message: bytes) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    names.note_top()
    monkeypatch.setattr(os, "write", refuse)
    await names.let_go_of_all()
    monkeypatch.undo()
    assert written(device[0]) == [name_expired(ROOT_INO, b"d"), name_expired(ROOT_INO, b"file")]


@pytest.mark.expect_warnings("the kernel keeps names")
async def test_no_notifier_is_no_error(
    writer: MetadataWriter, store: MemoryStore, clock: Clock, device: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = KernelNames(device[1], writer.reader)
    dentry = writer.reader.dentry(ROOT_INO, b"file")
    assert dentry is not None
    store.delete("v/file")
    ask_name(writer, store, ROOT_INO, b"file", clock)
    monkeypatch.setattr(kernel_names, "_NOTIFIER", ("/nonexistent/python",))
    await names.let_go(dentry.ino)
    assert written(device[0]) == []
