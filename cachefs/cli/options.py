"""Puts the settings of `cachefs.settings` on the command line: one click option for each.

`config_options` is the decorator for commands; a wrong value is reported with its option. The names of
`cachefs.settings` that commands need come from here too.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from typing import Any

import click

from cachefs.config import Config
from cachefs.settings import (
    ENVIRONMENT_PREFIX,
    SETTINGS,
    Setting,
    choices,
    find_setting,
    parse,
    parse_duration,
    parse_octal,
    parse_size,
    parse_typed,
    render,
    render_duration,
    render_size,
)

__all__ = [
    "CONFIG_PARAMETER",
    "ENVIRONMENT_PREFIX",
    "SETTINGS",
    "Setting",
    "choices",
    "config_options",
    "find_setting",
    "parse",
    "parse_duration",
    "parse_octal",
    "parse_size",
    "parse_typed",
    "render",
    "render_duration",
    "render_size",
]

CONFIG_PARAMETER = "config_file"
"""Name under which a command receives the value of --config."""


def _reader(setting: Setting) -> Callable[[str], Any]:
    """Return what click calls with the text of an option, so that a wrong value is reported with its option."""

    def read(text: str) -> Any:
        try:
            return parse(setting, text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return read


def _help(setting: Setting) -> str:
    if setting.is_flag:
        return f"{setting.help} [default: {'yes' if setting.default else 'no'}]"
    shown = render(setting, setting.default)
    return f"{setting.help} [default: {shown}]" if shown and "(default" not in setting.help else setting.help


def _click_options(setting: Setting) -> Iterable[Callable[[Any], Any]]:
    """Yield the options of one setting. The default is None: what was not typed must not hide file or variable."""
    if setting.is_flag:
        yield click.option(setting.option, setting.field, default=None, help=_help(setting), hidden=setting.hidden)
        return
    words = choices(setting)
    if setting.many:
        yield click.option(
            setting.option,
            setting.field,
            type=_reader(setting),
            metavar=setting.metavar,
            help=_help(setting),
            multiple=True,
            callback=_join,
        )
        return
    yield click.option(
        setting.option,
        setting.field,
        type=_reader(setting),
        metavar=f"[{'|'.join(words)}]" if words else setting.metavar or "TEXT",
        default=None,
        help=_help(setting),
        hidden=setting.hidden,
    )
    if setting.field == "addressing":
        for flag, value in (("--path-style", "path"), ("--virtual-host-style", "virtual")):
            yield click.option(
                flag,
                setting.field,
                flag_value=value,
                type=_reader(setting),
                default=None,
                help=f"The same as --addressing {value}.",
            )


def _join(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> str | None:
    return ",".join(values) if values else None


_Command = typing.TypeVar("_Command", bound=Callable[..., Any])


def config_options(*sections: str) -> Callable[[_Command], _Command]:
    """Return a decorator that adds --config and the options of `sections` ("s3", "cache", ...; none: all) to a command.

    The command receives `config_file` and one keyword argument per field, None where nothing was typed: hand them to
    `cachefs.cli.load.load` as they are.
    """
    known = {section.name for section in dataclasses.fields(Config)}
    assert known.issuperset(sections), f"unknown sections {set(sections) - known}"

    def decorate(command: _Command) -> _Command:
        decorated: Any = command
        for setting in reversed(SETTINGS):
            if setting.option and (not sections or setting.section in sections):
                for option in reversed(list(_click_options(setting))):
                    decorated = option(decorated)
        text = f"TOML file with these options as keys (also ${ENVIRONMENT_PREFIX}CONFIG)."
        decorated = click.option("--config", CONFIG_PARAMETER, metavar="FILE", default=None, help=text)(decorated)
        return typing.cast("_Command", decorated)

    return decorate
