"""A store whose names come from a manifest: what a mount with `--manifest` sees, whatever happens to the bucket.

    list_page, head ------- the manifest, a file of the node: no request, no permit, no retry
    get_range, read_into,
    get_many, wire -------- the bucket, as ever: If-Match with the entity tag that the manifest says

The manifest is an object of the same bucket. `open_pinned` brings it into the cache directory once; the next mount asks
only whether it is still the same (HEAD), and an agent that comes back for mounts which are there asks nothing. A file
for each entity tag: a manifest that is replaced is another volume, and mounts of the old one go on.

An object that was overwritten or deleted since cannot be read any more (StaleObject); all others can.

INVARIANT: the file of a `ManifestStore` was verified when it was opened, and is never written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from cachefs.config import S3Config
from cachefs.errors import ConfigError, NotFound, StorageUnavailable, UsageError
from cachefs.store.manifest import Manifest
from cachefs.store.port import ListPage, ObjectInfo, ObjectStore
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.store.source import parse_source
from cachefs.types import ObjectVersion

log = logging.getLogger(__name__)

KEPT_S = 90 * 86400.0
"""Files of manifests that nobody has opened for so long are removed."""
_COMING, _COMING_S = ".coming", 3600.0
"""The end of the name of a file that is on its way, and after how long it is not any more."""
_PIECE = 8 << 20


class ManifestStore(RetryingStore):
    """See the module. Takes over the manifest, and closes it."""

    def __init__(
        self,
        inner: ObjectStore,
        manifest: Manifest,
        pinned_by: ObjectVersion,
        policy: RetryPolicy | None = None,
        *,
        max_requests: int = 32,
    ) -> None:
        """`pinned_by`: the manifest as an object."""
        super().__init__(inner, policy, max_requests=max_requests)
        self.manifest = manifest
        self.pinned_by = pinned_by
        self.view = f"{pinned_by.key}\0{pinned_by.etag}"

    def check(self, prefix: str) -> None:
        """Prove that the bucket may be read: the manifest is still there. Raises as `ObjectStore.check`."""
        self._once("head", lambda: self.inner.head(self.pinned_by.key), self.policy.deadline_s)

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`; no user metadata."""
        found = self.manifest.find(key)
        if found is None:
            raise NotFound(f"no object {key!r} in the manifest {self.pinned_by.key!r}")
        return found

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""
        return self.manifest.list_page(prefix, delimiter=delimiter, token=token, limit=limit)

    def close(self) -> None:
        """See `RetryingStore.close`."""
        super().close()
        self.manifest.close()


def open_pinned(config: S3Config, environment: Mapping[str, str], directory: Path, *, ask: bool) -> ManifestStore:
    """Open the source as the manifest `config.manifest` has it; files of manifests are kept in `directory`. BLOCKS.

    With `ask` the bucket says which version of the manifest there is now; without, the one that was opened last will
    do, and nothing is asked if it is there. Raises ConfigError when the manifest is missing, damaged or of something
    else, UsageError for other sources than s3://, and what reading an object raises.
    """
    source = parse_source(config.source)
    if source.scheme != "s3":
        raise UsageError(f"{config.source!r}: only a bucket (s3://) can be mounted by a --manifest")
    from cachefs.store.s3 import S3Store

    policy = RetryPolicy(deadline_s=config.io_timeout_s)
    with contextlib.ExitStack() as opened:
        inner = S3Store(config, environment)
        opened.callback(inner.close)
        reader = RetryingStore(inner, policy, max_requests=config.max_requests)
        manifest, version = _Files(directory, reader, config.manifest).bring(ask=ask)
        opened.callback(manifest.close)
        _require_fit(manifest, source.bucket, source.prefix)
        opened.pop_all()
    log.info("%s: %d objects as %s has them", config.source, manifest.summary.objects, config.manifest)
    return ManifestStore(inner, manifest, version, policy, max_requests=config.max_requests)


def _require_fit(manifest: Manifest, bucket: str, prefix: str) -> None:
    header = manifest.summary.header
    if header.bucket != bucket:
        raise ConfigError(f"{manifest.name} is of the bucket {header.bucket!r}")
    if not prefix.startswith(header.prefix) and not header.prefix.startswith(prefix):
        raise ConfigError(f"{manifest.name} is of {header.prefix!r}: there is nothing of {prefix!r} in it")


class _Files:
    """The files of one manifest: <hash of where it is>.<entity tag>, each a copy of the object, byte by byte."""

    def __init__(self, directory: Path, store: RetryingStore, key: str) -> None:
        self._directory = directory
        self._store = store
        self._key = key
        where = f"{store.endpoint}\0{store.bucket}\0{key}".encode("utf-8", "surrogateescape")
        self._base = hashlib.sha256(where).hexdigest()[:32]

    def bring(self, *, ask: bool) -> tuple[Manifest, ObjectVersion]:
        """Return the manifest, open, and which version of the object it is."""
        for path in () if ask else self._known():
            with contextlib.suppress(ConfigError, OSError):
                return self._opened(path), self._version_of(path)
        try:
            # Not tried again when somebody mounts: a person waits, and wants to know what is wrong now.
            version = (self._store.inner if ask else self._store).head(self._key).version
        except NotFound as error:
            raise ConfigError(f"{self._name}: there is no such object") from error
        path = self._directory / f"{self._base}.{urllib.parse.quote(version.etag, safe='')}"
        with contextlib.suppress(ConfigError, OSError):
            return self._opened(path), version
        try:
            self._download(version, path)
            self._prune()
            return self._opened(path), version
        except OSError as error:
            text = f"{self._name} cannot be kept in {self._directory}: {error.strerror}"
            raise StorageUnavailable(text, retryable=False) from error

    @property
    def _name(self) -> str:
        return f"the manifest {self._key!r} in bucket {self._store.bucket!r}"

    def _opened(self, path: Path) -> Manifest:
        manifest = Manifest(path, self._name)
        with contextlib.suppress(OSError):
            os.utime(path)  # its last use
        return manifest

    def _known(self) -> list[Path]:
        """Return the files of this manifest that are there, the one that was used last first."""
        try:
            found = [path for path in self._directory.iterdir() if path.name.startswith(f"{self._base}.")]
            return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
        except OSError:
            return []

    def _version_of(self, path: Path) -> ObjectVersion:
        etag = urllib.parse.unquote(path.name[len(self._base) + 1 :])
        return ObjectVersion(self._key, etag, path.stat().st_size)

    def _download(self, version: ObjectVersion, path: Path) -> None:
        """Bring the object, piece by piece, all of one version. Raises OSError; StaleObject when it is replaced."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        descriptor, coming = tempfile.mkstemp(dir=self._directory, prefix=".", suffix=_COMING)
        try:
            with open(descriptor, "wb") as file:
                for start in range(0, version.size, _PIECE):
                    file.write(self._store.get_range(version, start, min(_PIECE, version.size - start)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(coming, path)  # also what was there and could not be opened
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(coming)
            raise

    def _prune(self) -> None:
        """Remove what was not used for long, and what was left behind by a process that was killed."""
        oldest = time.time() - KEPT_S
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError):
                age_limit = time.time() - _COMING_S if path.name.endswith(_COMING) else oldest
                if path.stat().st_mtime < age_limit:
                    path.unlink()
