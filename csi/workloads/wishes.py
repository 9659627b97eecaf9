"""What somebody wants in a pod, by options and annotations, checked: the way from words to a `Sidecar`."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cachefs.settings import SETTINGS, find_setting, parse, render
from csi.workloads import injection
from csi.workloads.sidecar import AGENT_MEMORY_BYTES, CACHE_BYTES, SECRET_KEYS, SHM_BYTES, Sidecar
from csi.workloads.templates import PodTemplate

NOT_HERE = frozenset({"cache_dir", "runtime_dir", "shm_dir", "foreground", "log_file", "source", "identity"})
"""Settings that the container decides."""
_SOURCE = re.compile(r"s3://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[^\x00-\x1f\x7f]*)?")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,55}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")
_IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]{0,511}", re.ASCII)
_CPU = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?|[0-9]{1,9}m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was typed; None or nothing: it was not."""

    source: str | None = None
    path: str | None = None
    containers: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    name: str = "cachefs"
    secret: str | None = None
    secret_keys: str = ",".join(SECRET_KEYS)
    image: str = "cachefs"
    cache_path: str = ""
    cpu: str = "500m"
    remove: bool = False
    settings: Mapping[str, Any]
    """Fields of `cachefs.config` with their values."""


def wanted_in(template: PodTemplate, wishes: Wishes) -> Sidecar | None:
    """Return the sidecar that a pod is to have; None: it asks for none. Raises UsageError."""
    said = {name: str(template.annotations.get(name) or "").strip() for name in injection.ANNOTATIONS}
    source, path = wishes.source or said[injection.SOURCE], wishes.path or said[injection.PATH]
    if not source:
        if said[injection.PATH]:
            raise template.fault("metadata.annotations", f"{injection.PATH} is there, {injection.SOURCE} is not")
        return None
    if not path:
        raise template.fault("metadata.annotations", f"where shall it be? Give --path, or {injection.PATH}")
    settings = {**_annotated(template, said[injection.OPTIONS]), **wishes.settings}
    settings.setdefault("cache_size_bytes", CACHE_BYTES)
    settings.setdefault("shm_size_bytes", SHM_BYTES)
    try:
        return Sidecar(
            source=_checked("the source", source, _SOURCE, "write s3://BUCKET[/PREFIX]"),
            path=_directory("the path", path),
            image=_checked("--image", wishes.image, _IMAGE),
            name=_checked("--name", wishes.name, _LABEL, "small letters, digits and dashes, at most 57"),
            containers=wishes.containers or tuple(_listed(said[injection.CONTAINERS])),
            arguments=tuple(arguments(settings)),
            secret=_secret(wishes.secret or said[injection.SECRET]),
            secret_keys=_secret_keys(wishes.secret_keys),
            cache_path=_directory("--cache-path", wishes.cache_path) if wishes.cache_path else "",
            cache_size_bytes=settings["cache_size_bytes"],
            shm_size_bytes=settings["shm_size_bytes"],
            memory_limit_bytes=settings.get("memory_limit_bytes", AGENT_MEMORY_BYTES),
            cpu=_checked("--cpu", wishes.cpu, _CPU, "write 2 or 500m"),
            names_node="etcd" in settings and "node_name" not in settings,
        )
    except ValueError as error:
        raise template.fault("", str(error)) from error


def arguments(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield options of `cachefs mount`, always in the same order."""
    for setting in SETTINGS:
        if setting.field not in settings:
            continue
        value = settings[setting.field]
        if setting.is_flag:
            yield f"--{setting.key}" if value else f"--no-{setting.key}"
        else:
            yield f"--{setting.key}={render(setting, value)}"


def _annotated(template: PodTemplate, text: str) -> dict[str, Any]:
    """Read the options of an annotation: NAME=VALUE with commas between, a flag without a value. Raises UsageError."""
    found: dict[str, Any] = {}
    for word in _listed(text):
        name, given, value = word.partition("=")
        name = name.strip().removeprefix("--")
        setting = find_setting(name)
        if setting is None or setting.field in NOT_HERE:
            raise template.fault("metadata.annotations", f"{injection.OPTIONS}: '{name}' cannot be set here")
        if not given and not setting.is_flag:
            raise template.fault("metadata.annotations", f"{injection.OPTIONS}: '{name}' needs a value")
        try:
            found[setting.field] = parse(setting, value.strip() if given else "true")
        except ValueError as error:
            raise template.fault("metadata.annotations", f"{injection.OPTIONS}: {name}: {error}") from error
    return found


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _checked(what: str, text: str, pattern: re.Pattern[str], hint: str = "") -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"{what} cannot be '{text[:100]}'" + (f": {hint}" if hint else ""))
    return text


def _directory(what: str, text: str) -> str:
    """Return a directory as Kubernetes wants it."""
    path = posixpath.normpath(text)
    if not path.startswith("/") or path.lstrip("/") == "" or ":" in path or not path.isprintable():
        raise ValueError(f"{what} cannot be '{text[:100]}': write an absolute directory such as /data, without a colon")
    return "/" + path.lstrip("/")


def _secret(name: str) -> str:
    return _checked("--secret", name, _OBJECT, "it is the name of a Secret") if name else ""


def _secret_keys(text: str) -> tuple[str, ...]:
    keys = tuple(_listed(text))
    if not 2 <= len(keys) <= 3 or not all(_SECRET_KEY.fullmatch(key) for key in keys):
        raise ValueError("--secret-keys needs two or three names of keys with commas between")
    return keys
