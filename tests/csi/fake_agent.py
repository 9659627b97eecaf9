"""An agent that fetches nothing: it answers what the node service asks at a real socket, as the test says.

`refuse` makes checks of buckets fail; jobs are warm as far as the test says.
"""

from __future__ import annotations

import contextlib
import os
import socketserver
import threading
from pathlib import Path
from typing import Any, Self

from cachefs.agent import framing, messages
from cachefs.config import CacheConfig
from cachefs.runtime import agent_id


class FakeAgent:
    """Context manager."""

    def __init__(self, cache: CacheConfig) -> None:
        self.path = Path(cache.runtime_dir, "agents", f"{agent_id(cache.cache_dir)}.sock")
        self.refuse: tuple[str, str] | None = None
        """Kind and text of what is wrong with all buckets."""
        self.attached: list[messages.Attach] = []
        self.work: list[messages.Work] = []
        self.paths: list[list[bytes]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.volumes: dict[str, Any] = {}
        self.mounts: dict[str, Any] = {}
        self.starts_as: dict[str, Any] = {"state": "fetching"}
        """How new jobs are."""
        self.silent = threading.Event()
        """Set: connections are taken, and nothing is answered."""
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._server = _Server(str(self.path), _Connection)
        self._server.agent = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Die: jobs are forgotten."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            self.path.unlink(missing_ok=True)
            self.jobs.clear()

    def answers(self, request: messages.Request) -> list[messages.Answer]:
        """Return what is said to a message."""
        match request:
            case messages.Ping():
                return [messages.Done(id=request.id)]
            case messages.Attach():
                self.attached.append(request)
                if self.refuse is not None:
                    return [messages.Failure(id=request.id, kind=self.refuse[0], text=self.refuse[1])]
                return [
                    messages.Attached(
                        id=request.id, pid=1, version="0", shm_path=None, metadata_path="/nowhere", volume_id="v",
                        endpoint="", bucket="", block_size=1 << 20,
                    )
                ]  # fmt: skip
            case messages.Status():
                status = {"jobs": list(self.jobs.values()), "volumes": self.volumes, "mounts": self.mounts}
                return [messages.StatusReply(id=request.id, status=status)]
            case messages.Work():
                self.work.append(request)
                job = f"{len(self.work)}-job"
                self.jobs[job] = {"job": job, "bytes": 1000, "done_bytes": 0, "files": 10, **self.starts_as}
                return [messages.JobState(id=request.id, job=self.jobs[job])]
            case messages.Paths():
                self.paths.append(request.paths)
                return [messages.Done(id=request.id), messages.JobState(id=1, job=self.jobs[request.job])]
        return [messages.Failure(id=1, kind="Unsupported", text="the fake agent does not know this")]


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    agent: FakeAgent

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none."""


class _Connection(socketserver.BaseRequestHandler):
    server: _Server  # it is never another

    def handle(self) -> None:
        frames = framing.requests()
        while received := self.request.recv(65536):
            for request in frames.feed(received):
                if self.server.agent.silent.is_set():
                    continue
                for answer in self.server.agent.answers(request):
                    self.request.sendall(framing.encode(answer))
