"""A keeper without mounts: it speaks the protocol at a real unix socket, and remembers what it was told.

For tests of the node service that need many volumes, or a keeper that fails in a certain way. Binds are directories.

    with FakeKeeper(tmp_path / "keeper.sock", root) as keeper:
        KeeperClient(str(keeper.path)).status()
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self


class FakeKeeper:
    """Context manager."""

    def __init__(self, path: Path, root: Path, *, driver_name: str = "cachefs.csi.k8s.io") -> None:
        self.path = path
        self.root = root
        self.own_places = f"{root}/plugins/{driver_name}/mounts"
        self.mounts: dict[str, dict[str, Any]] = {}
        self.plans: dict[str, dict[str, Any]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.calls: Counter[str] = Counter()
        self.raw = b""
        """Everything that was ever received."""
        self.lost: set[tuple[str, str]] = set()
        """Targets, each with its mount's key, that somebody has unmounted: noticed by a repair."""
        self.has_runner = True
        self.failures: dict[str, tuple[str, str]] = {}
        """By command: kind and text."""
        self.mount_s = 0.0
        """How long a mount takes to be made."""
        self._lock = threading.RLock()
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._server = _Server(str(self.path), _Request)
        self._server.keeper = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Do not listen any more; what was told stays."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            self.path.unlink(missing_ok=True)

    def targets(self, volume_id: str) -> set[str]:
        """Return where a volume is bound, its stage included."""
        return {
            target["path"]
            for mount in self.mounts.values()
            if mount["labels"].get("volume") == volume_id
            for target in mount["targets"]
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request says."""
        command = str(request.get("command"))
        self.calls[command] += 1
        if command in self.failures:
            kind, text = self.failures[command]
            return {"ok": False, "kind": kind, "text": text}
        if command == "mount" and self.mount_s and request["key"] not in self.mounts:
            time.sleep(self.mount_s)
        with self._lock:
            reply: dict[str, Any] = getattr(self, f"_{command}")(request)
        return reply

    def _mount(self, request: dict[str, Any]) -> dict[str, Any]:
        key = request["key"]
        known = self.mounts.get(key)
        if known is not None:
            if known["fingerprint"] != request["fingerprint"]:
                return {"ok": False, "kind": "exists", "text": f"{key} is mounted in another way"}
            known["state"] = "serving"
            return {"ok": True}
        self.plans[key], self.environments[key] = request["plan"], request["environment"]
        self.mounts[key] = {
            "key": key, "mountpoint": f"{self.own_places}/{key}", "state": "serving",
            "fingerprint": request["fingerprint"], "labels": dict(request["labels"]), "targets": [],
            "worker_pid": 1, "worker_version": "0", "restarts": 0, "last_crash": None, "connection": 1,
            "started_at": time.time(), "source": request["plan"]["source"],
        }  # fmt: skip
        return {"ok": True}

    def _unmount(self, request: dict[str, Any]) -> dict[str, Any]:
        mount = self.mounts.get(request["key"])
        if mount is not None and mount["targets"] and not request.get("force"):
            return {"ok": False, "kind": "busy", "text": f"{request['key']} is bound"}
        self.mounts.pop(request["key"], None)
        return {"ok": True, "found": mount is not None}

    def _bind(self, request: dict[str, Any]) -> dict[str, Any]:
        key, path = request["key"], request["target"]
        if key not in self.mounts:
            return {"ok": False, "kind": "missing", "text": f"{key} is not mounted"}
        if not path.startswith(f"{self.root}/"):
            return {"ok": False, "kind": "usage", "text": f"{path} is not below {self.root}"}
        for other, mount in self.mounts.items():
            if any(target["path"] == path for target in mount["targets"]):
                if other == key:
                    return {"ok": True}
                return {"ok": False, "kind": "exists", "text": f"{path} is another mount"}
        os.makedirs(path, exist_ok=True)
        self.mounts[key]["targets"].append({"path": path, "read_only": request["read_only"]})
        return {"ok": True}

    def _unbind(self, request: dict[str, Any]) -> dict[str, Any]:
        found = False
        for mount in self.mounts.values():
            left = [target for target in mount["targets"] if target["path"] != request["target"]]
            found = found or len(left) != len(mount["targets"])
            mount["targets"] = left
        with contextlib.suppress(OSError):
            os.rmdir(request["target"])
        return {"ok": True, "found": found}

    def _label(self, request: dict[str, Any]) -> dict[str, Any]:
        mount = self.mounts.get(request["key"])
        if mount is None:
            return {"ok": False, "kind": "missing", "text": f"{request['key']} is not mounted"}
        mount["labels"].update(request["labels"])
        mount["labels"] = {name: value for name, value in mount["labels"].items() if value is not None}
        return {"ok": True}

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        runner = {"pid": 1, "version": "0", "connected": True} if self.has_runner else None
        return {"ok": True, "version": "0", "runner": runner, "mounts": list(self.mounts.values())}

    def _reconcile(self, request: dict[str, Any]) -> dict[str, Any]:
        for key, path in self.lost:
            mount = self.mounts[key]
            mount["targets"] = [target for target in mount["targets"] if target["path"] != path]
        dropped = [path for _, path in self.lost]
        self.lost.clear()
        return {"ok": True, "repaired": [], "dropped": dropped, "detached": []}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    keeper: FakeKeeper

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none."""


class _Request(socketserver.StreamRequestHandler):
    server: _Server  # it is never another

    def handle(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        line = self.rfile.readline()
        self.server.keeper.raw += line
        if line:
            self.wfile.write(json.dumps(self.server.keeper.answer(json.loads(line))).encode() + b"\n")
