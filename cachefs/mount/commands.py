"""What can be asked of one mount through its control socket: status, upgrade, unmount."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from cachefs.mount.kernel import MountFailure

if TYPE_CHECKING:
    from cachefs.mount.control import Caller
    from cachefs.mount.supervision import Supervision


def serve(supervision: Supervision, request: dict[str, Any], caller: Caller) -> None:
    """Answer one request, perhaps later."""
    command = request.get("command")
    if command == "status":
        supervision.departure.notice()
        caller.answer({"ok": True, "status": supervision.state})
    elif command == "upgrade":
        supervision.replace_worker(request, caller.answer)
    elif command == "unmount":
        _unmount(supervision, request, caller)
    else:
        caller.fail("usage", f"unknown command {command!r}")


def _unmount(supervision: Supervision, request: dict[str, Any], caller: Caller) -> None:
    try:
        detached = supervision.departure.take_away(lazy=bool(request.get("lazy")), force=bool(request.get("force")))
    except MountFailure as error:
        caller.fail("busy" if error.errno == errno.EBUSY else "MountError", error.text)
    else:
        caller.answer({"ok": True, "detached": detached})
