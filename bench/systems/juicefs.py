"""JuiceFS, twice on one volume: with its disk cache and with its memory cache.

It stores files in its own format, so the data set is copied in through a mount of its own. Usage reports, metadata
backups and syslog are off; everything else is as installed, and its caches hold the data set by default.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.systems.daemon import DaemonSystem
from bench.systems.port import Site, Warmth, program, run

_VOLUME = "bench"
_BUCKET = "juicefs-bench"
_COPY_THREADS = 16


class JuiceFS(DaemonSystem):
    """One kind of cache over the shared volume."""

    def __init__(self, site: Site, warmth: Warmth) -> None:
        self.warmth: tuple[Warmth, ...] = (warmth,)
        self.name = "juicefs" if warmth is Warmth.DISK else "juicefs-memory"
        self.label = f"JuiceFS, {'disk' if warmth is Warmth.DISK else 'memory'} cache"
        super().__init__(site)
        self._database = site.place("juicefs") / "metadata.db"
        self._cache = site.work / self.name / "cache"

    def version(self) -> str:
        """The program's own word."""
        return (
            run([program("juicefs"), "version"], environment=self._site.clean_environment())
            .split("version ")[-1]
            .strip()
        )

    def prepare(self) -> str | None:
        """Format the volume and copy the data set in, once for both kinds of cache."""
        if self._database.exists():
            return _BUCKET
        site = self._site
        arguments = [program("juicefs"), "format", self._address, _VOLUME, "--storage", "s3"]
        arguments += ["--bucket", f"{site.endpoint_url}/{_BUCKET}"]
        arguments += ["--access-key", site.access_key, "--secret-key", site.secret_key]
        run(arguments, environment=site.clean_environment())
        try:
            self._copy_in(self.mount())
        finally:
            self.umount()
            self.reset()
        return _BUCKET

    @property
    def _address(self) -> str:
        return f"sqlite3://{self._database}"

    def _copy_in(self, directory: Path) -> None:
        dataset = self._site.dataset
        names = list(dataset.names())
        for parent in {Path(name).parent for name in names}:
            (directory / parent).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_COPY_THREADS) as pool:
            for _ in pool.map(lambda name: shutil.copyfile(dataset.root / name, directory / name), names):
                pass

    def mount(self) -> Path:
        """Mount with this kind of cache."""
        where = "memory" if Warmth.SHM in self.warmth else str(self._cache)
        arguments = [program("juicefs"), "mount", self._address, str(self._daemon.mountpoint)]
        arguments += ["--cache-dir", where, "--no-usage-report", "--no-syslog", "--backup-meta", "0"]
        arguments += ["--metrics", "127.0.0.1:0"]
        self._daemon.start(arguments, self._site.clean_environment())
        return self._daemon.mountpoint
