"""Where the metadata of a volume lies when the cache directory cannot be written, and how it gets there and back.

An agent that finds its cache directory full or read-only keeps metadata in the tmpfs (the REFUGE) instead of its
HOME. Mounts that are still there hold inode numbers of the old environment, so the environment moves as a whole:

* to the refuge: a copy is made, and the one at home stays as it is (it may be on a disk that cannot be written)
* back home: a copy is made, what was left at home is set aside, and the refuge is emptied

INVARIANT: what is in the refuge is newer than what is at home, so it is removed as soon as the home is used again. A
copy appears under its name only when it is whole: after kill -9 in the middle the next agent copies again.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from cachefs import runtime
from cachefs.errors import StorageUnavailable
from metadata import custody, environment
from metadata.volume import VolumeIdentity

_log = logging.getLogger(__name__)

TRIES = 2


@dataclass(frozen=True, slots=True)
class Places:
    """The directories that hold the environments of all volumes, each in a directory of its own."""

    home: Path
    refuge: Path
    at_home: bool
    """The home can be written."""

    @property
    def in_use(self) -> Path:
        """The one where new environments are made."""
        return self.home if self.at_home else self.refuge

    def settle(self, name: str, identity: VolumeIdentity, boot_id: str | None = None) -> str:
        """Bring the environment `name` to where it can be written, if it is elsewhere; return where it is now. BLOCKS.

        Nobody may have it open for writing. Never raises: an environment that cannot be moved begins anew, and one that
        finds no room at home stays in the refuge.
        """
        try:
            return self._settle(name, identity, boot_id or custody.current_boot_id())
        except OSError as error:
            _log.warning("metadata of volume %s cannot be moved: %s", name, error)
            return str(self.in_use / name)

    def begin_in_refuge(self, name: str) -> str:
        """Return where a new environment can be begun whose home is full; what is left of a try there is removed.

        Raises StorageUnavailable when the refuge cannot be used.
        """
        shutil.rmtree(self.home / name, ignore_errors=True)
        try:
            runtime.own_directory(self.refuge.parent)
            runtime.own_directory(self.refuge)
        except OSError as error:
            raise StorageUnavailable(f"no metadata can be kept in {self.home} or {self.refuge}: {error}") from error
        _log.warning("no room for metadata in %s: that of a new volume begins in %s", self.home, self.refuge)
        return str(self.refuge / name)

    def _settle(self, name: str, identity: VolumeIdentity, boot_id: str) -> str:
        home, refuge = str(self.home / name), str(self.refuge / name)
        if not self.at_home:
            if custody.occupied(home) and not custody.occupied(refuge):
                _move(home, refuge, identity, boot_id)
            return refuge
        ours = custody.private(str(self.refuge.parent)) and custody.private(str(self.refuge))
        if ours and custody.occupied(refuge):
            if not _move(refuge, home, identity, boot_id):
                return refuge
            shutil.rmtree(refuge, ignore_errors=True)
        return home


def _move(source: str, target: str, identity: VolumeIdentity, boot_id: str) -> bool:
    """Put a copy of `source` in the place of `target`. Returns False when it cannot be written there now; a source that
    cannot be used counts as moved, and leaves nothing at `target` that could be taken for its copy.
    """
    moved = False
    try:
        coming = _copy(source, target, identity, boot_id)
        if custody.occupied(target):
            custody.set_aside(target)
        if coming is not None:
            coming.rename(target)
            _log.info("the metadata in %s goes on in %s", source, target)
        moved = True
    except environment.NoRoom:
        _log.warning("metadata in %s finds no room in %s", source, Path(target).parent)
    except (StorageUnavailable, OSError) as error:
        _log.warning("metadata stays in %s: %s", source, error)
    for attempt in _attempts(target):
        shutil.rmtree(attempt, ignore_errors=True)
    return moved


def _copy(source: str, target: str, identity: VolumeIdentity, boot_id: str) -> Path | None:
    """Make a copy beside `target`; None: the source cannot be used. Raises NoRoom, StorageUnavailable, OSError.

    A directory that is there already is an attempt in which an agent died. It may have died of the source (a memory
    map of a damaged file), and so would every agent after it: so there are only `TRIES` attempts.
    """
    attempt = next((path for path in _attempts(target) if not path.exists()), None)
    try:
        if attempt is None:
            raise environment.Untrusted(f"agents died {TRIES} times while they copied it")
        attempt.mkdir(mode=0o700, parents=True)
        environment.copy(source, str(attempt / "copy"), identity, boot_id)
        return attempt / "copy"
    except environment.Untrusted as reason:
        _log.warning("metadata in %s is not used: %s", source, reason)
        return None


def _attempts(target: str) -> list[Path]:
    return [Path(f"{target}.coming-{number}") for number in range(1, TRIES + 1)]
