"""What libfuse hands to Python: thin translations between pyfuse3 and `FileSystem`.

pyfuse3 ends the mount on any exception that is not a FUSEError, so every coroutine here carries `@boundary`, which
maps, logs and counts. Look-up counts are not kept: inode numbers are persistent, an inode can always be described
again from the metadata store, so FORGET has nothing to free.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

import pyfuse3

from cachefs import errors
from cachefs.fuse.dirents import DOTDOT_COOKIE, dots_behind, entry_before
from cachefs.fuse.errno_map import to_errno
from cachefs.fuse.interrupts import DyingCallers
from cachefs.fuse.kernel_names import KernelNames
from cachefs.metrics import FUSE_ERRORS, Counters
from cachefs.types import Ino
from cachefs.vfs.attributes import Attributes
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.virtual import DIRECTORY as VIRTUAL_DIRECTORY
from cachefs.vfs.virtual import VirtualDirectory

log = logging.getLogger(__name__)

DIRECT_HANDLE = 1 << 62
"""In the handle of a file that was opened with O_DIRECT (engine pyfuse3), so that any worker knows it."""
F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])


def boundary(method: F) -> F:
    """Turn whatever an operation raises into the one errno that the kernel gets; count it."""
    name = method.__name__

    @functools.wraps(method)
    async def guarded(self: Operations, *args: Any, **kwargs: Any) -> Any:
        self.requests += 1
        if self.asleep:
            self.on_activity()
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            code = to_errno(error, name)
            if code not in (errno.ENOENT, errno.ENODATA):  # answers, as the counter's description says
                self.counters.add(FUSE_ERRORS.name)
            raise pyfuse3.FUSEError(code) from error

    return cast("F", guarded)


def fill_entry(entry: pyfuse3.EntryAttributes, attributes: Attributes, entry_s: float, attr_s: float) -> None:
    """Write attributes into pyfuse3's structure. Times in seconds valid, sizes in bytes."""
    entry.st_ino = pyfuse3.InodeT(attributes.ino)
    entry.generation = 0
    entry.entry_timeout = entry_s
    entry.attr_timeout = attr_s
    entry.st_mode = pyfuse3.ModeT(attributes.mode)
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_size = attributes.size
    entry.st_blksize = 1 << 20
    entry.st_blocks = -(-attributes.size // 512)
    entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.mtime_ns


class Operations(pyfuse3.Operations):
    """The handlers of one mount. `takeover` is called by the FORGET that the session sends itself (engine pyfuse3)."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: FileSystem, kernel_names: KernelNames, counters: Counters) -> None:
        super().__init__()
        self.filesystem = filesystem
        self.kernel_names = kernel_names
        self.counters = counters
        self.takeover: Callable[[], None] | None = None
        self.callers: DyingCallers | None = None
        """Set with the takeover (engine pyfuse3); the channel watches over its callers itself."""
        self.requests = 0
        self.asleep = False
        """Set by the wake-up guard when it has gone to sleep (engine pyfuse3): the next request wakes it."""
        self.on_activity: Callable[[], None] = lambda: None

    @boundary
    async def lookup(self, parent_inode: Any, name: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        """Answer LOOKUP; a name that does not exist is inode 0, which the kernel remembers for its time."""
        asking = self.filesystem.lookup(Ino(parent_inode), bytes(name))
        try:
            attributes, valid_s = await (asking if self.callers is None else self.callers.wait(ctx.pid, asking))
        except InterruptedError as error:
            raise pyfuse3.FUSEError(errno.EINTR) from error
        entry = pyfuse3.EntryAttributes()
        if attributes is None:
            if valid_s <= 0:
                raise pyfuse3.FUSEError(errno.ENOENT)
            entry.st_ino = pyfuse3.InodeT(0)
            entry.entry_timeout = valid_s
            return entry
        fill_entry(entry, attributes, valid_s, self.filesystem.attributes_s(attributes))
        return entry

    @boundary
    async def getattr(self, inode: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        """Answer GETATTR."""
        attributes, valid_s = self.filesystem.attributes(Ino(inode))
        entry = pyfuse3.EntryAttributes()
        fill_entry(entry, attributes, valid_s, valid_s)
        return entry

    async def forget(self, inode_list: Sequence[Any]) -> None:
        """Nothing to free; the session's own FORGET makes libfuse change over to the device."""
        if self.takeover is not None:
            takeover, self.takeover = self.takeover, None
            takeover()
            self.callers = DyingCallers()

    @boundary
    async def opendir(self, inode: Any, ctx: Any) -> Any:
        """Answer OPENDIR: the handle is the inode."""
        return inode

    @boundary
    async def readdir(self, fh: Any, start_id: int, token: Any) -> None:
        """Answer READDIRPLUS. The cookie of an entry is its inode number (see `cachefs.fuse.dirents`)."""
        filesystem = self.filesystem
        if filesystem.virtual is not None and fh == VIRTUAL_DIRECTORY:
            self._read_virtual_directory(filesystem.virtual, start_id, token)
            return
        dentries = await filesystem.entries(Ino(fh), entry_before(start_id), begun=start_id > 0)
        entry = pyfuse3.EntryAttributes()
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR)
        if start_id <= DOTDOT_COOKIE:
            for cookie, ino, name in dots_behind(start_id, Ino(fh), filesystem.reads.names.inode(Ino(fh))):
                entry.st_ino = pyfuse3.InodeT(ino)
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, cookie):
                    return
        listed_s = filesystem.listed_s(Ino(fh))
        for dentry in dentries:
            attributes, valid_s = filesystem.of_dentry(dentry, listed_s)
            fill_entry(entry, attributes, valid_s, filesystem.attributes_s(attributes))
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(dentry.name), entry, dentry.ino):
                return

    def _read_virtual_directory(self, virtual: VirtualDirectory, start_id: int, token: Any) -> None:
        """Answer READDIRPLUS of `.cachefs`. None of it may be kept: a look-up gives other numbers."""
        entry = pyfuse3.EntryAttributes()
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR)
        if start_id <= DOTDOT_COOKIE:
            for cookie, ino, name in dots_behind(start_id, VIRTUAL_DIRECTORY, None):
                entry.st_ino = pyfuse3.InodeT(ino)
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, cookie):
                    return
        for name, attributes in virtual.entries():
            fill_entry(entry, attributes, 0.0, 0.0)
            behind = attributes.ino > start_id
            if behind and not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, attributes.ino):
                return

    @boundary
    async def releasedir(self, fh: Any) -> None:
        """Answer RELEASEDIR."""

    @boundary
    async def open(self, inode: Any, flags: Any, ctx: Any) -> pyfuse3.FileInfo:
        """Answer OPEN (engine pyfuse3): the handle is the inode (and `DIRECT_HANDLE`), its pages are good for ever."""
        if not VirtualDirectory.has(inode):
            self.filesystem.reads.file(inode)
        if flags & os.O_DIRECT:
            return pyfuse3.FileInfo(fh=inode | DIRECT_HANDLE, keep_cache=True, direct_io=True)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @boundary
    async def read(self, fh: Any, off: int, size: int) -> bytes:
        """Answer READ (engine pyfuse3)."""
        try:
            return await self.filesystem.read(Ino(fh & ~DIRECT_HANDLE), off, size, direct=bool(fh & DIRECT_HANDLE))
        except errors.StaleObject:
            await self.kernel_names.let_go(Ino(fh & ~DIRECT_HANDLE))
            raise

    @boundary
    async def release(self, fh: Any) -> None:
        """Answer RELEASE (engine pyfuse3)."""

    @boundary
    async def flush(self, fh: Any) -> None:
        """Answer FLUSH: there is nothing to write, and ENOSYS tells the kernel never to ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @boundary
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """Answer STATFS."""
        usage = self.filesystem.usage()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = usage.block_size
        answer.f_blocks = usage.total_bytes // usage.block_size
        answer.f_bfree = answer.f_bavail = usage.free_bytes // usage.block_size
        answer.f_files, answer.f_ffree, answer.f_favail = usage.total_files, usage.free_files, usage.free_files
        answer.f_namemax = 255
        return answer

    @boundary
    async def getxattr(self, inode: Any, name: Any, ctx: Any) -> bytes:
        """Answer GETXATTR for `user.cachefs.*`."""
        return await self.filesystem.extended_attribute(Ino(inode), bytes(name))

    @boundary
    async def listxattr(self, inode: Any, ctx: Any) -> Sequence[Any]:
        """Answer LISTXATTR."""
        return self.filesystem.extended_attributes(Ino(inode))

    @boundary
    async def readlink(self, inode: Any, ctx: Any) -> Any:
        """Answer READLINK: a bucket has no symbolic links, `.cachefs` has."""
        virtual = self.filesystem.virtual
        target = None if virtual is None else virtual.target(Ino(inode))
        if target is None:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return target


def _refuse_writes() -> None:
    """Give every operation that changes something the one answer of a read-only file system."""

    def refusal(operation: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def refused(self: Operations, *args: Any, **kwargs: Any) -> Any:
            raise pyfuse3.FUSEError(errno.EROFS)

        refused.__name__ = operation
        refused.__doc__ = f"Answer {operation.upper()}: read-only."
        return refused

    for operation in (
        "setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "write", "create", "setxattr",
        "removexattr",
    ):  # fmt: skip
        setattr(Operations, operation, refusal(operation))


_refuse_writes()
