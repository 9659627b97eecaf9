"""The settings of `cachefs.config` as people write them: names, texts, units.

A setting exists once, as a dataclass field. Everything a person sees is derived from it:

    field cache_size_bytes   option --cache-size   variable CACHEFS_CACHE_SIZE   key cache-size   value "50GiB"

`SETTINGS` is the list of all of them, `parse` reads what a person wrote, `render` writes it. The command line
(`cachefs.cli.options`) and the parameters of volumes (`csi.parameters`) read their texts here.

INVARIANT: ``parse(setting, render(setting, value)) == value`` for every value that a setting can have.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from cachefs.config import GIB, KIB, MIB, Config

ENVIRONMENT_PREFIX = "CACHEFS_"
_SIZE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": GIB << 10, "tib": GIB << 10, "tb": 10**12,
}  # fmt: skip
_DURATION_UNITS = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
_QUANTITY = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)
_TRUE, _FALSE = frozenset({"true", "yes", "on", "1"}), frozenset({"false", "no", "off", "0"})
_DEFAULT_METAVARS = {"bytes": "SIZE", "duration": "TIME", "octal": "MODE"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one section of `Config`, as people see it."""

    section: str
    field: str
    kind: type[Any]
    default: Any
    help: str
    unit: str
    metavar: str
    hidden: bool
    many: bool = False
    """Given again, it adds to what was given before."""

    @property
    def key(self) -> str:
        """Key in a configuration file, and the option without its dashes: "cache-size"."""
        return re.sub(r"_(bytes|s)$", "", self.field).replace("_", "-")

    @property
    def variable(self) -> str:
        """Environment variable: "CACHEFS_CACHE_SIZE"."""
        return ENVIRONMENT_PREFIX + self.key.replace("-", "_").upper()

    @property
    def is_flag(self) -> bool:
        """Whether the setting is a yes or a no."""
        return self.kind is bool

    @property
    def option(self) -> str:
        """The option as one types it; the source of a mount is an argument instead."""
        if self.field == "source":
            return ""
        return f"--{self.key}/--no-{self.key}" if self.is_flag else f"--{self.key}"


def _collect() -> tuple[Setting, ...]:
    found = []
    for section in dataclasses.fields(Config):
        cls = typing.get_type_hints(Config)[section.name]
        kinds = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            meta = f.metadata
            metavar = meta["metavar"] or _DEFAULT_METAVARS.get(meta["unit"], "")
            found.append(
                Setting(
                    section=section.name,
                    field=f.name,
                    kind=kinds[f.name],
                    default=f.default,
                    help=meta["help"],
                    unit=meta["unit"],
                    metavar=metavar,
                    hidden=meta["hidden"],
                    many=meta["many"],
                )
            )
    return tuple(found)


SETTINGS: tuple[Setting, ...] = _collect()
_BY_NAME: dict[str, Setting] = {name: s for s in SETTINGS for name in (s.field.replace("_", "-"), s.key)}


def choices(setting: Setting) -> list[str]:
    """Return the words that a choice allows, or [] when the setting is no choice."""
    return [str(member.value) for member in setting.kind] if issubclass(setting.kind, enum.Enum) else []


def find_setting(name: str) -> Setting | None:
    """Return the setting called `name` (a field, a key, with dashes or underscores), or None."""
    return _BY_NAME.get(name.replace("_", "-"))


# -- values ----------------------------------------------------------------------------------------


def _quantity(text: str, units: Mapping[str, int | Decimal], example: str) -> Decimal:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"'{text}' is not {example}")
    return Decimal(match[1]) * Decimal(units[match[2].lower()])


def parse_size(text: str) -> int:
    """Read a number of bytes: "50GiB", "64MiB", "1.5GB" (decimal), "512M" (as MiB), "1048576". Raises ValueError."""
    number = _quantity(text, _SIZE_UNITS, "a size such as 50GiB, 64MiB or 1.5GB")
    if number != int(number) and number < KIB:
        raise ValueError(f"'{text}' is not a whole number of bytes")
    return int(number)


