"""Builds the one `Config` from options, environment and file, and refuses what cannot work.

Order: option > ``CACHEFS_...`` variable > file > variable of the AWS tools > default. `build` merges and fills in the
directories, `cachefs.cli.room` finds sizes for tiers that nobody gave one, `validate` refuses; `load` does all of it
and is what commands call. Nothing is clamped: a value is used as it was written, or the command ends with one line that
names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import pwd
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefs import runtime
from cachefs.block.budget import least_limit
from cachefs.cli import room
from cachefs.cli.groups import LETTERS, NAME, validate_groups
from cachefs.cli.options import (
    CONFIG_PARAMETER,
    ENVIRONMENT_PREFIX,
    SETTINGS,
    Setting,
    find_setting,
    parse,
    parse_typed,
    render_size,
)
from cachefs.config import (
    GIB,
    KIB,
    MIB,
    Addressing,
    CacheConfig,
    Config,
    FuseConfig,
    LimitsConfig,
    MetadataConfig,
    PeerConfig,
    S3Config,
    split_address,
    split_endpoint,
)
from cachefs.errors import ConfigError
from cachefs.types import Consistency

FALLBACKS: dict[str, tuple[str, ...]] = {
    "endpoint-url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "profile": ("AWS_PROFILE",),
    "ca-bundle": ("AWS_CA_BUNDLE",),
}
"""Variables of the AWS tools that fill a setting which nothing else sets."""

MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 64 * KIB, 16 * MIB
MIN_HANG_S = 2.0
"""Below this a busy machine would look like a hanging process."""
MAX_READ_AHEAD_BYTES = GIB
MAX_ID = (1 << 32) - 2
LOG_LEVELS = ("debug", "info", "warning", "error")
PEER_FILES = (
    "etcd_ca", "etcd_cert", "etcd_key", "etcd_password_file", "peer_cert", "peer_key", "peer_ca", "peer_secret_file",
)  # fmt: skip
_PATHS = ("cache_dir", "runtime_dir", "shm_dir", "ca_bundle", "log_file", *PEER_FILES)
_MAX_FILE_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and what is to be said about it."""

    config: Config
    given: frozenset[str]
    """Fields that somebody wrote somewhere; all others are defaults."""
    notices: tuple[str, ...] = ()
    """Defaults that are smaller here than elsewhere."""


def load(options: Mapping[str, object], environment: Mapping[str, str], config_file: str | None = None) -> Loaded:
    """Return the complete, validated configuration.

    `options` maps names of settings (field or key) to values, parsed or still text; None means "not given". Without
    `config_file` the variable CACHEFS_CONFIG may name one. Raises ConfigError.
    """
    loaded = fitted(build(options, environment, config_file))
    validate(loaded.config)
    return loaded


def load_config(
    options: Mapping[str, object], environment: Mapping[str, str], config_file: str | None = None
) -> Config:
    """Return the configuration of `load` alone."""
    return load(options, environment, config_file).config


def fitted(loaded: Loaded) -> Loaded:
    """Return it with sizes of tiers that fit, where nobody gave any."""
    cache, notices = room.fit(loaded.config.cache, loaded.given)
    return Loaded(dataclasses.replace(loaded.config, cache=cache), loaded.given, notices)


def build_config(
    options: Mapping[str, object], environment: Mapping[str, str], config_file: str | None = None
) -> Config:
    """Return the configuration of `build` alone."""
    return build(options, environment, config_file).config


def build(options: Mapping[str, object], environment: Mapping[str, str], config_file: str | None = None) -> Loaded:
    """Merge all sources and fill in default directories; values are read but not yet checked. Raises ConfigError."""
    file_name = config_file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG") or None
    values: dict[str, Any] = {}
    for layer in (_from_file(file_name) if file_name else {}, _from_environment(environment), _from_options(options)):
        values.update(layer)
    for name, value in _from_aws_environment(environment, values).items():
        values.setdefault(name, value)
    given = frozenset(values)
    if values.get("manifest"):
        values.setdefault("consistency", Consistency.IMMUTABLE)
    _fill_directories(values, environment)
    sections: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(Config)}
    for setting in SETTINGS:
        if setting.field in values:
            sections[setting.section][setting.field] = values[setting.field]
    kinds = typing.get_type_hints(Config)
    return Loaded(Config(**{name: kinds[name](**fields) for name, fields in sections.items()}), given)


