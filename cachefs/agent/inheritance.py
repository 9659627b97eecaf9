"""What an agent leaves to the next one of its mounts: its settings, and the warm shm tier.

Mounts that share an agent were made with settings of their own; those of the first one hold. When that agent dies, the
worker who is first to notice starts another, and would bring the settings of its own mount: blocks of another size
are another cache, and a smaller limit throws away half of one. So each agent writes its settings down beside its
socket, and an agent that is started for mounts which are there already takes those of the last one.

    <runtime>/agents/<id>.json    the settings of the agent that runs, or that died

INVARIANT: the settings of a dead agent hold as long as a mount of its cache directory lives, and no longer.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any, TypeVar

from cachefs.config import CacheConfig, PeerConfig, as_plain, from_plain
from cachefs.runtime import RuntimeDir, write_state

log = logging.getLogger(__name__)

Section = TypeVar("Section", CacheConfig, PeerConfig)
PEER = "peer"
"""Key of the settings for peers in the file; all others are those of the cache."""
LEAVING = "unmounting"
"""The state of a mount that is on its way out (`cachefs.mount.supervisor`)."""


def write_settings(config: CacheConfig, peer: PeerConfig) -> None:
    """Write down what the running agent works with. A full or read-only runtime directory costs only the file."""
    try:
        write_state(_file(config), {**as_plain(config), PEER: as_plain(peer)})
    except OSError as error:
        log.debug("the settings cannot be written down: %s", error)


def forget_settings(config: CacheConfig) -> None:
    """The agent ends, and nobody is there who needs another."""
    Path(_file(config)).unlink(missing_ok=True)


def inherited(config: CacheConfig, peer: PeerConfig) -> tuple[CacheConfig, PeerConfig]:
    """Return the settings of the last agent if mounts of it are still there, else what is given."""
    if not living_mounts(config):
        return config, peer
    try:
        found = json.loads(Path(_file(config)).read_bytes())
        left = _same_kinds(from_plain(CacheConfig, found), config)
        left = dataclasses.replace(left, cache_dir=config.cache_dir, runtime_dir=config.runtime_dir)
        left_peer = _same_kinds(from_plain(PeerConfig, found[PEER]), peer) if PEER in found else peer
    except FileNotFoundError:
        return config, peer
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("what the last agent worked with cannot be read (%s): the settings of a mount hold", error)
        return config, peer
    if (left, left_peer) != (config, peer):
        differences = ", ".join([*_differences(left, config), *_differences(left_peer, peer)])
        log.info("mounts are there already: the settings of the last agent hold (%s)", differences)
    return left, left_peer


def _same_kinds(left: Section, other: Section) -> Section:
    """Return `left`. Raises ValueError when its values are not of the kinds that those of `other` are."""
    if any(type(value) is not type(as_plain(other)[name]) for name, value in as_plain(left).items()):
        raise ValueError("values of other kinds")
    return left


def living_mounts(config: CacheConfig) -> list[dict[str, Any]]:
    """Return the states of all mounts of this cache directory whose supervisor or worker lives."""
    place = os.path.realpath(config.cache_dir)
    found = []
    states: list[Any] = RuntimeDir(config.runtime_dir).mount_states()
    for state in states:
        if not isinstance(state, dict) or os.path.realpath(str(state.get("cache_dir", ""))) != place:
            continue
        pids = (state.get("supervisor_pid"), state.get("worker_pid"))
        if any(map(_is_ours, pids)):
            found.append(state)
    return found


def staying_mounts(config: CacheConfig) -> int:
    """Return how many living mounts are not on their way out."""
    return sum(state.get("state") != LEAVING for state in living_mounts(config))


def _is_ours(pid: object) -> bool:
    """Whether a process of cachefs has this number: numbers are used again, and zombies keep theirs."""
    try:
        return isinstance(pid, int) and b"cachefs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _file(config: CacheConfig) -> str:
    return RuntimeDir(config.runtime_dir).agent(config.cache_dir, "json")


def _differences(left: CacheConfig | PeerConfig, other: CacheConfig | PeerConfig) -> list[str]:
    mine, theirs = as_plain(left), as_plain(other)
    return [f"{name} {mine[name]}" for name in mine if mine[name] != theirs[name]]
