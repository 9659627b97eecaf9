"""A reader of Prometheus' text format 0.0.4 that takes nothing which its description does not allow.

https://prometheus.io/docs/instrumenting/exposition_formats/: one HELP and one TYPE at most for a name, both before its
values; all lines of a name together; no value twice; three escapes in labels, two in HELP; a line feed at the end.
"""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass, field

from cachefs.exporter.exposition import CONTENT_TYPE

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\n|\\")*)"(,|$)')
_VALUE = re.compile(r"[+-]Inf|NaN|-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
_KINDS = {"counter", "gauge", "histogram", "summary", "untyped"}

Labels = tuple[tuple[str, str], ...]


@dataclass
class Read:
    """One name."""

    help: str = ""
    kind: str = "untyped"
    values: dict[Labels, float] = field(default_factory=dict)

    def value(self, **labels: str) -> float:
        """Return the one value that has these labels, among others."""
        found = [value for texts, value in self.values.items() if labels.items() <= dict(texts).items()]
        assert len(found) == 1, (labels, self.values)
        return found[0]


def read(body: bytes) -> dict[str, Read]:
    """Return everything in a text. Raises AssertionError for what is not allowed."""
    text = body.decode("utf-8")
    assert text == "" or text.endswith("\n")
    found: dict[str, Read] = {}
    current = ""
    for line in text.split("\n")[:-1]:
        about = re.fullmatch(rf"# (HELP|TYPE) ({_NAME})(?: (.*))?", line)
        if line.startswith("#") or not line:
            assert about, line
        name = about[2] if about else _sample(line)[0]
        if name != current:
            assert name not in found, f"{name}: its lines are not together"
            current, found[name] = name, Read()
        one = found[name]
        if about and about[1] == "HELP":
            assert not one.help, line
            assert not one.values, line
            assert re.fullmatch(r"(?:[^\\]|\\\\|\\n)*", about[3]), line
            one.help = about[3]
        elif about:
            assert one.kind == "untyped", line
            assert not one.values, line
            assert about[3] in _KINDS, line
            one.kind = about[3]
        else:
            _, labels, value = _sample(line)
            assert labels not in one.values, f"twice: {line}"
            one.values[labels] = value
    return found


def _sample(line: str) -> tuple[str, Labels, float]:
    matched = _SAMPLE.fullmatch(line)
    assert matched, line
    labels, rest = [], matched[2] or ""
    while rest:
        label = _LABEL.match(rest)
        assert label, line
        text = re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), label[2])
        labels.append((label[1], text))
        rest = rest[label.end() :]
        assert bool(rest) == (label[3] == ","), line
    assert len({name for name, _ in labels}) == len(labels), line
    assert _VALUE.fullmatch(matched[3]), line
    return matched[1], tuple(sorted(labels)), float(matched[3].replace("Inf", "inf"))


def scraped(port: int, timeout_s: float = 10.0) -> dict[str, Read]:
    """Return what an endpoint on this machine serves."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout_s) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == CONTENT_TYPE
        return read(answer.read())
