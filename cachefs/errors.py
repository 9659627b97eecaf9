"""Every error that cachefs raises on purpose.

Layers raise these, never an errno: `cachefs.fuse.errno_map` is the one place that turns them into errno. Foreign
exceptions (obstore, botocore, lmdb, OSError) are translated where they enter, with ``raise ... from``. Messages name
the key or the path and say what to do where somebody can do something.
"""

from __future__ import annotations


class CachefsError(Exception):
    """Base of all errors raised on purpose."""


# -- what a file system can say
# -----------------------------------------------------------------------------------------


class NotFound(CachefsError):
    """The name or the object does not exist (ENOENT)."""


class AlreadyExists(CachefsError):
    """There is one of this name already (EEXIST)."""


class NotADirectory(CachefsError):
    """ENOTDIR."""


class IsADirectory(CachefsError):
    """EISDIR."""


class InvalidName(CachefsError):
    """The name cannot exist in this file system (EINVAL)."""


class NameTooLong(CachefsError):
    """Over 255 bytes (ENAMETOOLONG)."""


class ReadOnly(CachefsError):
    """The mount or the operation is read-only (EROFS)."""


class NoSuchAttribute(CachefsError):
    """The extended attribute does not exist (ENODATA)."""


class AccessDenied(CachefsError):
    """The store refused the credentials for this object (EACCES)."""


class StaleObject(CachefsError):
    """The object version of an open file is gone from the store and the wanted bytes are not cached (ESTALE)."""


class Unsupported(CachefsError):
    """The operation is not offered (ENOTSUP)."""


# -- infrastructure
# -----------------------------------------------------------------------------------------------------


class StorageUnavailable(CachefsError):
    """The store did not give a usable answer in time (EIO). `retryable` says whether another try can help."""

    def __init__(
        self, message: str, *, retryable: bool = True, retry_after_s: float | None = None, throttled: bool = False
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        """What the server asked for in Retry-After, if it did."""
        self.throttled = throttled
        """True for 503 SlowDown and 429: the sender should lower its concurrency."""


class BadBody(StorageUnavailable):
    """The store sent fewer or more bytes than asked for, or of another version: an error, never data (EIO)."""


class StorageFull(StorageUnavailable):
    """The store has no room for what was to be written, or a quota of the bucket is reached (EIO)."""


class BucketNotFound(CachefsError):
    """The bucket does not exist, or its name belongs to somebody else (ENOENT at mount time)."""


class CredentialsError(CachefsError):
    """No credentials were found, or the store does not know them (EACCES)."""


class CorruptBlock(CachefsError):
    """A cached block failed its check. Raised and caught inside the block cache: readers see a miss, never this."""


class TierUnavailable(CachefsError):
    """A cache tier cannot take or give blocks now (full, read-only, gone). Always handled as a miss."""


class AgentUnavailable(CachefsError):
    """The node's agent cannot be reached or started (EIO after the deadline)."""


class ProtocolError(CachefsError):
    """A message between worker and agent does not follow the protocol."""


# -- what a person typed
# ------------------------------------------------------------------------------------------------


class UsageError(CachefsError):
    """Bad option, bad configuration file, bad argument: exit code 2."""


class ConfigError(UsageError):
    """A configuration value cannot be used."""


class MountError(CachefsError):
    """The mount cannot be made or taken away: exit code 1."""
