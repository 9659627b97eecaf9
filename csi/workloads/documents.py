"""Files with Kubernetes objects, read and written so that people find their own text again.

A stream is cut at its ``---`` lines before anything is parsed, so a document that nobody changes is written byte for
byte as it came, whatever a YAML library would have made of it, and a document that cannot be parsed is named by its
number. Of a document that is changed, comments, order, quotes and the indentation of lists stay (ruamel.yaml's round
trip); the comments above and below it do not even pass through the library. JSON stays JSON.

INVARIANT: what nobody called `changed` for is written as it was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from cachefs.errors import UsageError

MAX_BYTES = 16 << 20
"""Longer input is no set of manifests; etcd takes 1.5 MiB for an object."""
_MARKER = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_REMARK = re.compile(r"[ \t]*(#.*)?\r?\n?")
_MARKER_ALONE = re.compile(r"---[ \t]*(#[^\n]*)?(\n|\Z)")
_KEY_ALONE = re.compile(r"( *)(?:- )*[^\s#-][^#]*:\s*(?:#.*)?$")
_ITEM = re.compile(r"( *)- ")
_WIDE = 1 << 20
_OLD_WORDS = re.compile(
    r"(?i)(y|n|yes|no|on|off|true|false|null|~|[-+]?[0-9][0-9_,.:exabcdefo+-]*|[-+]?\.(inf|nan)|=|<<|)"
)
"""What YAML 1.1, which Kubernetes reads, takes for something else than text when it is not quoted."""


@dataclass(slots=True, eq=False)
class Document:
    """One document of a stream."""

    number: int
    """From 1, counting those that hold something."""
    head: str
    """The marker, and remarks above the first key."""
    body: str
    tail: str
    """Remarks below the last key."""
    tree: Any
    """Mappings, lists and scalars; None when it is empty."""
    is_json: bool = False
    changed: bool = False

    @property
    def title(self) -> str:
        """What it is, for an error: "document 2 (Deployment web)"."""
        if not isinstance(self.tree, Mapping):
            return f"document {self.number}"
        described = self.tree.get("metadata")
        name = described.get("name") or described.get("generateName") if isinstance(described, Mapping) else ""
        words = " ".join(str(word) for word in (self.tree.get("kind"), name) if word)
        return f"document {self.number} ({words})" if words else f"document {self.number}"

    def text(self) -> str:
        """Return it as it is to be written."""
        if not self.changed:
            return self.head + self.body + self.tail
        return self.head + (_written_json(self) if self.is_json else _written_yaml(self)) + self.tail


def read_stream(text: str) -> list[Document]:
    """Return the documents of a stream, those without content included. Raises UsageError, in one line."""
    if len(text) > MAX_BYTES:
        raise UsageError(f"more than {MAX_BYTES >> 20} MiB are no manifests")
    starts = sorted({0, *(match.start() for match in _MARKER.finditer(text))})
    documents, number = [], 0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        head, body, tail = _parts(text[start:end])
        number += bool(body)
        line = text.count("\n", 0, start + len(head))
        tree, is_json = _parsed(body, number, line) if body else (None, False)
        documents.append(Document(number, head, body, tail, tree, is_json))
    return documents


def write_stream(documents: Iterable[Document]) -> str:
    """Return the text of a stream."""
    return "".join(document.text() for document in documents)


def fresh(value: Any) -> Any:
    """Return plain mappings, lists and texts as a document holds them; texts that YAML 1.1 would misread are quoted."""
    if isinstance(value, Mapping):
        built = CommentedMap()
        for key, each in value.items():
            built[fresh(key)] = fresh(each)
        return built
    if isinstance(value, list | tuple):
        return CommentedSeq([fresh(each) for each in value])
    if isinstance(value, str) and not isinstance(value, DoubleQuotedScalarString) and _OLD_WORDS.fullmatch(value):
        return DoubleQuotedScalarString(value)
    return value


# -- reading -----------------------------------------------------------------------------------------------------------


def _parts(text: str) -> tuple[str, str, str]:
    """Split a document into what stands above its content, the content, and what stands below."""
    marker = _MARKER_ALONE.match(text)
    lines = text[marker.end() if marker else 0 :].splitlines(keepends=True)
    first, last = 0, len(lines)
    while first < last and (_REMARK.fullmatch(lines[first].lstrip("\ufeff")) or lines[first].startswith("%")):
        first += 1
    while last > first and (
        not lines[last - 1].strip() or lines[last - 1].startswith("#") or lines[last - 1].rstrip() == "..."
    ):
        last -= 1
    head = (marker[0] if marker else "") + "".join(lines[:first])
    return head, "".join(lines[first:last]), "".join(lines[last:])


def _parsed(body: str, number: int, line: int) -> tuple[Any, bool]:
    content = body.removeprefix("---").strip()
    if content.startswith("{"):
        try:
            return json.loads(content), True
        except ValueError:
            pass  # a mapping of YAML in braces
    try:
        return _yaml(body).load(body), False
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {line + mark.line + 1}" if mark is not None else ""
        problem = error.problem or error.context or "it cannot be read"
        raise UsageError(f"document {number}{where}: this is no YAML: {problem}") from error
    except (YAMLError, ValueError, RecursionError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"document {number}: this is no YAML: {first}") from error


def _yaml(body: str) -> YAML:
    """A round trip for a document that is laid out like this one."""
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = _WIDE
    offset = _list_offset(body)
    yaml.indent(mapping=2, sequence=offset + 2, offset=offset)
    return yaml


def _list_offset(body: str) -> int:
    """Return how far the lists of a document are indented below their keys."""
    above = None
    for line in body.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        item = _ITEM.match(line)
        if item and above is not None:
            return max(0, min(len(item[1]) - above, 8))
        key = _KEY_ALONE.match(line)
        above = None if key is None else len(line) - len(line.lstrip(" -"))
    return 0


# -- writing -----------------------------------------------------------------------------------------------------------


def _written_yaml(document: Document) -> str:
    out = StringIO()
    _yaml(document.body).dump(document.tree, out)
    text = out.getvalue()
    if not document.body.endswith("\n") and not document.tail:
        text = text.removesuffix("\n")
    return text.replace("\n", "\r\n") if "\r\n" in document.body else text


def _written_json(document: Document) -> str:
    second = document.body.removeprefix("---").strip().partition("\n")[2]
    indent = len(second) - len(second.lstrip(" ")) if second else None
    end = "\n" if document.body.endswith("\n") else ""
    return json.dumps(document.tree, indent=indent or None, ensure_ascii=False) + end


# -- changing ----------------------------------------------------------------------------------------------------------


def settle(target: MutableMapping[str, Any] | list[Any], key: str | int, wanted: Any) -> bool:
    """Make `target[key]` what is wanted, and return whether that changed anything. What is equal already is not
    touched, so remarks beside it stay. Of a list, the element must be there.
    """
    holder: Any = target  # either is read and written the same way
    found: Any = holder[key] if isinstance(target, list) or key in target else None
    if isinstance(wanted, Mapping) and isinstance(found, MutableMapping):
        changed = False
        for name in [name for name in found if name not in wanted]:
            del found[name]
            changed = True
        for name, value in wanted.items():
            changed |= settle(found, name, value)
        return changed
    if isinstance(wanted, list | tuple) and isinstance(found, list) and len(found) == len(wanted):
        return sum(settle(found, at, value) for at, value in enumerate(wanted)) > 0  # all of them, so not any()
    if _is_same(found, wanted):
        return False
    holder[key] = fresh(wanted)
    return True


def _is_same(found: Any, wanted: Any) -> bool:
    """Whether two scalars mean the same; 1 is not true, and "1" is not 1."""
    kinds: tuple[type[Any], ...] = (str, bool, int, float)
    kind = next((kind for kind in kinds if isinstance(wanted, kind)), type(wanted))
    is_kind = isinstance(found, kind) and (kind is not int or not isinstance(found, bool))
    return is_kind and bool(found == wanted)
