"""`cachefs status`: what is mounted, how it is, where its bytes came from.

It reads the state files that supervisors write and asks every agent on its socket; the keys of the JSON output are
stable and described in docs/STATUS.md. It imports neither trio nor boto3: people put it into loops.

INVARIANT: it never touches a mount point (which may hang) and never waits for a process longer than `AGENT_TIMEOUT_S`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import click

import cachefs
from cachefs.cli import kept_mounts, output
from cachefs.cli.load import build_config
from cachefs.cli.options import CONFIG_PARAMETER
from cachefs.errors import CachefsError
from cachefs.mount.mountinfo import canonical
from cachefs.runtime import RuntimeDir, mount_id, process_alive
from cachefs.types import Tier

AGENT_TIMEOUT_S = 2.0
TIERS = (Tier.SHM.value, Tier.DISK.value)

MOUNT_KEYS = (
    "mount_id", "mountpoint", "source", "version", "supervisor_version", "agent_version", "supervisor_pid",
    "worker_pid", "agent_pid", "state", "health", "problems", "restarts", "last_crash", "started_at", "engine",
    "consistency", "log_file", "guard_held", "cache_dir", "volume_id", "hit_ratio", "counters", "kept",
)  # fmt: skip
"""Keys of one element of "mounts"."""
AGENT_KEYS = (
    "agent_pid", "version", "cache_dir", "log_file", "socket", "uptime_s", "block_size_bytes", "rss_anon_bytes",
    "memory_limit_bytes", "tiers", "fills", "counters", "mount_ids", "volumes", "cluster", "jobs",
)  # fmt: skip
"""Keys of one element of "agents"."""


@click.command()
@click.argument("mountpoint", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Write JSON (docs/STATUS.md describes the keys).")
@click.option("--runtime-dir", metavar="DIR", default=None, help="Runtime directory of the mounts to look at.")
@click.option(
    "--config", CONFIG_PARAMETER, metavar="FILE", default=None, help="Configuration file that the mounts use."
)
def status(mountpoint: str | None, *, as_json: bool, runtime_dir: str | None, config_file: str | None) -> int:
    """Show mounts, caches and where bytes came from.

    Exit code 1 if MOUNTPOINT is given and is not mounted or not ok.
    """
    config = build_config({"runtime_dir": runtime_dir}, os.environ, config_file)
    document = collect(config.cache.runtime_dir, mountpoint)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo("\n".join(render(document)))
    if mountpoint is None:
        return 0
    if not document["mounts"]:
        click.echo(f"cachefs: {output.plain(mountpoint)} is not a mount of cachefs", err=True)
    return 0 if document["mounts"] and document["mounts"][0]["health"] == "ok" else 1


# -- collecting ------------------------------------------------------------------------------------


def collect(runtime_dir: str, mountpoint: str | None = None) -> dict[str, Any]:
    """Return the whole document; with `mountpoint` only that mount (and the agent that serves it)."""
    if not Path(runtime_dir).is_dir():  # nothing was ever mounted here, and asking must not create directories
        return {"version": cachefs.__version__, "mounts": [], "agents": [], "keeper": None}
    if not os.access(runtime_dir, os.R_OK | os.X_OK):
        raise CachefsError(f"{runtime_dir} belongs to another user: ask as that user, or as root")
    keeper_socket = kept_mounts.find_socket(runtime_dir)
    files, sockets = _look_into(runtime_dir, keeper_socket)
    replies = {path: reply for path in sockets if (reply := ask_agent(path)) is not None}
    keeper, states = kept_mounts.join_states(files, keeper_socket, replies)
    if mountpoint is not None:
        place = canonical(mountpoint)
        wanted = mount_id(place)
        states = [each for each in states if each.get("mount_id") == wanted or kept_mounts.is_at(each, place)]
    mounts = [describe_mount(state, replies) for state in states]
    agents = [describe_agent(path, reply) for path, reply in replies.items()]
    if mountpoint is not None:
        serving = {mount["agent_pid"] for mount in mounts}
        agents = [agent for agent in agents if agent["agent_pid"] in serving]
    return {"version": cachefs.__version__, "mounts": mounts, "agents": agents, "keeper": keeper}


def _look_into(runtime_dir: str, keeper_socket: str | None) -> tuple[list[Any], list[str]]:
    """Return what the state files say, and the sockets of agents."""
    try:
        directory = RuntimeDir(runtime_dir)
    except PermissionError:
        if keeper_socket is None:
            raise
        files, sockets = [], []  # that of the keeper, or of the node service: the keeper knows what is in it
    else:
        files, sockets = list(directory.mount_states()), directory.agent_sockets()
    beside = kept_mounts.agent_sockets(keeper_socket) if keeper_socket else []
    return files, list(dict.fromkeys([*sockets, *beside]))


def ask_agent(path: str, *, peers: bool = False, timeout_s: float = AGENT_TIMEOUT_S) -> dict[str, Any] | None:
    """Return the status of the agent that listens at `path`; {} when it does not answer, None when there is none.

    `peers`: it asks the other nodes of its cluster as well.
    """
    from cachefs.agent import messages
    from cachefs.agent.launch import ask

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)  # a stopped agent's backlog may be full, so connecting can wait as well
    try:
        connection.connect(path)
    except (ConnectionRefusedError, FileNotFoundError):
        connection.close()
        return None
    except OSError:
        connection.close()
        return {}
    try:
        answer = ask(connection, messages.Status(id=1, peers=peers), timeout_s)
    except CachefsError:
        return {}
    return answer.status if isinstance(answer, messages.StatusReply) else {}


def describe_mount(state: Mapping[str, Any], replies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join what the supervisor wrote with what the agents say about one mount."""
    identity = state.get("mount_id")
    reply = next((r for r in replies.values() if identity in r.get("mounts", {})), None)
    serving = reply.get("mounts", {}).get(identity, {}) if reply else {}
    described = {key: state.get(key) for key in MOUNT_KEYS}
    if reply is not None:
        described["agent_pid"] = reply.get("agent_pid", described["agent_pid"])
    described["agent_version"] = reply.get("version") if reply is not None else None
    described["health"], described["problems"] = _health(state, reply)
    described["restarts"] = state.get("restarts") or 0
    described["volume_id"] = serving.get("volume_id")
    described["counters"] = dict(serving.get("counters", {}))
    described["hit_ratio"] = hit_ratio(serving.get("counters", {}), reply.get("counters", {}) if reply else {})
    return described


