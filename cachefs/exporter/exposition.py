"""Writes values in the text format of Prometheus (version 0.0.4).

INVARIANT: each family is there once, HELP and TYPE before its values; no value twice; what a label says, which may be
any text, cannot end its line or its quotes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cachefs.exporter.table import FAMILIES, Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a family, and what its labels say, in the order of `Family.labels`."""

    family: Family
    labels: tuple[str, ...]
    value: float


def exposition(samples: Iterable[Sample]) -> bytes:
    """Return the text. Families come in the order of the table; of two values with the same labels the last counts."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for sample in samples:
        found.setdefault(sample.family.name, {})[sample.labels] = sample.value
    lines: list[str] = []
    for name, family in FAMILIES.items():
        if name in found:
            lines += [f"# HELP {name} {_escaped(family.help)}", f"# TYPE {name} {family.kind.value}"]
            lines += (f"{name}{_labels(family, texts)} {_number(value)}" for texts, value in found[name].items())
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _labels(family: Family, texts: tuple[str, ...]) -> str:
    pairs = zip(family.labels, texts, strict=True)
    inner = ",".join(f'{name}="{_quoted(text)}"' for name, text in pairs)
    return f"{{{inner}}}" if inner else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1 << 63 else repr(value)
