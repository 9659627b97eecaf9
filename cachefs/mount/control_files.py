"""What stands in `.cachefs` of a mount: the figures of its agent, its settings, and the pipes for a plan and a log."""

from __future__ import annotations

import enum
import functools
import json
import logging
import math
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import trio

from cachefs import errors
from cachefs.agent import messages
from cachefs.agent.launch import ask
from cachefs.config import Config, Engine, Prefetch
from cachefs.fuse.access_log import make_pipe
from cachefs.runtime import RuntimeDir
from cachefs.types import ROOT_INO
from cachefs.vfs.attributes import AttributeRules
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.virtual import ACCESS_LOG, CONFIG, NAME, PLAN, STATS, VirtualDirectory

log = logging.getLogger(__name__)

ANSWER_S = 2.0
"""How long the agent may take to say how it is."""
_UNITS = re.compile(r"_(bytes|s)$")


def virtual_directory(
    config: Config, mount_id: str, rules: AttributeRules, own_counts: Callable[[], Mapping[str, float]]
) -> VirtualDirectory:
    """Return the directory of a mount. `own_counts`: what its worker counts."""
    runtime = RuntimeDir(config.cache.runtime_dir)
    agent = runtime.agent(config.cache.cache_dir, "sock")

    async def stats() -> bytes:
        return await trio.to_thread.run_sync(functools.partial(stats_text, agent, mount_id, own_counts()))

    async def settings() -> bytes:
        return settings_text(config)

    links = {}
    if config.fuse.prefetch is not Prefetch.OFF:  # else the agent does not hear how far readers are
        links[PLAN] = runtime.mount(mount_id, PLAN.decode()).encode()
    if config.fuse.engine is Engine.CHANNEL and make_pipe(access_log_path(config, mount_id)):
        links[ACCESS_LOG] = access_log_path(config, mount_id).encode()
    return VirtualDirectory({STATS: stats, CONFIG: settings}, links, rules)


def access_log_path(config: Config, mount_id: str) -> str:
    """Return where the pipe of the access log is."""
    return RuntimeDir(config.cache.runtime_dir).mount(mount_id, ACCESS_LOG.decode())


async def warn_of_hidden(filesystem: FileSystem) -> None:
    """Say once that something in the bucket has the name of the directory. Never raises."""
    try:
        attributes, _ = await filesystem.lookup_object(ROOT_INO, NAME)
    except errors.CachefsError as error:
        log.debug("whether there is an object %r: %s", NAME.decode(), error)
        return
    if attributes is not None:
        log.warning("the bucket has %r itself: it cannot be seen, for the mount has its own", NAME.decode())


# -- stats -------------------------------------------------------------------------------------------------------------


def stats_text(agent: str, mount_id: str, own_counts: Mapping[str, float]) -> bytes:
    """Return what the agent at this socket knows of a mount, one figure per line. BLOCKS; never raises."""
    try:
        status = _ask(agent)
        serving = status.get("mounts", {}).get(mount_id, {})
        volume = status.get("volumes", {}).get(serving.get("volume_id"), {})
        parts: dict[str, Any] = {
            "mount": {**{key: serving.get(key) for key in ("mountpoint", "version")}, "counters": dict(own_counts)},
            "volume": volume,
            "plan": status.get("plans", {}).get(mount_id),
            "jobs": [job for job in status.get("jobs", []) if job.get("mountpoint") == serving.get("mountpoint")],
            "agent": {
                key: status.get(key)
                for key in ("agent_pid", "version", "uptime_s", "rss_anon_bytes", "tiers", "counters")
            },
        }
    except (errors.CachefsError, OSError) as error:
        parts = {"mount": {"counters": dict(own_counts)}, "agent": {"error": str(error)}}
    return "".join(f"{name} {value}\n" for name, value in _flat("", parts)).encode("utf-8", "backslashreplace")


def _ask(agent: str) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(agent)
        answer = ask(connection, messages.Status(id=1), ANSWER_S)
    if not isinstance(answer, messages.StatusReply):
        raise errors.AgentUnavailable("the agent does not say how it is")
    return answer.status


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), below)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from _flat(f"{prefix}.{number}", below)
    elif value is not None:
        if isinstance(value, float):
            yield prefix, f"{value:.0f}" if value.is_integer() else f"{value:.3f}"
        else:
            yield prefix, str(value).replace("\n", " ")


# -- config ------------------------------------------------------------------------------------------------------------


def settings_text(config: Config) -> bytes:
    """Return the configuration as `cachefs mount --config` reads it. There is no secret in it, for there is none in the
    configuration: keys and passwords are in files and variables, of which only names are here.
    """
    lines = []
    for section in fields(config):
        lines.append(f"# {section.name}")
        values = getattr(config, section.name)
        for field in fields(values):
            if field.metadata.get("hidden") and field.name == "source":
                lines.append(f"# mounted: {json.dumps(getattr(values, field.name))}")
            else:
                key = _UNITS.sub("", field.name).replace("_", "-")
                lines.append(f"{key} = {_toml(getattr(values, field.name), field.metadata['unit'])}")
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _toml(value: object, unit: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if unit == "octal":
        return f'"{value:04o}"'
    if isinstance(value, float):
        return '"forever"' if math.isinf(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value.value) if isinstance(value, enum.Enum) else str(value), ensure_ascii=False)