def describe_agent(path: str, reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return one element of "agents". Of an agent that does not answer only the socket is known."""
    described = {key: reply.get(key) for key in AGENT_KEYS}
    described["socket"] = path
    described["mount_ids"] = sorted(reply.get("mounts", {}))
    for key in ("counters", "volumes"):
        described[key] = reply.get(key, {})
    described["jobs"] = reply.get("jobs", [])
    parts = reply.get("tiers", {})
    described["tiers"] = {name: parts[name] for name in TIERS if name in parts}
    described["fills"] = parts.get("fills", {})
    return described


def hit_ratio(worker: Mapping[str, float], agent: Mapping[str, float]) -> dict[str, float | None]:
    """Return the shares that the tiers answered, None where nothing was asked.

    shm: READs of this mount that the shm tier answered; disk: of the blocks that had to come from
    further away (for all mounts of its agent), those that the disk tier had.
    """
    reads = worker.get("fuse_reads", 0) - worker.get("fresh_reads", 0)
    missed = worker.get("read_misses", 0)
    from_disk = agent.get("disk_hits", 0)
    from_afar = agent.get("origin_fills", 0) + agent.get("peer_fills", 0)
    return {
        "shm": max(0.0, 1 - missed / reads) if reads else None,
        "disk": from_disk / (from_disk + from_afar) if from_disk + from_afar else None,
    }


def _health(state: Mapping[str, Any], reply: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Return "ok", "degraded", "failed" or "dead", and why."""
    where = state.get("mountpoint")
    if state.get("kept"):
        verdict, problems = kept_mounts.health(state)
        problems += _agent_health(state, reply)
        return verdict or ("degraded" if problems else "ok"), problems
    if not is_running(state.get("supervisor_pid")):
        serving = is_running(state.get("worker_pid"))
        what = "its worker still serves but would not be restarted" if serving else "nothing serves it"
        return "dead", [f"the supervisor is gone, and {what}: `cachefs umount {where}`, then mount again"]
    if state.get("state") == "failed":
        crash = state.get("last_crash") or {}
        what = f"the worker crashed again and again (last: {crash.get('what', 'unknown')})"
        return "failed", [f"{what}: `cachefs upgrade {where}` tries again, `cachefs umount {where}` takes it away"]
    problems = []
    if state.get("state") != "serving":
        problems.append(f"the mount is {state.get('state')}")
    elif not is_running(state.get("worker_pid")):
        problems.append("the worker is gone and is about to be restarted")
    problems += _agent_health(state, reply)
    return ("degraded" if problems else "ok"), problems


def _agent_health(state: Mapping[str, Any], reply: Mapping[str, Any] | None) -> list[str]:
    """Return what the agent that serves a mount says, or that it says nothing."""
    if reply is None:
        by = "the node service" if state.get("kept") else "the worker"
        return [f"its agent does not answer; {by} starts another when it needs one"]
    return list(_agent_problems(reply, reply.get("mounts", {}).get(state.get("mount_id"), {}).get("volume_id")))


def _agent_problems(reply: Mapping[str, Any], volume_id: object) -> Iterator[str]:
    """Yield what is wrong with the store of a volume, with the tiers, and with peers."""
    origin = reply.get("volumes", {}).get(volume_id, {}).get("origin", {})
    if origin.get("failing"):
        yield (
            f"the store has not answered for {_age(origin.get('since'))}, {output.count(origin.get('failures', 0))} "
            f"requests failed in a row, so only what is cached can be read; the last: {origin.get('last_error')}"
        )
    for name in TIERS:
        tier = reply.get("tiers", {}).get(name, {})
        if tier.get("limit_bytes") and tier.get("state", "on") != "on":
            why = tier.get("reason") or f"the agent's log says why: {reply.get('log_file') or 'it is its stderr'}"
            yield f"the {name} tier is {tier['state']}, so other sources serve; {why}"
    if without_peers := (reply.get("cluster") or {}).get("problem"):
        yield f"it has no peers for now, and its agent tries again by itself: {without_peers}"


def is_running(pid: object) -> bool:
    """Whether a process of cachefs has this number (numbers are used again, and zombies keep theirs)."""
    if not isinstance(pid, int) or pid <= 0 or not process_alive(pid):
        return False
    try:
        return b"cachefs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # another user's process with hidepid: it lives, and more cannot be known


# -- for people ------------------------------------------------------------------------------------


def render(document: Mapping[str, Any]) -> list[str]:
    """Return the lines for a person."""
    keeper = [kept_mounts.keeper_line(document["keeper"])] if document.get("keeper") else []
    if not document["mounts"] and not document["agents"]:
        return [*keeper, "nothing is mounted"]
    lines: list[str] = []
    if document["mounts"]:
        head = ["MOUNT POINT", "SOURCE", "HEALTH", "SHM HITS", "DISK HITS", "READS", "BYTES", "RESTARTS", "UP"]
        lines += output.table([head, *map(_mount_row, document["mounts"])], right=(3, 4, 5, 6, 7, 8))
        for mount in document["mounts"]:
            lines += _mount_remarks(mount)
    for agent in document["agents"]:
        lines += ["", *_agent_lines(agent)]
    if keeper:
        lines += ["", *keeper]
    return lines if document["mounts"] else lines[1:]


def _mount_row(mount: Mapping[str, Any]) -> list[str]:
    counters = mount["counters"]
    return [
        output.plain(kept_mounts.name_of(mount)),
        output.plain(str(mount["source"])),
        mount["health"],
        output.ratio(mount["hit_ratio"]["shm"]),
        output.ratio(mount["hit_ratio"]["disk"]),
        output.count(counters.get("fuse_reads", 0)),
        output.size(counters.get("fuse_read_bytes", 0)),
        str(mount["restarts"]),
        _age(mount["started_at"]),
    ]


def _age(started_at: object) -> str:
    """Return how long ago `started_at` (seconds since the epoch, or ISO 8601) was."""
    if isinstance(started_at, str):
        try:
            started_at = datetime.fromisoformat(started_at).timestamp()
        except ValueError:
            return "-"
    return output.elapsed(time.time() - started_at) if isinstance(started_at, int | float) else "-"


def _mount_remarks(mount: Mapping[str, Any]) -> list[str]:
    name = output.plain(kept_mounts.name_of(mount))
    if mount["kept"]:
        lines = list(kept_mounts.remarks(mount))
    else:
        numbers = ", ".join(f"{role} {mount[f'{role}_pid'] or '-'}" for role in ("supervisor", "worker", "agent"))
        rest = f"engine {mount['engine'] or '-'}, consistency {mount['consistency'] or '-'}"
        lines = [f"  {name}: {numbers}; {rest}, guard {'on' if mount['guard_held'] else 'off'}"]
    lines += [f"  {name}: {remark}" for remark in version_remarks(mount)]
    lines += [f"  {name}: {output.plain(problem)}" for problem in mount["problems"]]
    if mount["problems"] and mount["log_file"]:
        lines.append(f"  {name}: log: {output.plain(mount['log_file'])}")
    elif mount["last_crash"]:
        crash = mount["last_crash"]
        what = output.plain(str(crash.get("what")))
        when = f" {_age(crash['at'])} ago" if crash.get("at") else ""
        lines.append(f"  {name}: last crash{when}: {what}")
    return lines


def version_remarks(mount: Mapping[str, Any]) -> list[str]:
    """Say which parts of a mount are of another version than its worker. None of that is a problem."""
    own, remarks = mount.get("version"), []
    if own is None or mount.get("kept"):
        return []  # no worker has said so yet; or each pod of the node has its own version, which is shown
    if (agent := mount.get("agent_version")) not in (None, own):
        remarks.append(
            f"its worker is version {own}, its agent {agent}: that is replaced when nothing is mounted through it, "
            f"or by `kill {mount['agent_pid']}`, which readers do not notice"
        )
    if (supervisor := mount.get("supervisor_version")) not in (None, own):
        remarks.append(f"its worker is version {own}, its supervisor {supervisor} until it is mounted again")
    return [output.plain(remark) for remark in remarks]


def _limits(tiers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what a volume may do in each tier, and does."""
    for name, limit in tiers.items():
        if limit.get("quota_bytes"):
            held, quota = output.size(limit.get("used_bytes") or 0), output.size(limit["quota_bytes"])
            yield f"{name}: {held} of its quota of {quota}"
    ttl_s = max((limit.get("ttl_s") or 0 for limit in tiers.values()), default=0)
    if ttl_s:
        yield f"leaves when nobody reads it for {output.elapsed(ttl_s)}"


def _agent_lines(agent: Mapping[str, Any]) -> list[str]:
    if agent["agent_pid"] is None:
        return [f"AGENT at {output.plain(agent['socket'])} does not answer"]
    memory, limit = agent["rss_anon_bytes"] or 0, agent["memory_limit_bytes"] or 0
    lines = [
        f"AGENT {agent['agent_pid']} of {output.plain(str(agent['cache_dir']))}: version {agent['version']}, "
        f"up {output.elapsed(agent['uptime_s'] or 0)}, memory {output.size(memory)} of {output.size(limit)}, "
        f"blocks of {output.size(agent['block_size_bytes'] or 0)}"
    ]
    if agent["log_file"]:
        lines.append(f"  log   {output.plain(agent['log_file'])}")
    for name, tier in agent["tiers"].items():
        used, most = output.size(tier.get("used_bytes") or 0), output.size(tier.get("limit_bytes") or 0)
        blocks = output.count(tier.get("blocks") or 0)
        lines.append(f"  {name:4}  {tier.get('state', '-')}, {used} of {most}, {blocks} blocks")
    counters = agent["counters"]
    asked, received = counters.get("origin_requests", 0), counters.get("origin_bytes", 0)
    again, failed = counters.get("origin_retries", 0), counters.get("origin_errors", 0)
    lines.append(
        f"  store {output.count(asked)} requests, {output.size(received)}, "
        f"{output.count(again)} retries, {output.count(failed)} errors"
    )
    lines += _cluster_lines(agent["cluster"], counters)
    for volume in agent["volumes"].values():
        hidden = f", {output.count(volume['hidden_keys'])} hidden keys" if volume.get("hidden_keys") else ""
        known = f"{output.count(volume.get('objects', 0))} objects, {output.size(volume.get('bytes', 0))}"
        lines.append(f"  known of {output.plain(str(volume.get('source')))}: {known}{hidden}")
        lines += [f"    {limit}" for limit in _limits(volume.get("limits", {}))]
    lines += [
        f"  job {job['job']} ({job['verb']} {output.plain(job['mountpoint'])}): {_job(job)}" for job in agent["jobs"]
    ]
    return lines


def _job(job: Mapping[str, Any]) -> str:
    """Say how far a job is, or how it ended."""
    from cachefs.cli.progress import WORDS, line, sources

    if job["state"] in WORDS:
        return line(job)
    wrong = f", {output.count(job['problems'])} problems" if job["problems"] else ""
    why = f": {output.plain(job['error'])}" if job["error"] else ""
    return f"{job['state']}, {output.count(job['files'])} files, {sources(job)}{wrong}{why}"


def _cluster_lines(cluster: Mapping[str, Any] | None, counters: Mapping[str, Any]) -> list[str]:
    if not cluster:
        return []
    if cluster.get("problem"):
        return [f"  peers none for now: {output.plain(str(cluster['problem']))}"]
    etcd = cluster.get("etcd", {})
    state = "" if etcd.get("connected") else f", no connection to etcd ({etcd.get('last_error') or 'not yet'})"
    received, served = counters.get("peer_fill_bytes", 0), counters.get("peer_served_bytes", 0)
    failed = counters.get("peer_failures", 0)
    return [
        f"  peers {len(cluster.get('members', []))} nodes in cluster {output.plain(str(cluster.get('cluster')))}"
        f"{output.plain(state)}; {output.size(received)} from them, {output.size(served)} for them, "
        f"{output.count(failed)} failures (`cachefs peers` shows them)"
    ]
