"""`cachefs agent`: the agent of one cache directory in the foreground, as a service manager or a container runs it.

`cachefs mount` starts an agent by itself when none runs, and that one ends when it has been idle; this one stays.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import click

from cachefs.cli.load import load_config
from cachefs.cli.options import CONFIG_PARAMETER, config_options
from cachefs.logs import configure


@click.command()
@config_options("cache", "log")
def agent(**options: Any) -> None:
    """Run the agent of --cache-dir in the foreground until SIGTERM."""
    config = load_config(options, os.environ, options[CONFIG_PARAMETER])
    configure(config.log, "agent")

    from cachefs.agent.main import run  # imports trio: not before the options are known to be good

    run(config.cache)
    logging.shutdown()
    os._exit(0)  # threads that still wait for a slow store must not keep a finished agent alive
