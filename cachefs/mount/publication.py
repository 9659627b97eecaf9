"""What a supervisor tells the world: the state file of its mount, and one line to whoever waits for the mount."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from cachefs.mount.journal import Journal
from cachefs.runtime import RuntimeDir, write_state


class StateFile:
    """`<runtime>/mounts/<mount id>.json`, rewritten when a value changes. A full disk costs only the file."""

    def __init__(self, runtime: RuntimeDir, plan: dict[str, Any], journal: Journal) -> None:
        config = plan["config"]
        self._runtime = runtime
        self._journal = journal
        self._complained = False
        self.values: dict[str, Any] = {
            "mount_id": plan["mount_id"],
            "mountpoint": plan["mountpoint"],
            "source": plan["source"],
            "version": plan["version"],
            "supervisor_version": plan["version"],
            "supervisor_pid": os.getpid(),
            "worker_pid": None,
            "agent_pid": None,
            "state": "starting",
            "restarts": 0,
            "last_crash": None,
            "started_at": time.time(),
            "engine": config["fuse"]["engine"],
            "consistency": config["metadata"]["consistency"],
            "log_file": plan.get("log_file", ""),
            "guard_held": False,
            "connection": None,
            "cache_dir": config["cache"]["cache_dir"],
            "runtime_dir": runtime.path,
            "config": config,
        }

    @property
    def path(self) -> str:
        """Where it is now."""
        return self._runtime.mount(self.values["mount_id"], "json")

    def update(self, **values: Any) -> None:
        """Set some values and write the file when one of them is new."""
        if all(self.values[name] == value for name, value in values.items()) and os.path.exists(self.path):
            return
        self.values.update(values)
        try:
            write_state(self.path, self.values)
            self._complained = False
        except OSError as error:
            if not self._complained:
                self._journal.warning(f"cannot write {self.path}: {error.strerror}; the mount goes on without it")
            self._complained = True

    def move(self, mount_id: str) -> None:
        """Go on under another name."""
        self.remove()
        self.update(mount_id=mount_id)

    def remove(self) -> None:
        """Remove the file, unless the next supervisor of the same directory has replaced it."""
        try:
            with open(self.path, "rb") as file:
                owner = json.load(file).get("supervisor_pid")
            if owner == os.getpid():
                os.unlink(self.path)
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError) as error:
            self._journal.warning(f"cannot remove {self.path}: {error}")


class ReadyLine:
    """The one JSON line to whoever asked for the mount. Later reports, and a reader who went away, are ignored."""

    def __init__(self, descriptor: int, journal: Journal) -> None:
        self._descriptor = descriptor
        self._journal = journal
        self.sent = False

    def succeed(self) -> None:
        """Say that the mount is being served."""
        self._send({"ok": True})

    def fail(self, kind: str, text: str) -> None:
        """Say why there will be no mount. `kind` is the name of a class in `cachefs.errors`."""
        if not self.sent:
            self._journal.error(text)
        self._send({"ok": False, "kind": kind, "text": text})

    def _send(self, line: dict[str, Any]) -> None:
        if self.sent:
            return
        self.sent = True
        if self._descriptor >= 0:
            try:
                os.write(self._descriptor, json.dumps(line).encode() + b"\n")
            except OSError:
                pass
            os.close(self._descriptor)
