"""The keeper's process: `python -m cachefs.keeper`, which is what `cachefs keeper` becomes.

Standard library only, like everything that it imports: it lives as long as the node, and its memory is counted in
single MiB.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence

from cachefs.keeper.binds import Ground
from cachefs.keeper.keeper import Keeper
from cachefs.keeper.places import own_places
from cachefs.mount import kernel
from cachefs.mount.journal import LEVELS, Journal
from cachefs.mount.loop import Loop
from cachefs.runtime import NotOurs, own_directory

DRIVER = "cachefs.csi.k8s.io"
CLAIM_S = 3.0
"""How long the keeper before this one may take to end."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"cachefs: {message} (see 'cachefs keeper --help')\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Exits with 2 when it cannot be used."""
    parser = _Parser(
        prog="cachefs keeper", description="Keep the mounts of this node: make them, hold them, bind them.",
    )  # fmt: skip
    parser.add_argument(
        "--runtime-dir", default="/run/cachefs", metavar="DIR", help="where keeper.sock is made (%(default)s)"
    )
    parser.add_argument(
        "--root", default="/var/lib/kubelet", metavar="DIR", help="nothing is mounted outside of it (%(default)s)"
    )
    parser.add_argument(
        "--node-uid", type=int, default=os.geteuid(), metavar="UID", help="user of the node service (%(default)s)"
    )
    parser.add_argument(
        "--driver-name", default=DRIVER, metavar="NAME", help="part of the path of mounts (%(default)s)"
    )
    parser.add_argument("--log-level", default="info", choices=LEVELS, help="(%(default)s)")
    parser.add_argument("--log-format", default="text", choices=("text", "json"), help="(%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep mounts until SIGTERM, which leaves all of them as they are."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    journal = Journal(options.log_level, options.log_format == "json", "keeper", "cachefs.keeper")
    os.umask(0o077)
    loop = Loop(journal)
    try:
        ground = _prepare(options)
        loop.catch_signals((signal.SIGTERM, signal.SIGINT), lambda _: loop.stop())
        keeper = Keeper(os.path.realpath(options.runtime_dir), ground, options.node_uid, loop, journal)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"cachefs: {where}{error.strerror or error}", file=sys.stderr)  # noqa: T201 - a command's last words
        return 1
    os.chdir("/")
    for number in (signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    journal.info(f"keeping mounts below {ground.root}, listening at {options.runtime_dir}/keeper.sock")
    loop.run()
    keeper.close()
    journal.info("the keeper ends; all mounts stay")
    return 0


def _prepare(options: argparse.Namespace) -> Ground:
    """Check the rights and make the directories. Raises OSError with a text for a person."""
    kernel.check_rights()
    if not kernel.may_mount():
        raise PermissionError("the keeper needs the right to mount (CAP_SYS_ADMIN): run it as root, or privileged")
    root = os.path.realpath(options.root)
    if not os.path.isdir(root):
        raise NotADirectoryError(f"--root {options.root}: there is no such directory")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # five descriptors for each mount
    try:
        own_directory(options.runtime_dir)
        os.chmod(options.runtime_dir, 0o755)  # noqa: S103 - others have to reach the socket
        _claim(os.path.join(options.runtime_dir, "keeper.lock"))
        _make_node_directory(os.path.join(options.runtime_dir, "node"), options.node_uid)
    except NotOurs as error:
        raise NotOurs(f"{error}: choose another --runtime-dir") from error
    return Ground(root, own_places(root, options.driver_name))


def _claim(path: str) -> None:
    """Become the only keeper here, for as long as this process lives: two would replace each other's workers for ever.
    Raises OSError when another one does not end soon.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + CLAIM_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise BlockingIOError(f"another keeper is running here: it holds {path}") from error
        time.sleep(0.05)


def _make_node_directory(path: str, uid: int) -> None:
    """Make the runtime directory of the node service, which may not write beside it."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    if os.path.islink(path) or not os.path.isdir(path):
        raise NotOurs(f"{path} is not a directory")
    if os.stat(path).st_uid != uid:
        os.chown(path, uid, -1, follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