def parse_duration(text: str) -> float:
    """Read seconds: "250ms", "60s", "5m", "1h", "7d", "90" or "forever" (infinity). Raises ValueError."""
    if text.strip().lower() == "forever":
        return math.inf
    return float(_quantity(text, _DURATION_UNITS, "a time such as 250ms, 60s, 5m, 1h or forever"))


def parse_octal(text: str) -> int:
    """Read permission bits: "0644" or "0o644". Raises ValueError."""
    if not re.fullmatch(r"(0o)?[0-7]{1,4}", text.strip(), re.ASCII):
        raise ValueError(f"'{text}' is not an octal mode such as 0444")
    return int(text.strip().removeprefix("0o"), 8)


def parse_flag(text: str) -> bool:
    """Read a yes or a no: "true", "yes", "on", "1" and their contraries. Raises ValueError."""
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(f"'{text}' is neither true nor false")
    return word in _TRUE


def _parse_enum(kind: type[enum.Enum], text: str) -> enum.Enum:
    try:
        return kind(text.strip().lower())
    except ValueError:
        raise ValueError(f"'{text}' is not one of: {', '.join(str(member.value) for member in kind)}") from None


def parse(setting: Setting, text: str) -> Any:
    """Read the value that a person wrote for `setting`. Raises ValueError with a message that quotes the text."""
    if "\0" in text:
        raise ValueError("a value cannot contain a NUL byte")
    if setting.unit in _UNIT_PARSERS:
        return _UNIT_PARSERS[setting.unit](text)
    if setting.is_flag:
        return parse_flag(text)
    if issubclass(setting.kind, enum.Enum):
        return _parse_enum(setting.kind, text)
    if setting.kind is int:
        if not re.fullmatch(r"\s*-?\d{1,18}\s*", text, re.ASCII):
            raise ValueError(f"'{text}' is not a whole number")
        return int(text)
    return text


_UNIT_PARSERS: dict[str, Callable[[str], Any]] = {"bytes": parse_size, "duration": parse_duration, "octal": parse_octal}


def parse_typed(setting: Setting, value: object) -> Any:
    """Read a value of a configuration file, which has types of its own. Raises ValueError."""
    if isinstance(value, str):
        return parse(setting, value)
    if setting.many and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return parse(setting, ",".join(value))
    if setting.unit == "octal":
        # 444 without quotes would be read as decimal, and the files would get permissions that nobody asked for
        raise ValueError(f'write the mode as a string, such as {setting.key} = "0444"')
    if isinstance(value, bool):
        if setting.is_flag:
            return value
    elif isinstance(value, int | float) and setting.kind in (int, float) and not math.isnan(value):
        if setting.kind is float:
            return float(value)
        if isinstance(value, int):
            return value
    raise ValueError(f"a {type(value).__name__} cannot be used here")


def render_size(number: int) -> str:
    """Write bytes as the largest binary unit that is exact: 2147483648 -> "2GiB"."""
    for unit, name in ((GIB << 10, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if number and number % unit == 0:
            return f"{number // unit}{name}"
    return str(number)


def render_duration(seconds: float) -> str:
    """Write seconds as people do: 60.0 -> "60s", 0.25 -> "250ms", infinity -> "forever"."""
    if math.isinf(seconds):
        return "forever"
    if 0 < seconds < 1 and float(round(seconds * 1000)) / 1000 == seconds:
        return f"{round(seconds * 1000)}ms"
    for unit, name in ((3600, "h"), (60, "m")):
        if seconds >= 2 * unit and seconds % unit == 0:
            return f"{seconds / unit:.0f}{name}"
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds!r}s"


def render(setting: Setting, value: Any) -> str:
    """Write a value so that `parse` reads the same value back."""
    if setting.unit == "bytes":
        return render_size(value)
    if setting.unit == "duration":
        return render_duration(value)
    if setting.unit == "octal":
        return f"{value:04o}"
    if setting.is_flag:
        return "true" if value else "false"
    return str(value.value) if isinstance(value, enum.Enum) else str(value)
