"""Where the pods are in an object: the pod itself, the template of a controller, each element of a List.

The kinds of Kubernetes itself have their template at a known place, which is said to be missing when it is. Kinds of
others (a PyTorchJob has a template for each role, a JobSet one for each replicated job) are searched for anything that
is called a template and has containers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachefs.errors import UsageError
from csi.workloads.documents import Document, fresh

PLACES: dict[str, tuple[str, ...]] = {
    "Pod": (),
    "PodTemplate": ("template",),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
    **dict.fromkeys(
        ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job"), ("spec", "template")
    ),
}
"""Where the pod is in the kinds of Kubernetes itself."""
_OWN_GROUPS = ("v1", "apps/", "batch/")
_DEEPEST = 24


@dataclass(frozen=True, slots=True, eq=False)
class PodTemplate:
    """A pod, or what pods are made from: a mapping with `metadata` and `spec`."""

    document: Document
    kind: str
    name: str
    path: str
    """Of the mapping in its document: "spec.template", "items[2]"; empty for a pod."""
    holder: MutableMapping[str, Any]

    @property
    def spec(self) -> MutableMapping[str, Any]:
        """The pod's spec."""
        found: MutableMapping[str, Any] = self.holder["spec"]
        return found

    @property
    def annotations(self) -> Mapping[str, Any]:
        """The pod's annotations."""
        described = self.holder.get("metadata")
        found = described.get("annotations") if isinstance(described, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def is_meant(self, only: Collection[str]) -> bool:
        """Whether the object is one of KIND/NAME; none: all are."""
        return not only or f"{self.kind}/{self.name}".lower() in {each.lower() for each in only}

    def fault(self, field: str, text: str) -> UsageError:
        """Return the error that says what is wrong with a field of this pod."""
        where = ".".join(part for part in (self.path, field) if part)
        return UsageError(f"{self.document.title}, {where}: {text}" if where else f"{self.document.title}: {text}")

    def listed(self, field: str) -> list[Any]:
        """Return a list of the spec, made if it is not there. Raises UsageError when it is no list of mappings."""
        found = self.spec.get(field)
        if found is None:
            found = self.spec[field] = fresh([])
        if not isinstance(found, list):
            raise self.fault(f"spec.{field}", "this is no list")
        for at, each in enumerate(found):
            if not isinstance(each, MutableMapping):
                raise self.fault(f"spec.{field}[{at}]", "this is no mapping")
        return found


def find_templates(documents: Sequence[Document]) -> Iterator[PodTemplate]:
    """Yield the pods of all documents, in order. Raises UsageError where an object has none that has to have one."""
    for document in documents:
        if document.tree is None:
            continue
        if not isinstance(document.tree, MutableMapping):
            raise UsageError(f"{document.title}: this is no Kubernetes object (a mapping with kind and metadata)")
        yield from _in_object(document, document.tree, "")


def _in_object(document: Document, tree: MutableMapping[str, Any], path: str) -> Iterator[PodTemplate]:
    kind = tree.get("kind")
    if not isinstance(kind, str) or not kind:
        raise UsageError(f"{document.title}{', ' + path if path else ''}: it has no kind")
    if kind.endswith("List") and isinstance(tree.get("items"), list):
        for at, item in enumerate(tree["items"]):
            if isinstance(item, MutableMapping):
                # elements of a PodList may leave their kind out
                if "kind" not in item and kind != "List":
                    yield from _of_kind(document, kind.removesuffix("List"), item, f"{path}items[{at}]")
                else:
                    yield from _in_object(document, item, f"{path}items[{at}]")
        return
    yield from _of_kind(document, kind, tree, path)


def _of_kind(document: Document, kind: str, tree: MutableMapping[str, Any], path: str) -> Iterator[PodTemplate]:
    version = str(tree.get("apiVersion", "v1"))
    name = _name(tree)
    if kind in PLACES and version.startswith(_OWN_GROUPS):
        holder: Any = tree
        for step in PLACES[kind]:
            path = f"{path}.{step}" if path else step
            holder = holder.get(step) if isinstance(holder, Mapping) else None
        template = PodTemplate(document, kind, name, path, holder)
        if not isinstance(holder, MutableMapping) or not isinstance(holder.get("spec"), MutableMapping):
            raise template.fault("spec", "it has no pod spec")
        if not holder["spec"].get("containers"):
            raise template.fault("spec.containers", "it has no containers")
        yield template
        return
    seen: set[int] = set()
    for where, holder in _search(tree, path, seen, 0):
        yield PodTemplate(document, kind, name, where, holder)


def _search(tree: Any, path: str, seen: set[int], depth: int) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Yield what is called a template and holds containers; each mapping once, however often it is named."""
    if depth > _DEEPEST or id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, MutableMapping):
        for key, value in tree.items():
            where = f"{path}.{key}" if path else str(key)
            if str(key).lower().endswith("template") and _holds_containers(value):
                seen.add(id(value))
                yield where, value
            else:
                yield from _search(value, where, seen, depth + 1)
    elif isinstance(tree, list):
        for at, value in enumerate(tree):
            yield from _search(value, f"{path}[{at}]", seen, depth + 1)


def _holds_containers(value: Any) -> bool:
    spec = value.get("spec") if isinstance(value, MutableMapping) else None
    containers = spec.get("containers") if isinstance(spec, MutableMapping) else None
    return isinstance(containers, list) and bool(containers)


def _name(tree: Mapping[str, Any]) -> str:
    described = tree.get("metadata")
    return str(described.get("name") or described.get("generateName") or "") if isinstance(described, Mapping) else ""
