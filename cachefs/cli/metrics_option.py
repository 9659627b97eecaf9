"""`--metrics ADDR:PORT`, of the commands that run for long: the agent of a node, and its node service."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachefs.config import CacheConfig

Address = tuple[str, int]


def _parse(_: click.Context, parameter: click.Parameter, text: str | None) -> Address | None:
    from cachefs.exporter.endpoint import parse_listen

    if not text:
        return None
    try:
        return parse_listen(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=parameter) from error


metrics_option = click.option(
    "--metrics",
    metavar="ADDR:PORT",
    envvar="CACHEFS_METRICS",
    callback=_parse,
    help="Serve metrics for Prometheus at http://ADDR:PORT/metrics (:PORT is all addresses). [default: off]",
)
"""Gives the command `metrics`: an `Address`, or None."""


def serving(address: Address | None, cache: CacheConfig, keeper_socket: str = "") -> AbstractContextManager[object]:
    """Return a context in which metrics are served, if that is wanted. Raises UsageError when nothing can listen there.

    `cache`: of the agent that is asked; `keeper_socket`: empty where there is no keeper.
    """
    if address is None:
        return ExitStack()
    return _serving(address, cache, keeper_socket)


@contextmanager
def _serving(address: Address, cache: CacheConfig, keeper_socket: str) -> Iterator[None]:
    from cachefs.exporter.endpoint import Endpoint
    from cachefs.exporter.scrape import Scrape

    endpoint = Endpoint(*address, Scrape(cache, keeper_socket).text)
    endpoint.start()
    try:
        yield
    finally:
        endpoint.close()
