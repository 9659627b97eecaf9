"""Puts the sidecar into pods, changes it, and takes it out again.

Everything it puts in is found again by name (the sidecar's command says that it is ours), so a second injection changes
nothing, one with other options changes what is different, and `remove` takes out all of it. What bears such a name and
is not ours is not touched: that is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from csi.workloads import sidecar
from csi.workloads.documents import fresh, settle
from csi.workloads.sidecar import Sidecar
from csi.workloads.templates import PodTemplate

SOURCE, PATH = "cachefs.io/source", "cachefs.io/path"
CONTAINERS, SECRET, OPTIONS = "cachefs.io/containers", "cachefs.io/secret", "cachefs.io/options"
ANNOTATIONS = (SOURCE, PATH, CONTAINERS, SECRET, OPTIONS)


def inject(template: PodTemplate, wanted: Sidecar) -> bool:
    """Give a pod the sidecar, or change the one that it has; return whether anything changed.

    Raises UsageError, and then nothing of this pod was changed.
    """
    _refuse_what_cannot_work(template)
    receivers = _receivers(template, wanted)
    found = _own_sidecar(template, wanted.name)
    built = sidecar.volumes(wanted)
    _refuse_taken_names(template, wanted, None if found is None else wanted.volume_names)
    for each, field in receivers:
        _refuse_taken_path(template, wanted, each, field)
    changed = _settle_container(template, found, sidecar.container(wanted))
    changed |= _settle_volumes(template, wanted, built)
    chosen = [id(each) for each, _ in receivers]
    _part_lists(_containers(template), chosen)
    for each, _ in receivers:
        changed |= _settle_mount(each, sidecar.volume_mount(wanted))
    for each in _containers(template):
        if id(each) not in chosen and not sidecar.is_ours(each):
            changed |= _drop_named(each, "volumeMounts", {wanted.name})
    template.document.changed |= changed
    return changed


def remove(template: PodTemplate, name: str) -> bool:
    """Take the sidecar out of a pod; return whether there was one. Raises UsageError."""
    found = _own_sidecar(template, name)
    if found is None:
        return False
    wanted = Sidecar(source="", path="", image="", name=name)
    initial = template.spec["initContainers"]
    initial.remove(found)
    if not initial:
        del template.spec["initContainers"]
    for each in _containers(template):
        _drop_named(each, "volumeMounts", {name})
    _drop_named(template.spec, "volumes", set(wanted.volume_names))
    template.document.changed = True
    return True


# -- what is there -----------------------------------------------------------------------------------------------------


def _containers(template: PodTemplate) -> list[MutableMapping[str, Any]]:
    spec = template.spec
    return [
        each
        for field in ("initContainers", "containers")
        for each in (spec.get(field) or ())
        if isinstance(each, MutableMapping)
    ]


def _own_sidecar(template: PodTemplate, name: str) -> MutableMapping[str, Any] | None:
    """Return our sidecar of that name. Raises UsageError when another container has it."""
    for field in ("initContainers", "containers"):
        for at, each in enumerate(template.spec.get(field) or ()):
            if isinstance(each, MutableMapping) and each.get("name") == name:
                if field == "initContainers" and sidecar.is_ours(each):
                    return each
                raise template.fault(
                    f"spec.{field}[{at}]", f"a container '{name}' is there already: name the sidecar with --name"
                )
    return None


def _receivers(template: PodTemplate, wanted: Sidecar) -> list[tuple[MutableMapping[str, Any], str]]:
    """Return the containers that read, and where each of them is. Raises UsageError."""
    template.listed("containers")
    found: dict[str, tuple[MutableMapping[str, Any], str]] = {}
    for field in ("containers", "initContainers"):
        for at, each in enumerate(template.spec.get(field) or ()):
            if isinstance(each, MutableMapping) and not sidecar.is_ours(each):
                name = str(each.get("name", ""))
                if field == "containers" or name in wanted.containers:
                    found.setdefault(name, (each, f"spec.{field}[{at}]"))
    missing = [name for name in wanted.containers if name not in found]
    if missing:
        there = ", ".join(found) or "none"
        raise template.fault("spec.containers", f"there is no container '{missing[0]}' (there are: {there})")
    return [pair for name, pair in found.items() if not wanted.containers or name in wanted.containers]


def _refuse_what_cannot_work(template: PodTemplate) -> None:
    spec = template.spec
    if spec.get("hostUsers") is False:
        raise template.fault("spec.hostUsers", "mounts do not reach containers in a user namespace of their own")
    system = spec.get("os")
    if isinstance(system, Mapping) and system.get("name") == "windows":
        raise template.fault("spec.os", "the file system needs Linux")


def _refuse_taken_names(template: PodTemplate, wanted: Sidecar, own: tuple[str, ...] | None) -> None:
    for at, each in enumerate(template.spec.get("volumes") or ()):
        name = each.get("name") if isinstance(each, Mapping) else None
        if own is None and name in wanted.volume_names:
            raise template.fault(
                f"spec.volumes[{at}]", f"a volume '{name}' is there already: name the sidecar with --name"
            )


def _refuse_taken_path(template: PodTemplate, wanted: Sidecar, receiver: Mapping[str, Any], field: str) -> None:
    for at, each in enumerate(receiver.get("volumeMounts") or ()):
        if not isinstance(each, Mapping) or each.get("name") == wanted.name:
            continue
        if str(each.get("mountPath", "")).rstrip("/") == wanted.path:
            raise template.fault(
                f"{field}.volumeMounts[{at}]", f"volume '{each.get('name')}' is mounted at {wanted.path} already"
            )


# -- what changes ------------------------------------------------------------------------------------------------------


def _settle_container(template: PodTemplate, found: MutableMapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    initial = template.listed("initContainers")
    if found is None:
        initial.insert(0, fresh(wanted))  # those behind it may read, too
        return True
    at = next(at for at, each in enumerate(initial) if each is found)
    return settle(initial, at, wanted)


def _settle_volumes(template: PodTemplate, wanted: Sidecar, built: Mapping[str, Mapping[str, Any]]) -> bool:
    unwanted = set(wanted.volume_names) - built.keys()
    changed = _drop_named(template.spec, "volumes", unwanted)
    listed = template.listed("volumes")
    for name, volume in built.items():
        changed |= _settle_named(listed, name, volume)
    return changed


def _settle_mount(receiver: MutableMapping[str, Any], mount: Mapping[str, Any]) -> bool:
    if not isinstance(receiver.get("volumeMounts"), list):
        receiver["volumeMounts"] = fresh([])
    return _settle_named(receiver["volumeMounts"], mount["name"], mount)


def _part_lists(containers: list[MutableMapping[str, Any]], chosen: list[int]) -> None:
    """Give containers lists of their own that share one by an alias or a merge key, if only some of them are chosen."""
    users: dict[int, list[MutableMapping[str, Any]]] = {}
    for each in containers:
        if isinstance(each.get("volumeMounts"), list):
            users.setdefault(id(each["volumeMounts"]), []).append(each)
    for some in users.values():
        if len({id(each) in chosen for each in some}) == 2:
            for each in some:
                each["volumeMounts"] = fresh(each["volumeMounts"])


def _settle_named(listed: list[Any], name: str, wanted: Mapping[str, Any]) -> bool:
    for at, each in enumerate(listed):
        if isinstance(each, Mapping) and each.get("name") == name:
            return settle(listed, at, wanted)
    listed.append(fresh(wanted))
    return True


def _drop_named(holder: MutableMapping[str, Any], field: str, names: set[str]) -> bool:
    listed = holder.get(field)
    if not isinstance(listed, list):
        return False
    gone = [at for at, each in enumerate(listed) if isinstance(each, Mapping) and each.get("name") in names]
    for at in reversed(gone):
        del listed[at]
    if gone and not listed:
        del holder[field]
    return bool(gone)
