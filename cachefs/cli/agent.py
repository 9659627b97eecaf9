"""`cachefs agent`: the agent of one cache directory in the foreground, as a service manager or a container runs it.

`cachefs mount` starts an agent by itself when none runs, and that one ends when it has been idle; this one stays.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import click

from cachefs.cli.load import load
from cachefs.cli.metrics_option import Address, metrics_option, serving
from cachefs.cli.options import CONFIG_PARAMETER, config_options
from cachefs.logs import configure

log = logging.getLogger(__name__)


@click.command()
@metrics_option
@config_options("cache", "peer", "log")
def agent(metrics: Address | None, **options: Any) -> None:
    """Run the agent of --cache-dir in the foreground until SIGTERM."""
    loaded = load(options, os.environ, options[CONFIG_PARAMETER])
    configure(loaded.config.log, "agent")
    for notice in loaded.notices:
        log.info("%s", notice)

    from cachefs.agent.main import run  # imports trio: not before the options are known to be good

    with serving(metrics, loaded.config.cache):
        run(loaded.config.cache, loaded.config.peer, log_file=loaded.config.log.log_file)
    logging.shutdown()
    os._exit(0)  # threads that still wait for a slow store must not keep a finished agent alive
