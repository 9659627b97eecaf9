"""`cachefs peers`: the nodes of the cluster, as the agents of this node see them, and how they are.

Each agent asks the other nodes itself (it has the certificate or the secret; this command needs none). The keys of the
JSON output are described in docs/STATUS.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cachefs.cli import output
from cachefs.cli.load import build_config
from cachefs.cli.options import CONFIG_PARAMETER
from cachefs.cli.status import ask_agent
from cachefs.runtime import RuntimeDir

ANSWER_S = 10.0
"""How long an agent may take to ask all the others."""

MEMBER_KEYS = (
    "node_id", "name", "address", "zone", "groups", "version", "protocol", "self", "state", "error", "latency_s",
    "capacity_bytes", "used_bytes", "hit_ratio", "origin_bytes", "peer_bytes", "served_bytes",
)  # fmt: skip
"""Keys of one element of "members"."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write JSON (docs/STATUS.md describes the keys).")
@click.option("--runtime-dir", metavar="DIR", default=None, help="Runtime directory of the mounts to look at.")
@click.option(
    "--config", CONFIG_PARAMETER, metavar="FILE", default=None, help="Configuration file that the mounts use."
)
def peers(*, as_json: bool, runtime_dir: str | None, config_file: str | None) -> int:
    """Show the nodes that share their caches with this one.

    Exit code 1 when an agent is no peer for now or has no connection to etcd, or when a node does not answer.
    """
    config = build_config({"runtime_dir": runtime_dir}, os.environ, config_file)
    clusters = collect(config.cache.runtime_dir)
    if as_json:
        click.echo(json.dumps({"clusters": clusters}, indent=2))
    else:
        click.echo("\n".join(render(clusters)))
    healthy = all(cluster["connected"] and not any(m["error"] for m in cluster["members"]) for cluster in clusters)
    return 0 if healthy else 1


def collect(runtime_dir: str) -> list[dict[str, Any]]:
    """Return one element for each agent that has peers."""
    if not Path(runtime_dir).is_dir():
        return []
    found = []
    for path in RuntimeDir(runtime_dir).agent_sockets():
        reply = ask_agent(path, peers=True, timeout_s=ANSWER_S)
        if reply and reply.get("cluster"):
            found.append(describe_cluster(reply))
    return found


def describe_cluster(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an agent says of its cluster, with the keys that are stable."""
    cluster = reply["cluster"]
    members = [describe_member(member) for member in cluster.get("members", [])]
    return {
        "cluster": cluster.get("cluster"),
        "agent_pid": reply.get("agent_pid"),
        "cache_dir": reply.get("cache_dir"),
        "problem": cluster.get("problem"),
        "node_id": cluster.get("node_id"),
        "connected": bool(cluster.get("etcd", {}).get("connected")),
        "etcd": cluster.get("etcd", {}),
        "volumes": cluster.get("volumes", {}),
        "members": members,
        "amplification": amplification(cluster.get("members", [])),
    }


def describe_member(member: Mapping[str, Any]) -> dict[str, Any]:
    """Return one member with the keys that are stable."""
    summary = member.get("summary", {})
    tiers, counters = summary.get("tiers", {}), summary.get("counters", {})
    described = {key: member.get(key) for key in MEMBER_KEYS}
    described["groups"] = list(member.get("groups") or ())
    described["capacity_bytes"] = _sum(tiers, "limit_bytes")
    described["used_bytes"] = _sum(tiers, "used_bytes")
    described["hit_ratio"] = summary.get("hit_ratio")
    described["origin_bytes"] = counters.get("origin_fill_bytes", 0) if counters else None
    described["peer_bytes"] = counters.get("peer_fill_bytes", 0) if counters else None
    described["served_bytes"] = counters.get("peer_served_bytes", 0) if counters else None
    return described


def _sum(tiers: Mapping[str, Mapping[str, Any]], key: str) -> int | None:
    found = [tiers[name].get(key) or 0 for name in ("shm", "disk") if name in tiers]
    return sum(found) if found else None


def amplification(members: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how many bytes came from the store for each byte that a node fetched as its owner; None: nothing came."""
    counters = [member.get("summary", {}).get("counters", {}) for member in members]
    owned = sum(each.get("peer_owned_fill_bytes", 0) for each in counters)
    return sum(each.get("origin_fill_bytes", 0) for each in counters) / owned if owned else None


# -- for people ----------------------------------------------------------------------------------------------------


def render(clusters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines for a person."""
    if not clusters:
        return ["no agent of this node has peers (mount with --etcd)"]
    lines: list[str] = []
    for cluster in clusters:
        lines += ["", *_cluster_lines(cluster)]
    return lines[1:]


def _cluster_lines(cluster: Mapping[str, Any]) -> list[str]:
    if cluster["problem"]:
        name, why = output.plain(str(cluster["cluster"])), output.plain(str(cluster["problem"]))
        return [f"CLUSTER {name}: agent {cluster['agent_pid']} is no peer for now, and tries again by itself: {why}"]
    etcd = cluster["etcd"]
    state = "connected to etcd" if cluster["connected"] else f"no connection to etcd: {etcd.get('last_error') or '-'}"
    factor = "-" if cluster["amplification"] is None else f"{cluster['amplification']:.2f}"
    lines = [
        f"CLUSTER {output.plain(str(cluster['cluster']))}: {len(cluster['members'])} nodes, {output.plain(state)}, "
        f"origin amplification {factor}"
    ]
    head = ["NODE", "ADDRESS", "ZONE", "GROUPS", "STATE", "LATENCY", "CAPACITY", "USED", "HITS"]
    head += ["FROM STORE", "FROM PEERS", "SERVED"]
    lines += output.table([head, *map(_member_row, cluster["members"])], right=range(5, 12))
    for member in cluster["members"]:
        if member["error"]:
            lines.append(f"  {output.plain(str(member['name']))}: {output.plain(str(member['error']))}")
    return lines


def _member_row(member: Mapping[str, Any]) -> list[str]:
    def size(key: str) -> str:
        return "-" if member[key] is None else output.size(member[key])

    latency = member["latency_s"]
    return [
        output.plain(str(member["name"])) + (" (this one)" if member["self"] else ""),
        output.plain(str(member["address"])),
        output.plain(str(member["zone"] or "-")),
        output.plain(",".join(map(str, member["groups"])) or "-"),
        "this one" if member["self"] else output.plain(str(member["state"] or "-")),
        "-" if latency is None else f"{latency * 1000:.1f} ms",
        size("capacity_bytes"),
        size("used_bytes"),
        output.ratio(member["hit_ratio"]),
        size("origin_bytes"),
        size("peer_bytes"),
        size("served_bytes"),
    ]
