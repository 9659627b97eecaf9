"""Attributes as the kernel sees them, from the records of the metadata store and the mount's rules."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import NamedTuple

from cachefs.config import FuseConfig
from cachefs.types import FileKind, Ino
from metadata.records import Dentry, Inode

FOREVER_S = 365 * 86400.0
"""A file's inode names one object version, so what is said of it never changes."""


class Attributes(NamedTuple):
    """stat(2) of one inode. Times in nanoseconds since the epoch, sizes in bytes. (A tuple: listings make millions.)"""

    ino: Ino
    mode: int
    size: int
    mtime_ns: int
    nlink: int
    uid: int
    gid: int

    @property
    def is_directory(self) -> bool:
        """Whether the inode is a directory."""
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class AttributeRules:
    """Owner and permissions of a mount; what an object's own `x-amz-meta-*` says goes before them."""

    uid: int
    gid: int
    file_mode: int
    dir_mode: int

    @classmethod
    def create(cls, config: FuseConfig, uid: int, gid: int) -> AttributeRules:
        """Build the rules from the configuration; `uid` and `gid` are those of the process that mounts."""
        return cls(
            uid=uid if config.uid < 0 else config.uid,
            gid=gid if config.gid < 0 else config.gid,
            file_mode=stat.S_IFREG | (config.file_mode & 0o7777),
            dir_mode=stat.S_IFDIR | (config.dir_mode & 0o7777),
        )

    def of_inode(self, inode: Inode) -> Attributes:
        """Return the attributes of an inode record."""
        directory = inode.kind is FileKind.DIRECTORY
        mode = self.dir_mode if directory else self.file_mode
        if inode.mode is not None:
            mode = stat.S_IFMT(mode) | (inode.mode & 0o7777)
        return Attributes(
            inode.ino,
            mode,
            inode.size,
            inode.mtime_ns,
            1,
            self.uid if inode.uid is None else inode.uid,
            self.gid if inode.gid is None else inode.gid,
        )

    def of_dentry(self, dentry: Dentry, inode: Inode | None = None) -> Attributes:
        """Return the attributes of a directory entry, which carries all that a listing knows; `inode`: of one that has
        attributes of its own, so that a listing says of it what a look-up says.
        """
        if inode is not None:
            return self.of_inode(inode)
        mode = self.dir_mode if dentry.kind is FileKind.DIRECTORY else self.file_mode
        # nlink 1 also for directories: 2 would tell find(1) that a directory has no sub-directories.
        return Attributes(dentry.ino, mode, dentry.size, dentry.mtime_ns, 1, self.uid, self.gid)
