"""`-o remount`: mount(8) and `systemctl daemon-reload` ask for it with the options of fstab.

The options of a mount are those it was made with. So a remount that asks for these is fine and does nothing; one that
asks for anything else is refused, with the first option that would have to change.
"""

from __future__ import annotations

import os
from typing import Any

from cachefs.cli.load import Loaded
from cachefs.cli.mount_options import MountWords
from cachefs.cli.options import SETTINGS, Setting, render
from cachefs.config import Config, from_plain
from cachefs.errors import MountError
from cachefs.mount import mountinfo, registry
from cachefs.runtime import RuntimeDir


def check_remount(source: str, mountpoint: str, loaded: Loaded, asked: set[str], words: MountWords) -> Config:
    """Return the configuration of the mount. Raises MountError when it would have to change; `asked`: fields that were
    given with this very command.
    """
    place = mountinfo.canonical(mountpoint)
    mount = mountinfo.find_mount(place)
    if mount is None or not mount.is_cachefs:
        raise MountError(f"{place} is not a mount of cachefs: there is nothing to remount")
    now = _config_of(place, loaded.config.cache.runtime_dir)
    if source != now.s3.source:
        raise MountError(_refusal(place, f"the source from {now.s3.source} to {source}"))
    for setting in SETTINGS:
        if setting.field in asked and _differs(setting, now, loaded.config):
            change = f"{setting.key} from {_shown(setting, now) or 'nothing'} to {_shown(setting, loaded.config)}"
            raise MountError(_refusal(place, change))
    for flag in words.flags:
        if flag not in mount.options.split(","):
            raise MountError(_refusal(place, f"to {flag}"))
    return now


def _config_of(place: str, runtime_dir: str) -> Config:
    plain: Any = None
    if os.path.isdir(runtime_dir):  # to ask must not make one
        known = registry.look_up(RuntimeDir(runtime_dir), place)
        plain = known.state.get("config") if known.alive else None
    if not isinstance(plain, dict):
        raise MountError(f"{place} has no supervisor in {runtime_dir} (--runtime-dir), so its options are not known")
    config: Config = from_plain(Config, plain)
    return config


def _differs(setting: Setting, now: Config, asked: Config) -> bool:
    if setting.field == "allow_other":
        return False  # mount(8) repeats what it sees in the mount table, where it stands for every mount of root's
    return _shown(setting, now) != _shown(setting, asked)


def _shown(setting: Setting, config: Config) -> str:
    return render(setting, getattr(getattr(config, setting.section), setting.field))


def _refusal(place: str, change: str) -> str:
    return f"{place}: remounting cannot change {change}; unmount it and mount it again"
