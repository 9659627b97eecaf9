"""A worker for supervisor tests: speaks the worker protocol and answers a tiny file system by raw structs.

    fake_worker.py BEHAVIOUR_DIR --device-fd N --plan-fd P --report-fd R --control-fd C

Files in BEHAVIOUR_DIR steer it: `crash` (exit 3 at once, its text goes to stderr), `abort` and `abort-once` (dies by a
signal before it serves), `fatal` (reports its text as a fatal BucketNotFound), `mute` (never gets prepared), `hold`
(READs are taken and never answered). It appends "pid first" to `started`, and "pid unique" to `taken` for every READ.

The file system: /pattern, 16 MiB, byte at offset i is i // 4096 % 251, always read from the worker (direct I/O).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import stat
import struct
import sys
import time
from pathlib import Path

IN_HEADER = struct.Struct("<IIQQ")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
SIZE = 16 << 20
ROOT, PATTERN = 1, 2
NO_ANSWER = (2, 36, 42)


def attributes(ino: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if ino == ROOT else stat.S_IFREG | 0o444
    size = 0 if ino == ROOT else SIZE
    return ATTR.pack(ino, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)


def pattern(offset: int, size: int) -> bytes:
    end = min(offset + size, SIZE)
    pages = b"".join(bytes([page % 251]) * 4096 for page in range(offset // 4096, -(-end // 4096)))
    return pages[offset % 4096 : offset % 4096 + max(end - offset, 0)]


class FakeWorker:
    def __init__(self, behaviour: Path, device: int, report: int) -> None:
        self.behaviour, self.device, self.report = behaviour, device, report

    def say(self, **event: object) -> None:
        try:
            os.write(self.report, json.dumps(event).encode() + b"\n")
        except OSError:
            pass  # the supervisor was killed

    def wants(self, name: str) -> bool:
        return (self.behaviour / name).exists()

    def reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        try:
            os.write(self.device, OUT_HEADER.pack(16 + len(body), -error, unique) + body)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def answer_init(self, init: bytes) -> None:
        _, _, unique, _ = IN_HEADER.unpack_from(init)
        major, minor, readahead, flags = struct.unpack_from("<IIII", init, 40)
        body = struct.pack(
            "<IIIIHHIIHHII6I",
            major,
            min(minor, 38),
            readahead,
            flags & (1 | 1 << 22),
            16,
            12,
            1 << 20,
            1,
            256,
            *[0] * 9,
        )
        self.reply(unique, body)
        self.say(event="init-answered")

    def serve(self) -> None:
        while True:
            try:
                message = os.read(self.device, (1 << 20) + 65536)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                self.say(event="unmounted")
                return
            self.answer(message)

    def answer(self, message: bytes) -> None:
        _, opcode, unique, ino = IN_HEADER.unpack_from(message)
        body = message[40:]
        if opcode in NO_ANSWER:
            return
        if opcode == 1:  # LOOKUP
            if body.rstrip(b"\0") != b"pattern":
                self.reply(unique, error=errno.ENOENT)
                return
            self.reply(unique, struct.pack("<QQQQII", PATTERN, 0, 60, 60, 0, 0) + attributes(PATTERN))
        elif opcode == 3:  # GETATTR
            self.reply(unique, struct.pack("<QII", 60, 0, 0) + attributes(ino))
        elif opcode in (14, 27):  # OPEN (direct I/O), OPENDIR
            self.reply(unique, struct.pack("<QIi", ino, 1 if opcode == 14 else 0, 0))
        elif opcode == 15:  # READ
            self.read(unique, *struct.unpack_from("<QQI", body)[1:])
        elif opcode == 17:  # STATFS
            self.reply(unique, struct.pack("<QQQQQIIII6I", 1 << 20, 0, 0, 2, 0, 4096, 255, 4096, 0, *[0] * 6))
        elif opcode == 28:  # READDIR
            _, offset, _ = struct.unpack_from("<QQI", body)
            self.reply(unique, b"" if offset else struct.pack("<QQII", PATTERN, 1, 7, 8) + b"pattern\0")
        elif opcode in (18, 25, 29, 34, 38):  # RELEASE, FLUSH, RELEASEDIR, ACCESS, DESTROY
            self.reply(unique)
        else:
            self.reply(unique, error=errno.ENOSYS)

    def read(self, unique: int, offset: int, size: int) -> None:
        with (self.behaviour / "taken").open("a") as file:
            file.write(f"{os.getpid()} {unique}\n")
        if not self.wants("hold"):
            self.reply(unique, pattern(offset, size))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour", type=Path)
    for name in ("device", "plan", "report", "control"):
        parser.add_argument(f"--{name}-fd", type=int, required=True)
    a = parser.parse_args()
    with open(a.plan_fd, "rb") as file:
        plan = json.load(file)
    worker = FakeWorker(a.behaviour, a.device_fd, a.report_fd)
    with (a.behaviour / "started").open("a") as started:
        started.write(f"{os.getpid()} {plan['first']}\n")
    if worker.wants("crash"):
        print((a.behaviour / "crash").read_text(), file=sys.stderr)
        return 3
    if worker.wants("abort-once"):
        (a.behaviour / "abort-once").unlink()
        os.kill(os.getpid(), signal.SIGABRT)
    if worker.wants("abort"):
        os.kill(os.getpid(), signal.SIGABRT)
    if worker.wants("fatal"):
        worker.say(event="fatal", kind="BucketNotFound", text=(a.behaviour / "fatal").read_text())
        return 1
    while worker.wants("mute"):
        time.sleep(0.05)
    worker.say(event="prepared")
    if os.read(a.control_fd, 16) != b"go\n":
        return 4
    if plan["first"]:
        worker.answer_init(bytes.fromhex(plan["init"]))
    worker.say(event="serving", agent_pid=4711)
    worker.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
