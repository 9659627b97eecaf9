"""Directories, mounts and bind mounts below the keeper's root, by path but without trusting the path.

A path that the keeper is asked for is walked part by part from the root, never through a symbolic link, and never into
a mount of ours: pods write into directories beside the targets, and a mount whose worker is dead would hold up whoever
enters it. What is done then is done to the descriptor that the walk has ended at.

INVARIANT: nothing here waits for a file system of ours. Looking goes through /proc, descriptors are opened with
O_PATH, and unmounting detaches.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Iterator, Mapping

from cachefs.keeper.places import below as prefix_of
from cachefs.mount import mountinfo

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 1024, 32, 4096
_KEPT_FLAGS = {"nosuid": _MS_NOSUID, "nodev": _MS_NODEV, "noexec": _MS_NOEXEC, "noatime": _MS_NOATIME}
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_LEAF = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_WALK = _LEAF | os.O_DIRECTORY
_MAX_LAYERS = 1024
DIRECTORY_MODE = 0o750
"""Of directories that are made: what kubelet makes them with."""


class PathRefused(Exception):
    """A path that must not be touched; the text says why."""


class Occupied(Exception):
    """Something else is mounted there."""


class Ground:
    """The part of the directory tree in which mounts may be made. `root` must be canonical."""

    def __init__(self, root: str, places: str) -> None:
        """`places`: the directory below `root` for mounts of our own; nothing is bound there."""
        self.root = root
        self.places = places

    def place(self, key: str) -> str:
        """Return where the mount of this key belongs."""
        return f"{self.places}/{key}"

    def check_target(self, path: str) -> None:
        """See that something may be bound at this path. Raises PathRefused."""
        self._check(path)
        if path == self.places or path.startswith(f"{self.places}/"):
            raise PathRefused(f"{path} is the keeper's own")

    def _check(self, path: str) -> None:
        if "\0" in path or not path.startswith(prefix_of(self.root)) or os.path.normpath(path) != path:
            raise PathRefused(f"{path!r} is not a plain path below {self.root}")

    # -- walking ------------------------------------------------------------------------------------------------------

    def _above(self, path: str) -> list[str]:
        """Return the directories between the root and `path`. Raises PathRefused."""
        self._check(path)
        parts = path[len(prefix_of(self.root)) :].split("/")[:-1]
        return [prefix_of(self.root) + "/".join(parts[: count + 1]) for count in range(len(parts))]

    def _look(self, *paths: str) -> dict[str, mountinfo.Mount]:
        """Return what is mounted on these paths, and above them: in one look, since on a node of thousands of mounts it
        takes milliseconds. Raises PathRefused.
        """
        return mountinfo.find_mounts([*paths, *(above for path in paths for above in self._above(path))])

    @contextlib.contextmanager
    def parent(
        self, path: str, *, make: bool = False, seen: Mapping[str, mountinfo.Mount] | None = None
    ) -> Iterator[tuple[int, str]]:
        """Give the descriptor of the directory that `path` is in, and its name there. `make`: with what is missing on
        the way; `seen`: what `_look` has found. Raises PathRefused, FileNotFoundError and other OSErrors.
        """
        ancestors = self._above(path)
        seen = self._look(path) if seen is None else seen
        inside = next((above for above in ancestors if above in seen and seen[above].is_cachefs), None)
        if inside is not None:
            raise PathRefused(f"{path} is inside of the mount at {inside}")
        descriptor = os.open(self.root, _WALK)
        try:
            for walked in ancestors:
                below = _step(descriptor, os.path.basename(walked), walked, make=make)
                os.close(descriptor)
                descriptor = below
            yield descriptor, os.path.basename(path)
        finally:
            os.close(descriptor)

    def make_directory(self, path: str) -> None:
        """Make a directory, and those above it, if they are missing. Raises PathRefused, OSError."""
        with self.parent(path, make=True) as (parent, name):
            _make(parent, name, path)

    def remove_directory(self, path: str) -> None:
        """Remove a directory if it is there, empty, and nothing is mounted on it. Raises PathRefused."""
        try:
            with self.parent(path) as (parent, name):
                os.rmdir(name, dir_fd=parent)  # of the file system around it: a mount point is refused unasked
        except OSError:
            pass  # missing, or used: both are for others to deal with

    # -- mounts -------------------------------------------------------------------------------------------------------

    def bind(self, source: str, target: str, *, read_only: bool, over: bool = False) -> None:
        """Bind the mount at `source` to `target`, whose directory is made; `over` what is mounted there. Raises
        PathRefused, Occupied, OSError; then nothing more is mounted than before.
        """
        seen = self._look(source, target)
        mount = seen.get(source)
        if mount is None:
            raise FileNotFoundError(errno.ENOENT, "is not mounted", source)
        with contextlib.ExitStack() as opened:
            parent, name = opened.enter_context(self.parent(target, make=True, seen=seen))
            _make(parent, name, target)
            place = _open(parent, name, target)
            opened.callback(os.close, place)
            if not over and _mount_number(place) != _mount_number(parent):
                raise Occupied(f"something else is mounted on {target}")
            from_parent, from_name = opened.enter_context(self.parent(source, seen=seen))
            origin = _open(from_parent, from_name, source)
            opened.callback(os.close, origin)
            if _mount_number(origin) == _mount_number(from_parent):  # it was unmounted since: this is what was below
                raise FileNotFoundError(errno.ENOENT, "is not mounted", source)
            _mount(_path(origin), _path(place), _MS_BIND)
            if read_only:
                try:
                    bound = _open(parent, name, target)
                    opened.callback(os.close, bound)
                    _make_read_only(bound, mount.options)
                except OSError:
                    _unmount(parent, name)
                    raise

    def bind_part(self, source: str, lost: mountinfo.Mount) -> None:
        """Bind what is at `source`, a file or directory within a mount, over a lost mount, and as that was. It waits
        for the file system: for a child process, which leaves descriptors to its end. Raises PathRefused, OSError.
        """
        with self.parent(lost.mountpoint) as (parent, name):
            place, origin = os.open(name, _LEAF, dir_fd=parent), os.open(source, _LEAF)
            _mount(_path(origin), _path(place), _MS_BIND)
            if lost.read_only:
                _make_read_only(os.open(name, _LEAF, dir_fd=parent), lost.options)

    def detach(self, path: str) -> int:
        """Take away every layer of cachefs on top at this path; returns how many. Raises PathRefused, OSError."""
        layers = 0
        while layers < _MAX_LAYERS:
            seen = self._look(path)
            if path not in seen or not seen[path].is_cachefs:
                break
            with self.parent(path, seen=seen) as (parent, name):
                _unmount(parent, name)
            layers += 1
        return layers


def _step(descriptor: int, part: str, walked: str, *, make: bool) -> int:
    if make:
        _make(descriptor, part, walked)
    return _open(descriptor, part, walked)


def _make(parent: int, name: str, path: str) -> None:
    try:
        os.mkdir(name, DIRECTORY_MODE, dir_fd=parent)
    except FileExistsError:
        pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _open(parent: int, name: str, path: str) -> int:
    try:
        return os.open(name, _WALK, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise PathRefused(f"{path} is a symbolic link or a file, not a directory") from error
        raise OSError(error.errno, error.strerror, path) from error


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _mount_number(descriptor: int) -> int:
    """Return which mount a descriptor is in (as `mount_id` of mountinfo), without asking the file system."""
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
        found = re.search(rb"^mnt_id:\s*(\d+)", file.read(), re.MULTILINE)
    if found is None:
        raise OSError(errno.ENOTSUP, "this kernel does not say in which mount a descriptor is")
    return int(found[1])


def _mount(source: str | None, target: str, flags: int) -> None:
    origin = None if source is None else os.fsencode(source)
    if ctypes.CDLL(None, use_errno=True).mount(origin, os.fsencode(target), None, ctypes.c_ulong(flags), None):
        code = ctypes.get_errno()
        raise OSError(code, f"mount: {os.strerror(code)}")


def _make_read_only(bound: int, options: str) -> None:
    """Make a bind read-only that has these options. A flag that is not repeated would be taken away."""
    flags = sum(flag for word, flag in _KEPT_FLAGS.items() if word in options.split(","))
    _mount(None, _path(bound), _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)


def _unmount(parent: int, name: str) -> None:
    path = f"{_path(parent)}/{name}"
    if ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW):
        code = ctypes.get_errno()
        raise OSError(code, f"umount: {os.strerror(code)}")
