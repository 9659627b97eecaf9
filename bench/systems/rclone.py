"""rclone mount with its full VFS cache (the mode that keeps what was read on the local disk)."""

from __future__ import annotations

from pathlib import Path

from bench.systems.daemon import DaemonSystem
from bench.systems.port import Warmth, program, run


class Rclone(DaemonSystem):
    """`rclone mount --vfs-cache-mode full` of the bucket."""

    name = "rclone"
    label = "rclone, full cache"
    warmth: tuple[Warmth, ...] = (Warmth.DISK,)

    def version(self) -> str:
        """The program's own word."""
        return (
            run([program("rclone"), "version"], environment=self._site.clean_environment()).split()[1].removeprefix("v")
        )

    def mount(self) -> Path:
        """Mount; all settings of the remote go through the environment, no configuration file is read."""
        site = self._site
        environment = site.clean_environment(
            RCLONE_CONFIG="/dev/null",
            RCLONE_S3_PROVIDER="SeaweedFS",
            RCLONE_S3_ENDPOINT=site.endpoint_url,
            RCLONE_S3_REGION=site.region,
            RCLONE_S3_ACCESS_KEY_ID=site.access_key,
            RCLONE_S3_SECRET_ACCESS_KEY=site.secret_key,
        )
        arguments = [program("rclone"), "mount", f":s3:{site.bucket}", str(self._daemon.mountpoint)]
        arguments += ["--vfs-cache-mode", "full", "--cache-dir", str(self._cache), "--read-only"]
        self._daemon.start(arguments, environment)
        return self._daemon.mountpoint
