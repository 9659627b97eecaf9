"""A node service whose workers are the tiny ones of the supervisor's tests, for tests with very many mounts.

python -m tests.keeper.light_node BEHAVIOUR_DIRECTORY node ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from cachefs.cli.main import run
from cachefs.keeper import children

FAKE_WORKER = Path(__file__).parents[1] / "fuse/fake_worker.py"

if __name__ == "__main__":
    setattr(children, "WORKER_COMMAND", ("-I", "-S", str(FAKE_WORKER), sys.argv[1]))  # noqa: B010 - it is imported there
    sys.exit(run(sys.argv[2:]))
