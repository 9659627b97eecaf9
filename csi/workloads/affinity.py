"""Lets pods prefer nodes: terms of preferred node affinity, and how they are found again.

Terms have no names, so what was written is noted in an annotation of the pod template, which people can read too:

    cachefs.io/prefers: kubernetes.io/hostname: node-a=100,node-b=40

A later run takes out exactly those terms before it puts in others. Terms of other people stay as they are. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from csi.workloads.documents import fresh, settle
from csi.workloads.templates import PodTemplate

PREFERS = "cachefs.io/prefers"
HOSTNAME = "kubernetes.io/hostname"
BY_NAME = "metadata.name"
"""Instead of a label: the name of the node itself."""
FIELD = "preferredDuringSchedulingIgnoredDuringExecution"
HEAVIEST = 100
"""The most that Kubernetes lets a term weigh."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Nodes by name, each with its weight (1 to 100), the best first."""

    key: str
    """The label with the names, or BY_NAME; for a dataset's own label its key, and `nodes` are thresholds."""
    nodes: tuple[tuple[str, int], ...]

    def note(self) -> str:
        """Return what stands in the annotation."""
        return f"{self.key}: " + ",".join(f"{name}={weight}" for name, weight in self.nodes)

    @classmethod
    def of_note(cls, text: str) -> Preference | None:
        """Read an annotation; None when it is none of ours."""
        key, found, rest = text.partition(": ")
        pairs = [part.rpartition("=") for part in rest.split(",") if part]
        if not found or not all(name and weight.isdigit() for name, _, weight in pairs):
            return None
        return cls(key, tuple((name, int(weight)) for name, _, weight in pairs))

    def terms(self) -> list[dict[str, Any]]:
        """Return the terms, one for each weight (Kubernetes allows one name only where names are no label)."""
        if self.key == BY_NAME:
            return [
                {"weight": weight, "preference": {"matchFields": [_in(self.key, [name])]}}
                for name, weight in self.nodes
            ]
        if "/" in self.key and self.nodes and self.nodes[0][0].startswith(">"):
            return [
                {"weight": weight, "preference": {"matchExpressions": [_above(self.key, name)]}}
                for name, weight in self.nodes
            ]
        by_weight: dict[int, list[str]] = {}
        for name, weight in self.nodes:
            by_weight.setdefault(weight, []).append(name)
        return [
            {"weight": weight, "preference": {"matchExpressions": [_in(self.key, names)]}}
            for weight, names in by_weight.items()
        ]


def weighed(held: Sequence[tuple[str, int]], most: int) -> tuple[tuple[str, int], ...]:
    """Return nodes with weights in proportion to what they hold: `most` for the one with the most bytes, at least 1."""
    best = max((size for _, size in held), default=0)
    return tuple((name, max(1, round(most * size / best))) for name, size in held if size > 0)


def prefer(template: PodTemplate, wanted: Preference) -> bool:
    """Let a pod prefer these nodes, and no others that an earlier run chose; return whether anything changed.

    Raises UsageError when there is something else where the affinity has to be.
    """
    terms, noted = wanted.terms(), template.annotations.get(PREFERS)
    if noted == wanted.note() and all(term in _present(template) for term in terms):
        return False
    forget(template)
    listed = _made(template)
    listed.extend(fresh(terms))
    described = template.holder.setdefault("metadata", fresh({}))
    if not isinstance(described.get("annotations"), MutableMapping):
        described["annotations"] = fresh({})
    settle(described["annotations"], PREFERS, wanted.note())
    template.document.changed = True
    return True


def forget(template: PodTemplate) -> bool:
    """Take out what an earlier run has put in; return whether there was anything."""
    noted = template.annotations.get(PREFERS)
    former = Preference.of_note(noted) if isinstance(noted, str) else None
    if former is None:
        return False
    listed = _present(template)
    for term in former.terms():
        if term in listed:
            listed.remove(term)
    _drop_empty(template.spec, ("affinity", "nodeAffinity", FIELD))
    del template.holder["metadata"]["annotations"][PREFERS]
    _drop_empty(template.holder, ("metadata", "annotations"))
    template.document.changed = True
    return True


def _present(template: PodTemplate) -> list[Any]:
    """Return the terms that are there."""
    found: Any = template.spec
    for step in ("affinity", "nodeAffinity", FIELD):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found if isinstance(found, list) else []


def _made(template: PodTemplate) -> list[Any]:
    """Return the list of terms, made if it is not there. Raises UsageError."""
    found: Any = template.spec
    path = "spec"
    for step in ("affinity", "nodeAffinity", FIELD):
        if found.get(step) is None:
            found[step] = fresh([] if step == FIELD else {})
        found, path = found[step], f"{path}.{step}"
        if not isinstance(found, list if step == FIELD else MutableMapping):
            raise template.fault(path, "it is not what it has to be in a pod")
    assert isinstance(found, list)
    return found


def _drop_empty(holder: Any, path: Sequence[str]) -> None:
    """Remove what has become empty, from the inside out."""
    step, rest = path[0], path[1:]
    inner = holder.get(step) if isinstance(holder, Mapping) else None
    if inner is None:
        return
    if rest:
        _drop_empty(inner, rest)
    if not inner:
        del holder[step]


def _in(key: str, names: Sequence[str]) -> dict[str, Any]:
    return {"key": key, "operator": "In", "values": list(names)}


def _above(key: str, threshold: str) -> dict[str, Any]:
    return {"key": key, "operator": "Gt", "values": [threshold.removeprefix(">")]}
