"""s3fs-fuse with its file cache (`use_cache`), from the distribution's package."""

from __future__ import annotations

from pathlib import Path

from bench.systems.daemon import DaemonSystem
from bench.systems.port import Warmth, program, run


class S3FS(DaemonSystem):
    """`s3fs BUCKET DIR -o use_cache=...`."""

    name = "s3fs"
    label = "s3fs, file cache"
    warmth: tuple[Warmth, ...] = (Warmth.DISK,)

    def version(self) -> str:
        """The program's own word."""
        words = run([program("s3fs"), "--version"], environment=self._site.clean_environment()).split()
        return words[words.index("System") + 1].removeprefix("V")

    def mount(self) -> Path:
        """Mount; the keys go through a file that only we can read."""
        site = self._site
        self._cache.mkdir(exist_ok=True)
        secrets = site.place("s3fs") / "passwd"
        secrets.touch(mode=0o600)
        secrets.write_text(f"{site.access_key}:{site.secret_key}\n")
        options = [f"url={site.endpoint_url}", "use_path_request_style", f"endpoint={site.region}"]
        options += [f"passwd_file={secrets}", f"use_cache={self._cache}", f"tmpdir={site.place('tmp')}"]
        arguments = [program("s3fs"), site.bucket, str(self._daemon.mountpoint), "-f", "-o", ",".join(options)]
        environment = site.clean_environment()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.pop(name, None)  # it refuses to have both a file and the variables
        self._daemon.start(arguments, environment)
        return self._daemon.mountpoint
