"""Reads `-o NAME[=VALUE],...`, the way mount(8) and fstab write options.

A name is either a setting of cachefs (`cache-size=50GiB`, also `cache_size`), one of the words of mount(8) that mean
something here (`MountWords`), or a word of mount(8) that means something to others only. Anything else is
refused: a misspelt option that is ignored would be found out months later.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cachefs.cli.options import find_setting
from cachefs.errors import ConfigError

_FLAGS = frozenset({"noexec", "noatime"})
_FOR_OTHERS = frozenset(
    {
        "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail", "comment",
        "exec", "nosuid", "nodev", "suid", "dev", "async", "atime", "relatime", "norelatime", "nodiratime",
        "diratime", "sync", "dirsync", "silent", "strictatime", "lazytime", "nolazytime", "default_permissions",
        "fsname", "subtype", "user_id", "group_id", "rootmode", "fd", "max_read", "blksize",
    }
)  # fmt: skip
"""Ignored; the last line stands in the mount table, from where mount(8) repeats it to remount. Mounts are always
nosuid, nodev and default_permissions, whatever fstab's defaults say of suid and dev.
"""
_VARIABLE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_MAX_ENV_BYTES = 1 << 20


@dataclass(slots=True)
class MountWords:
    """What -o said."""

    settings: dict[str, object] = field(default_factory=dict)
    """Settings as text, to be merged with other options and handed to `cachefs.cli.load.load`."""
    flags: list[str] = field(default_factory=list)
    """Flags for mount(2): "noexec", "noatime"."""
    nonempty: bool = False
    env_file: str = ""
    config_file: str = ""
    remount: bool = False
    """"remount" was given: change the options of a mount that is there."""
    wants_rw: bool = False
    """"rw" was given, and no "ro" after it."""
    unknown: list[str] = field(default_factory=list)


def split_options(text: str) -> list[str]:
    """Split at commas; a comma of a value is written ``\\,``."""
    parts = re.split(r"(?<!\\),", text)
    return [part.replace("\\,", ",").strip() for part in parts if part.strip()]


def parse_words(texts: Iterable[str], *, sloppy: bool = False) -> MountWords:
    """Read all -o options, in order. Raises ConfigError for an unknown name, unless `sloppy` (mount -s): then it is
    noted.
    """
    words = MountWords()
    for text in texts:
        for part in split_options(text):
            name, separator, value = part.partition("=")
            if not _take_word(words, name, value) and not _take_setting(words, name, value if separator else None):
                words.unknown.append(name)
    if words.unknown and not sloppy:
        raise ConfigError(f"-o {words.unknown[0]}: unknown mount option")
    return words


def _take_word(words: MountWords, name: str, value: str) -> bool:
    if name in ("ro", "rw"):
        words.wants_rw = name == "rw"
    elif name in _FLAGS:
        if name not in words.flags:
            words.flags.append(name)
    elif name == "nonempty":
        words.nonempty = True
    elif name in ("env-file", "env_file"):
        words.env_file = value
    elif name == "config":
        if not os.path.isabs(value):
            raise ConfigError(f"-o config={value}: must be an absolute path")
        words.config_file = value
    elif name == "remount":
        words.remount = True
    else:
        return name in _FOR_OTHERS or name.startswith(("x-", "X-"))
    return True


def _take_setting(words: MountWords, name: str, value: str | None) -> bool:
    setting = find_setting(name)
    negated = find_setting(name[2:].lstrip("-_")) if name.startswith("no") else None
    if setting is None and negated is not None and negated.is_flag and value is None:
        words.settings[negated.field] = "false"
        return True
    if setting is None or setting.field in ("source", "foreground"):
        return False
    if value is None and not setting.is_flag:
        raise ConfigError(f"-o {name}: needs a value, as in {name}=...")
    words.settings[setting.field] = "true" if value is None else value
    return True


def read_env_file(path: str) -> dict[str, str]:
    """Read KEY=VALUE lines (with # comments and optional quotes) from a file that nobody else may read. Raises
    ConfigError.
    """
    if not os.path.isabs(path):
        raise ConfigError(f"-o env-file={path}: must be an absolute path")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"-o env-file={path}: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"-o env-file={path}: is not a file")
        if status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"-o env-file={path}: holds keys, so only its owner may read it: chmod 600 {path}")
        raw = file.read(_MAX_ENV_BYTES + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"-o env-file={path}: not a text file in UTF-8") from error
    if len(raw) > _MAX_ENV_BYTES or "\0" in text:
        raise ConfigError(f"-o env-file={path}: not a file of KEY=VALUE lines")
    return _variables(text, path)


def _variables(text: str, path: str) -> dict[str, str]:
    found = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith(("#", ";")):
            continue
        match = _VARIABLE.fullmatch(line)
        if match is None:
            raise ConfigError(
                f"-o env-file={path}, line {number}: must look like KEY=VALUE"
            )  # the line may be a secret
        value = match[2]
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[match[1]] = value
    return found


def merged_environment(base: Mapping[str, str], words: MountWords) -> dict[str, str]:
    """Return `base` with the variables of the env-file, if one was named, over it."""
    return {**base, **(read_env_file(words.env_file) if words.env_file else {})}
