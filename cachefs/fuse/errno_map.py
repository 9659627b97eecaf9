"""The one place where errors become errno."""

from __future__ import annotations

import errno
import logging

from cachefs import errors

log = logging.getLogger(__name__)

ERRNO: dict[type[errors.CachefsError], int] = {
    errors.NotFound: errno.ENOENT,
    errors.AlreadyExists: errno.EEXIST,
    errors.NotADirectory: errno.ENOTDIR,
    errors.IsADirectory: errno.EISDIR,
    errors.InvalidName: errno.EINVAL,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.ReadOnly: errno.EROFS,
    errors.NoSuchAttribute: errno.ENODATA,
    errors.AccessDenied: errno.EACCES,
    errors.StaleObject: errno.ESTALE,
    errors.Unsupported: errno.EOPNOTSUPP,
    errors.StorageUnavailable: errno.EIO,
    errors.BadBody: errno.EIO,
    errors.StorageFull: errno.EIO,
    errors.BucketNotFound: errno.EIO,
    errors.CredentialsError: errno.EACCES,
    errors.CorruptBlock: errno.EIO,
    errors.TierUnavailable: errno.EIO,
    errors.AgentUnavailable: errno.EIO,
    errors.ProtocolError: errno.EIO,
    errors.ConfigError: errno.EIO,
    errors.MountError: errno.EIO,
}
"""Exact classes; a subclass without an entry takes that of its nearest ancestor."""

QUIET = frozenset({errno.ENOENT, errno.ENODATA, errno.EROFS, errno.EOPNOTSUPP, errno.ENOTDIR, errno.EISDIR})
"""What programs ask for all day: not worth a log line above debug."""


def to_errno(error: BaseException, operation: str) -> int:
    """Return the errno for `error` and log its cause once: expected answers at debug, failures of the store as
    warnings, anything that cachefs did not raise on purpose with its traceback."""
    if isinstance(error, errors.CachefsError):
        code = next((ERRNO[cls] for cls in type(error).__mro__ if cls in ERRNO), errno.EIO)
        level = logging.DEBUG if code in QUIET else logging.WARNING
        log.log(level, "%s: %s (%s: %s)", operation, error, type(error).__name__, errno.errorcode.get(code, str(code)))
        return code
    if isinstance(error, OSError) and error.errno:
        log.warning("%s: %s", operation, error)
        return error.errno
    log.error("%s: unexpected %s", operation, type(error).__name__, exc_info=error)
    return errno.EIO
