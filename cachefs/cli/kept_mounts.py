"""What `cachefs status` says of the mounts that a keeper has (`cachefs keeper`, Kubernetes).

The keeper is found beside the runtime directory of the node service (DIR/node has DIR/keeper.sock), so the same command
works in every pod of a node. Of each mount it knows what no state file does: the volume, and where it is bound.

INVARIANT: as in `cachefs.cli.status`: no mount is touched, and nobody is waited for longer than `ASK_S`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cachefs.cli import output
from cachefs.keeper.client import KeeperClient, KeeperError, MountState
from cachefs.runtime import mount_id

ASK_S = 2.0
_SOCKET = "keeper.sock"
_NODE, _OWN = "node", "keeper"
"""Directories beside the keeper's socket: of the node service, and its own."""
_SHOWN_PLACES = 3
NO_SERVICE = (
    "no node service is connected, and readers wait where no worker is left: look at the cachefs-node pod of this node"
)


def find_socket(runtime_dir: str) -> str | None:
    """Return the socket of the keeper that this runtime directory belongs to; it may have ended."""
    parent, name = os.path.split(runtime_dir.rstrip("/"))
    for directory in (runtime_dir, parent) if name in (_NODE, _OWN) else (runtime_dir,):
        if os.path.isdir(os.path.join(directory, _OWN)):  # its records, which stay when it ends
            return os.path.join(directory, _SOCKET)
    return None


def agent_sockets(socket_path: str) -> list[str]:
    """Return the sockets of agents of the node service."""
    return [str(path) for path in sorted(Path(socket_path).parent.glob(f"{_NODE}/agents/*.sock"))]


def ask_keeper(socket_path: str) -> tuple[dict[str, Any], tuple[MountState, ...]]:
    """Return what is said of the keeper itself, and its mounts."""
    try:
        found = KeeperClient(socket_path, ASK_S).status()
    except KeeperError as error:
        return {"socket": socket_path, "version": None, "problem": error.text, "node_service": None}, ()
    service = found.runner and {"pid": found.runner.pid, "version": found.runner.version}
    problem = None if service else NO_SERVICE
    return {"socket": socket_path, "version": found.version, "problem": problem, "node_service": service}, found.mounts


def state_of(mount: MountState, keeper: Mapping[str, Any], replies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a mount of the keeper with the keys of a state file, and `kept`."""
    attached = ((identity, each) for reply in replies.values() for identity, each in reply.get("mounts", {}).items())
    known = next((identity for identity, each in attached if each.get("mountpoint") == mount.mountpoint), None)
    return {
        "mount_id": known or mount_id(mount.mountpoint),
        "mountpoint": mount.mountpoint,
        "source": mount.source,
        "version": mount.worker_version,
        "supervisor_version": keeper["version"],
        "supervisor_pid": None,
        "worker_pid": mount.worker_pid,
        "state": mount.state,
        "restarts": mount.restarts,
        "last_crash": {"at": None, "what": mount.last_crash} if mount.last_crash else None,
        "started_at": mount.started_at,
        "kept": {
            "key": mount.key,
            "volume": mount.labels.get("volume"),
            "targets": [{"path": target.path, "read_only": target.read_only} for target in mount.targets],
        },
    }


def join_states(
    files: list[Any], socket_path: str | None, replies: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return what is said of the keeper, if there is one, and the state of every mount: it knows best of its own."""
    states = [state for state in files if isinstance(state, dict)]
    if socket_path is None:
        return None, states
    keeper, kept = ask_keeper(socket_path)
    places = {mount.mountpoint for mount in kept}
    others = [state for state in states if state.get("mountpoint") not in places]
    return keeper, [*others, *(state_of(mount, keeper, replies) for mount in kept)]


def is_at(state: Mapping[str, Any], place: str) -> bool:
    """Return whether a mount of the keeper is bound to this path."""
    return any(target["path"] == place for target in (state.get("kept") or {}).get("targets", ()))


def health(state: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Return "failed" or None, and what is wrong with a mount of the keeper itself."""
    match state["state"]:
        case "failed":
            crash = (state.get("last_crash") or {}).get("what", "unknown")
            what = f"the worker crashed again and again (last: {crash})"
            return "failed", [f"{what}: the next pod on this node that uses the volume has another one started"]
        case "waiting":
            return None, [NO_SERVICE]
        case "serving":
            return None, []
    return None, [f"the mount is {state['state']}"]


def name_of(mount: Mapping[str, Any]) -> str:
    """Return what a person calls a mount: of a place of the keeper's own only the last part says anything."""
    return str(mount["kept"]["key"] if mount["kept"] else mount["mountpoint"])


def remarks(mount: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a mount of the keeper is, for a person."""
    kept = mount["kept"]
    name, volume = kept["key"], output.plain(str(kept["volume"] or "-"))
    yield f"  {name}: volume {volume}, worker {mount['worker_pid'] or '-'}, agent {mount['agent_pid'] or '-'}"
    targets = kept["targets"]
    for target in targets[:_SHOWN_PLACES]:
        yield f"  {name}: at {output.plain(target['path'])}{' (read-only)' if target['read_only'] else ''}"
    if len(targets) > _SHOWN_PLACES:
        yield f"  {name}: and at {len(targets) - _SHOWN_PLACES} more places (--json has all)"


def keeper_line(keeper: Mapping[str, Any]) -> str:
    """Return the line of the keeper, for a person."""
    where = output.plain(keeper["socket"])
    if keeper["version"] is None:
        return f"KEEPER: {output.plain(keeper['problem'])}"
    service = keeper["node_service"]
    told = f"node service {service['pid']} (version {service['version']})" if service else keeper["problem"]
    return f"KEEPER at {where}: version {keeper['version']}, {output.plain(told)}"
