"""The socket that the driver listens on: its name, and the file that it is.

Kubelet, the provisioner and the other side-cars meet the driver at a unix socket. TCP is refused: who reaches the
socket may mount and delete, and the rights of the file are the only door there is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from cachefs.errors import ConfigError, MountError

MAX_PATH_BYTES = 107
"""Of the address of a unix socket."""
_CONNECT_S = 2.0


def parse_endpoint(text: str) -> str:
    """Return the absolute path of ``unix:///PATH`` or ``unix:PATH``. Raises ConfigError for anything else."""
    scheme, separator, rest = text.partition(":")
    if not separator or scheme.lower() != "unix":
        raise ConfigError(f"--endpoint {text}: only unix sockets are offered, as in unix:///csi/csi.sock")
    path = rest.removeprefix("//") if rest.startswith("//") else rest
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigError(f"--endpoint {text}: must be an absolute path, as in unix:///csi/csi.sock")
    path = os.path.normpath("/" + path.lstrip("/"))
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"--endpoint {text}: at most {MAX_PATH_BYTES} bytes, which is the limit of unix sockets")
    return path


def clear(path: str) -> None:
    """Make the directory of the socket, and remove what a driver that was killed has left in its place.

    Raises MountError when something else is there, or a driver that answers.
    """
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MountError(f"--endpoint {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise MountError(f"--endpoint {path}: there is something that is no socket; remove it")
    if _answers(path):
        raise MountError(f"--endpoint {path}: another driver listens there; end it first")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove(path: str, inode: int) -> None:
    """Remove the socket if it is still the one with this inode number."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_ino == inode:
            os.unlink(path)


def _answers(path: str) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(path)
        except BlockingIOError:  # its queue is full: somebody listens
            return True
        except OSError:
            return False
        return True
