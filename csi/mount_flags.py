"""Mount flags of a capability, and the parameter `mountOptions`: settings of one mount, as `cachefs mount -o` has them.

What a volume may set is in `SETTINGS`; what belongs to the node (sizes of the tiers, peers, directories) or to other
parameters (where the bucket is, whose credentials are used) is refused by name, as is what nobody knows. INVARIANT: no
error text has a value, since the protocol says that mount flags may be sensitive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cachefs import settings as writing

SETTINGS = frozenset(
    {
        "consistency", "metadata_ttl_s", "negative_ttl_s", "uid", "gid", "file_mode", "dir_mode", "cache", "prefetch",
        "low_latency", "read_ahead_bytes", "connect_timeout_s", "request_timeout_s", "io_timeout_s", "max_requests",
        "hang_timeout_s", "shm_quota_bytes", "disk_quota_bytes", "disk_ttl_s",
    }
)  # fmt: skip
"""Fields of `cachefs.config` that a volume may set by a mount flag."""
_FLAGS = frozenset({"noexec", "noatime"})
_SURE = frozenset(
    {
        "ro", "defaults", "nosuid", "nodev", "exec", "atime", "relatime", "norelatime", "nodiratime", "diratime",
        "async", "_netdev", "nofail", "default_permissions", "allow_other", "allow-other",
    }
)  # fmt: skip
"""Words of mount(8) that are so anyway, or mean nothing here."""
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_MAX_ID = 2**32 - 2
_MAX_MODE = 0o777
_MAX_BYTES = 1 << 62
_LEAST_HANG_S = 2.0
_FOREVER = frozenset({"metadata_ttl_s", "negative_ttl_s"})


@dataclass(frozen=True, slots=True)
class MountFlags:
    """What mount flags say."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `cachefs.config` and their values."""
    flags: tuple[str, ...] = ()
    """For mount(2): "noexec", "noatime"."""

    def joined(self, later: MountFlags) -> MountFlags:
        """Return both; what is said later wins."""
        flags = dict.fromkeys((*self.flags, *later.flags))
        return MountFlags({**self.settings, **later.settings}, tuple(flags))


def parse(texts: Iterable[str]) -> MountFlags:
    """Read flags, each a word, NAME=VALUE, or several of them with commas between.

    Raises ValueError, which names the flag and never its value.
    """
    settings: dict[str, Any] = {}
    flags: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, separator, value = part.partition("=")
        if not part or name in _SURE:
            continue
        if name in _FLAGS and not separator:
            flags.append(name)
        elif name == "rw":
            raise ValueError("mount flag rw: writing is not offered in this version")
        else:
            field_name, read = _read_flag(name, value if separator else None)
            settings[field_name] = read
    return MountFlags(settings, tuple(dict.fromkeys(flags)))


def read_setting(name: str, text: str) -> Any:
    """Return the value of a setting of a mount, by the name of its field. Raises ValueError with a reason."""
    setting = writing.find_setting(name)
    assert setting is not None, name
    value = writing.parse(setting, text)
    if setting.unit == "duration":
        _check_duration(setting.field, value)
    elif setting.unit == "bytes" and not 0 <= value < _MAX_BYTES:
        raise ValueError("must be between 0 and 4 EiB")
    elif setting.unit == "octal" and value > _MAX_MODE:
        raise ValueError("set-user-id, set-group-id and sticky bits are not offered")
    elif setting.field in ("uid", "gid") and not 0 <= value <= _MAX_ID:
        raise ValueError(f"must be between 0 and {_MAX_ID}")
    elif setting.field == "max_requests" and not 1 <= value <= 1024:
        raise ValueError("must be between 1 and 1024")
    return value


def _check_duration(name: str, seconds: float) -> None:
    if seconds == float("inf") and name not in _FOREVER:
        raise ValueError("must end at some time")
    if name.endswith("timeout_s") and seconds <= 0:
        raise ValueError("must be more than 0")
    if name == "hang_timeout_s" and seconds < _LEAST_HANG_S:
        raise ValueError(f"must be at least {_LEAST_HANG_S:g}s")


def _read_flag(name: str, value: str | None) -> tuple[str, Any]:
    shown = name if _WORD.fullmatch(name) else "that is no name"
    setting = writing.find_setting(name)
    if setting is None and value is None and name.startswith("no"):
        setting = writing.find_setting(name[2:].lstrip("-_"))
        value = "false" if setting is not None and setting.is_flag else None
        if value is None:
            setting = None
    if setting is None:
        raise ValueError(f"mount flag {shown}: unknown")
    if setting.field not in SETTINGS:
        raise ValueError(f"mount flag {shown}: belongs to the node, or to a parameter of the class or the volume")
    if value is None:
        if not setting.is_flag:
            raise ValueError(f"mount flag {shown}: needs a value, as in {shown}=...")
        value = "true"
    try:
        return setting.field, read_setting(setting.field, value)
    except ValueError as error:
        raise ValueError(f"mount flag {shown}: its value cannot be used") from error