# -- where values come from ------------------------------------------------------------------------


def _from_options(options: Mapping[str, object]) -> dict[str, Any]:
    values = {}
    for name, value in options.items():
        if value is None or name == CONFIG_PARAMETER:
            continue
        setting = find_setting(name)
        if setting is None:
            raise ConfigError(f"unknown option '{name}'{_hint(name)}")
        try:
            values[setting.field] = parse(setting, value) if isinstance(value, str) else value
        except ValueError as error:
            raise ConfigError(f"{setting.option or setting.key}: {error}") from error
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Read the CACHEFS_ variables. Unknown ones are left alone: Kubernetes makes a CACHEFS_PORT of its own."""
    values = {}
    for setting in SETTINGS:
        text = environment.get(setting.variable)
        if text is None or (text == "" and setting.kind is not str):
            continue
        try:
            values[setting.field] = parse(setting, text)
        except ValueError as error:
            raise ConfigError(f"environment variable {setting.variable}: {error}") from error
    return values


def _from_aws_environment(environment: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, names in FALLBACKS.items():
        setting = find_setting(key)
        text = next((environment[name] for name in names if environment.get(name)), None)
        # an unsigned request has no use for a profile, and refusing it for a variable of other tools would help nobody
        if setting is not None and text and not (key == "profile" and values.get("anonymous")):
            found[setting.field] = text
    return found


def _from_file(name: str) -> dict[str, Any]:
    try:
        with Path(name).open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
        if len(raw) > _MAX_FILE_BYTES:
            raise ConfigError(f"{name}: larger than {render_size(_MAX_FILE_BYTES)}, which no configuration file is")
        text = raw.decode("utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not a text file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from error
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{name}{_line_of(text, key)}"
        setting = find_setting(key)
        if isinstance(value, dict):
            raise ConfigError(f"{where}: unknown table '{key}'{'' if setting else _hint(key)}")
        if setting is None:
            raise ConfigError(f"{where}: unknown key '{key}'{_hint(key)}")
        if setting.field in values:
            raise ConfigError(f"{where}: '{key}' is set twice")
        try:
            values[setting.field] = parse_typed(setting, value)
        except ValueError as error:
            raise ConfigError(f"{where}: {key}: {error}") from error
    return values


def _line_of(text: str, key: str) -> str:
    """Return ", line N" of the first assignment of `key` (tomllib does not keep positions), or nothing."""
    pattern = re.compile(r"""\s*\[*\s*["']?""" + re.escape(key) + r"""["']?\s*[=.\]]""")
    for number, line in enumerate(text.splitlines(), start=1):
        if pattern.match(line):
            return f", line {number}"
    return ""


def nearest_key(name: str) -> str | None:
    """Return the key that somebody who wrote `name` probably meant."""
    close = difflib.get_close_matches(name.replace("_", "-").lower(), [s.key for s in SETTINGS], n=1)
    return close[0] if close else None


def _hint(name: str) -> str:
    near = nearest_key(name)
    return f"; did you mean '{near}'?" if near else ""


# -- directories -----------------------------------------------------------------------------------


def _fill_directories(values: dict[str, Any], environment: Mapping[str, str]) -> None:
    """Set the default directories and make all paths absolute: the processes that use them run in another directory."""
    uid = os.geteuid()
    home = environment.get("HOME") or _home_of(uid)
    if not values.get("cache_dir"):
        values["cache_dir"] = runtime.default_cache_dir(uid, home)
    if not values.get("runtime_dir"):
        values["runtime_dir"] = runtime.default_runtime_dir(uid, environment.get("XDG_RUNTIME_DIR", ""))
    for name in _PATHS:
        path = values.get(name)
        if path:
            values[name] = os.path.abspath(home + path[1:] if path == "~" or path.startswith("~/") else path)


def _home_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:
        return "/tmp"  # noqa: S108 - a user without a home (containers): the directory below it is made 0700 and its owner checked


# -- what cannot work ------------------------------------------------------------------------------


def validate(config: Config) -> None:
    """Refuse what cannot work. Raises ConfigError with one line that names the option and what would do."""
    _validate_numbers(config)
    _validate_s3(config.s3)
    _validate_view(config.s3, config.metadata)
    _validate_cache(config.cache)
    _validate_limits(config.limits, config.cache.block_size_bytes)
    _validate_fuse(config.fuse)
    _validate_peer(config.peer)
    if config.log.log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level {config.log.log_level}: must be one of {', '.join(LOG_LEVELS)}")


def _validate_numbers(config: Config) -> None:
    for setting in SETTINGS:
        value = getattr(getattr(config, setting.section), setting.field)
        if setting.unit == "duration":
            _validate_duration(setting, value)
        elif setting.unit == "bytes" and not 0 <= value < 1 << 62:
            raise ConfigError(f"--{setting.key} {value}: must be between 0 and 4 EiB")
        elif setting.unit == "octal" and not 0 <= value <= 0o7777:
            raise ConfigError(f"--{setting.key} {value:o}: must be between 0000 and 7777")


def _validate_duration(setting: Setting, value: float) -> None:
    if math.isnan(value) or value < 0:
        raise ConfigError(f"--{setting.key} {value:g}: a time cannot be negative")
    may_end_never = setting.field in ("metadata_ttl_s", "negative_ttl_s", "agent_idle_timeout_s")
    if math.isinf(value) and not may_end_never:
        raise ConfigError(f"--{setting.key} forever: must end at some time")
    if value == 0 and setting.field.endswith("timeout_s") and setting.field != "agent_idle_timeout_s":
        raise ConfigError(f"--{setting.key} 0: must be more than 0")


def _validate_s3(s3: S3Config) -> None:
    if s3.anonymous and s3.profile:
        raise ConfigError(
            f"--anonymous sends no credentials, so --profile {s3.profile} cannot be meant: leave out one of them"
        )
    if s3.endpoint_url and not re.fullmatch(r"https?://[^/?#\s@]+(/[^?#\s]*)?", s3.endpoint_url):
        hint = " (keys do not belong into the address)" if "@" in s3.endpoint_url else ""
        shown = re.sub(r"//[^/@]*@", "//***@", s3.endpoint_url)
        raise ConfigError(f"--endpoint-url {shown}: must look like https://HOST[:PORT]{hint}")
    if s3.addressing is Addressing.VIRTUAL and re.match(r"https?://(\d+\.\d+\.\d+\.\d+|\[)", s3.endpoint_url):
        raise ConfigError(
            "--virtual-host-style needs a host name, and --endpoint-url has an IP address: use --path-style"
        )
    if s3.ca_bundle and not os.path.isfile(s3.ca_bundle):
        raise ConfigError(f"--ca-bundle {s3.ca_bundle}: no such file")
    if not 1 <= s3.max_requests <= 1024:
        raise ConfigError(f"--max-requests {s3.max_requests}: must be between 1 and 1024")


def _validate_view(s3: S3Config, rules: MetadataConfig) -> None:
    if s3.manifest and rules.consistency is not Consistency.IMMUTABLE:
        raise ConfigError(
            f"--consistency {rules.consistency.value}: a mount with --manifest is immutable, leave it out"
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,128}", s3.identity):
        raise ConfigError("--identity: must be at most 128 letters, digits, dots, hyphens and underscores")


def _validate_cache(cache: CacheConfig) -> None:
    size = cache.block_size_bytes
    if size & (size - 1) or not MIN_BLOCK_BYTES <= size <= MAX_BLOCK_BYTES:
        raise ConfigError(f"--block-size {render_size(size)}: must be a power of two from 64KiB to 16MiB")
    if cache.memory_limit_bytes < least_limit(size):
        raise ConfigError(
            f"--memory-limit {render_size(cache.memory_limit_bytes)}: must be at least "
            f"{render_size(least_limit(size))} with blocks of {render_size(size)}"
        )
    for key, tier_bytes in (("cache-size", cache.cache_size_bytes), ("shm-size", cache.shm_size_bytes)):
        least = room.least_tier_bytes(size)
        if 0 < tier_bytes < least:
            raise ConfigError(
                f"--{key} {render_size(tier_bytes)}: must be at least {render_size(least)} (16 blocks), "
                "or 0 to do without this tier"
            )
    if os.path.exists(cache.cache_dir) and not os.path.isdir(cache.cache_dir):
        raise ConfigError(f"--cache-dir {cache.cache_dir}: is not a directory")
    if len(os.fsencode(cache.runtime_dir)) > runtime.MAX_PATH_BYTES:
        raise ConfigError(
            f"--runtime-dir {cache.runtime_dir}: at most {runtime.MAX_PATH_BYTES} bytes, for the sockets in it"
        )
    if cache.shm_size_bytes:
        _validate_shm(cache)


def _validate_limits(limits: LimitsConfig, block_size: int) -> None:
    for key, quota_bytes in (("shm-quota", limits.shm_quota_bytes), ("disk-quota", limits.disk_quota_bytes)):
        least = room.least_tier_bytes(block_size)
        if 0 < quota_bytes < least:
            raise ConfigError(
                f"--{key} {render_size(quota_bytes)}: must be at least {render_size(least)} (16 blocks), "
                "or 0 for no limit"
            )


def _validate_shm(cache: CacheConfig) -> None:
    try:
        stat = os.statvfs(cache.shm_dir)
    except OSError as error:
        raise ConfigError(
            f"--shm-dir {cache.shm_dir}: {error.strerror}; use --shm-size 0 to do without the shm tier"
        ) from error
    total = stat.f_blocks * stat.f_frsize
    if total and cache.shm_size_bytes > total:  # a tmpfs mounted without a limit reports 0
        wanted, fits = render_size(cache.shm_size_bytes), render_size(total // 2 // MIB * MIB)
        raise ConfigError(
            f"--shm-size {wanted}: the tmpfs {cache.shm_dir} holds only {render_size(total // MIB * MIB)}; "
            f"use --shm-size {fits}, "
            f"or enlarge it: mount -o remount,size={wanted.replace('iB', '').lower()} {cache.shm_dir}"
        )


def _validate_peer(peer: PeerConfig) -> None:
    for url in peer.etcd_endpoints:
        try:
            split_endpoint(url)
        except ValueError as error:
            raise ConfigError(f"--etcd {error}") from error
    if not peer.etcd_endpoints:
        for f in dataclasses.fields(peer):
            if getattr(peer, f.name) != f.default and f.name != "etcd":
                raise ConfigError(f"--{f.name.replace('_', '-')} needs --etcd: without it there are no peers")
        return
    for name in ("cluster", "node_name", "zone"):
        value = getattr(peer, name)
        if (value or name == "cluster") and not NAME.fullmatch(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value!r}: must be a name ({LETTERS})")
    validate_groups(peer.groups)
    for name in PEER_FILES:
        path = getattr(peer, name)
        if path and not os.path.isfile(path):
            raise ConfigError(f"--{name.replace('_', '-')} {path}: no such file")
    for name in ("advertise", "peer_listen"):
        if getattr(peer, name):
            try:
                split_address(getattr(peer, name))
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')} {error}") from error
    _validate_together(peer, "peer_cert", "peer_key", "peer_ca")
    _validate_together(peer, "etcd_cert", "etcd_key")
    _validate_together(peer, "etcd_user", "etcd_password_file")


def _validate_together(peer: PeerConfig, *names: str) -> None:
    given = [name for name in names if getattr(peer, name)]
    for name in names:
        if given and name not in given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --{name.replace('_', '-')} as well")


def _validate_fuse(fuse: FuseConfig) -> None:
    if not fuse.read_only:
        raise ConfigError("--no-read-only: writing is not offered yet; mount with --read-only")
    if fuse.hang_timeout_s < MIN_HANG_S:
        raise ConfigError(f"--hang-timeout {fuse.hang_timeout_s:g}s: must be at least {MIN_HANG_S:g}s")
    for key, number in (("uid", fuse.uid), ("gid", fuse.gid)):
        if not -1 <= number <= MAX_ID:  # the number above that means "nobody" to the kernel
            raise ConfigError(f"--{key} {number}: must be between 0 and {MAX_ID}, or -1 for whoever mounts")
    if fuse.read_ahead_bytes > MAX_READ_AHEAD_BYTES:
        raise ConfigError(
            f"--read-ahead {render_size(fuse.read_ahead_bytes)}: must be at most {render_size(MAX_READ_AHEAD_BYTES)}"
        )
    for key, mode in (("file-mode", fuse.file_mode), ("dir-mode", fuse.dir_mode)):
        if mode > 0o777:
            raise ConfigError(f"--{key} {mode:04o}: set-user-id, set-group-id and sticky bits are not offered")
