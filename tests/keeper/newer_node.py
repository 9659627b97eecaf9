"""A node service that says that it is of another version: `python -m tests.keeper.newer_node node ...`"""

from __future__ import annotations

import sys

from cachefs.cli.main import run
from cachefs.keeper import node

if __name__ == "__main__":
    setattr(node, "__version__", "99.0")  # noqa: B010 - it is imported there
    sys.exit(run(sys.argv[1:]))
