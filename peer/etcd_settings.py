"""Where etcd is and who we are there, as the settings of a person that were checked (`cachefs.cli.load`) say it.

Imports nothing of gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """Where etcd is and who we are there."""

    endpoints: tuple[str, ...]
    """http://HOST[:PORT] or https://HOST[:PORT] (`cachefs.config.split_endpoint`), at least one."""
    cluster: str = "default"
    """Nodes see each other only within one cluster. A part of the names of their records."""
    ca: Path | None = None
    """Whom to trust with https; the certificates of the system by default."""
    cert: Path | None = None
    """With a key, or none."""
    key: Path | None = None
    user: str | None = None
    """With a password file, or none."""
    password_file: Path | None = None
    """Read anew for every session. A line end at its end does not count."""
