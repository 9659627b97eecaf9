"""SeaweedFS's own mount. It talks to the filer and the volume servers, not S3: no signatures, no gateway in between."""

from __future__ import annotations

from pathlib import Path

from bench.systems.daemon import DaemonSystem
from bench.systems.port import Warmth, program, run


class SeaweedMount(DaemonSystem):
    """`weed mount` of the bucket's directory on the filer."""

    name = "seaweedfs"
    label = "SeaweedFS mount"
    warmth: tuple[Warmth, ...] = (Warmth.DISK,)

    def version(self) -> str:
        """The program's own word."""
        return run([program("weed"), "version"], environment=self._site.clean_environment()).split()[2]

    def mount(self) -> Path:
        """Mount with a disk cache that holds the data set (the default of 128 MB would not)."""
        site = self._site
        self._cache.mkdir(exist_ok=True)
        capacity_mb = 2 * site.dataset.total_bytes // 1_000_000 + 128
        arguments = [program("weed"), "mount", f"-filer={site.filer_address}", f"-dir={self._daemon.mountpoint}"]
        arguments += [f"-filer.path=/buckets/{site.bucket}", "-readOnly", f"-cacheDir={self._cache}"]
        arguments += [f"-cacheCapacityMB={capacity_mb}", f"-localSocket={site.place('tmp')}/weed-mount.sock"]
        self._daemon.start(arguments, site.clean_environment())
        return self._daemon.mountpoint
