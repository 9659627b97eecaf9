"""Hypothesis strategies for configurations: any value that a setting can have."""

from __future__ import annotations

import dataclasses
import enum
import math
import typing
from typing import Any

from hypothesis import strategies as st

from cachefs.cli.options import SETTINGS, Setting
from cachefs.config import Config

TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)
_DURATIONS = st.one_of(
    st.just(math.inf),
    st.integers(0, 10**7).map(float),
    st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1000),
)


def values(setting: Setting) -> st.SearchStrategy[Any]:
    """Values of one setting, as the program uses them."""
    if setting.unit == "bytes":
        return st.one_of(st.integers(0, 1 << 50), st.integers(0, 1 << 20).map(lambda n: n << 20))
    if setting.unit == "duration":
        return _DURATIONS
    if setting.unit == "octal":
        return st.integers(0, 0o7777)
    if setting.is_flag:
        return st.booleans()
    if issubclass(setting.kind, enum.Enum):
        return st.sampled_from(setting.kind)
    return st.integers(-1, 1 << 40) if setting.kind is int else TEXT


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Whole configurations, also such that `validate` refuses."""
    sections: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(Config)}
    for setting in SETTINGS:
        if draw(st.booleans()):
            sections[setting.section][setting.field] = draw(values(setting))
    kinds = typing.get_type_hints(Config)
    return Config(**{name: kinds[name](**fields) for name, fields in sections.items()})
