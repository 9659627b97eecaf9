"""What will be read next in one volume: all detectors together, nearest first.

    files begun --> Folder of each directory (order, shuffle) --> Branch above it (tree of class folders)
                 |  Shards (numbers in names)                     |
                 +> Replay (the order of the last epoch)          v
                                                 `wanted`: Wish, Wish, ... as long as somebody takes them

Order of the wishes: the former epoch's order, what lies ahead of readers who go in order (also in the directories that
follow on theirs), numbered shards, the rest of shuffled directories, the rest of shuffled trees.

Names are wanted before bytes: a directory that is read in order has the next ones listed while its end is not reached.

INVARIANT: bounded: `FOLDERS` directories, those that were used longest ago go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cachefs.prefetch.branch import Branch
from cachefs.prefetch.folder import Folder
from cachefs.prefetch.plan import Plan
from cachefs.prefetch.ports import Tree
from cachefs.prefetch.replay import Replay
from cachefs.prefetch.shards import Shards
from cachefs.prefetch.streams import FIRST_AHEAD, Stream
from cachefs.types import Ino

FOLDERS = 2048
ACTIVE = 32
"""Directories whose streams are asked: those that were read last."""
LEVELS = 3
"""How far up a tree is seen as one."""
UNLISTED = 16
"""So many files begun in a directory that was never listed are worth a listing."""
DIRECTORIES_AHEAD = 64
"""How many directories a stream may go on into."""
EVIDENCE = 8
"""Files in order before it goes on into the next directory."""
LARGE_AHEAD = 4
"""How many large files are begun ahead: it is their heads that are wanted."""
TURN = 8
"""Files that one directory wants before the next one has its turn."""
OF_EACH = 64
"""Files of each directory that is wanted because directories are gone to in an order."""
UNLISTED_AT_ONCE = 8
BRANCHES = 8
"""Trees that are looked at: those that were read last."""
LARGE_BYTES = 8 << 20
"""Of larger files only the head (or the tail) is wanted ahead: then the readahead within the file takes over."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wish:
    """A file that will be wanted."""

    ino: Ino
    rest: bool
    """There is no order: it will be wanted, nobody knows when."""
    from_tail: bool
    """Its end will be read first."""


class Planner:
    """The detectors of one volume. Fed with `note`; gives `wanted`."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._folders: OrderedDict[Ino, Folder] = OrderedDict()
        self._active: OrderedDict[Ino, Folder] = OrderedDict()
        """Those in which files were begun lately."""
        self._branches: OrderedDict[Ino, Branch] = OrderedDict()
        self._shards: OrderedDict[Ino, Shards] = OrderedDict()
        self._replay = Replay()
        self.plan: Plan | None = None
        """What a job has said it will read: known better than anything that is guessed."""
        self._unlisted: OrderedDict[Ino, int] = OrderedDict()
        self._lists: OrderedDict[Ino, None] = OrderedDict()
        self._asked: OrderedDict[Ino, int] = OrderedDict()
        """Which of its listings was too old when another was asked for (0: there was none)."""

    # -- what is read --------------------------------------------------------------------------------------------------

    def note(self, ino: Ino, *, at_tail: bool = False, proposed: bool = False) -> None:
        """A reader began a file. `proposed`: it had been brought, or was on its way, because of a wish."""
        above = self._tree.parent(ino)
        if above is None:
            return
        directory, name = above
        if self.plan is not None and (version := self._tree.version(ino)) is not None:
            self.plan.note(version[0])
        self._replay.note(ino, proposed=proposed)
        if self._tree.listed(directory) is None:
            self._note_unlisted(directory)
        folder = self._active[directory] = self._folder(directory)
        self._active.move_to_end(directory)
        if len(self._active) > ACTIVE:
            self._active.popitem(last=False)
        epochs = folder.epochs
        if folder.note(self._tree, ino, at_tail=at_tail):
            epoch = folder.epochs if folder.epochs > epochs else 0
            if not folder.repetitive:
                self._climb(directory, epoch=epoch, proposed=proposed, orderly=folder.orderly)
        _kept(self._shards, directory, Shards).note(name, proposed=proposed)

    def _note_unlisted(self, directory: Ino) -> None:
        count = self._unlisted.pop(directory, 0) + 1
        self._unlisted[directory] = count
        if len(self._unlisted) > FOLDERS:
            self._unlisted.popitem(last=False)
        if count == UNLISTED:
            self._want_listing(directory)

    def _climb(self, directory: Ino, *, epoch: int, proposed: bool, orderly: bool) -> None:
        """Tell the directories above that there was a reader below them. `epoch`: the one that began with it, or 0."""
        child = directory
        for _ in range(LEVELS):
            above = self._tree.parent(child)
            if above is None:
                return
            branch = self._branch(above[0])
            new_epoch = epoch > branch.epochs  # else it is one that began elsewhere in the tree before
            branch.note(self._tree, child, new_epoch=new_epoch, proposed=proposed, orderly=orderly)
            if branch.scattered:
                return  # that explains it: what lies beside the tree is something else
            child = above[0]

    def _folder(self, directory: Ino) -> Folder:
        return _kept(self._folders, directory, lambda: Folder(directory))

    def _branch(self, directory: Ino) -> Branch:
        return _kept(self._branches, directory, lambda: Branch(directory))

    # -- names ---------------------------------------------------------------------------------------------------------

    def take_listing(self) -> Ino | None:
        """Return a directory whose listing is wanted (each once until it is another listing), None when there is
        none.
        """
        return self._lists.popitem(last=False)[0] if self._lists else None

    def _want_listing(self, directory: Ino) -> bool:
        """Have a directory listed, if that is not known any more; returns whether it was, once."""
        listed = self._tree.listed(directory)
        known = listed is not None and listed.complete
        if listed is not None and listed.complete and listed.fresh:
            return True
        generation = 0 if listed is None else listed.generation
        if self._asked.get(directory) != generation:
            self._asked[directory] = generation
            self._lists[directory] = None
            if len(self._asked) > FOLDERS:
                self._lists.pop(self._asked.popitem(last=False)[0], None)
        return known

    # -- what is wanted ------------------------------------------------------------------------------------------------

    def ordered(self) -> Iterator[Wish]:
        """Give what readers who go in order will want, nearest first."""
        while self.plan is not None and (planned := self.plan.propose()) is not None:
            yield Wish(planned, rest=False, from_tail=False)
        for ino in self._replay.wanted():
            if self._claim(ino):
                yield Wish(ino, rest=False, from_tail=False)
        active = list(reversed(self._active.values()))
        turns = [self._of_folder(folder) for folder in active if not folder.aimless and folder.streams.trusted()]
        while turns:
            left = []
            for turn in turns:
                for _ in range(TURN):
                    wish = next(turn, None)
                    if wish is None:
                        break
                    yield wish
                else:
                    left.append(turn)
            turns = left
        yield from self._of_shards([folder.directory for folder in active])
        for branch in list(reversed(self._branches.values()))[:BRANCHES]:
            for stream in branch.streams.trusted():
                yield from self._of_directories(branch, stream)

    def _of_directories(self, branch: Branch, stream: Stream) -> Iterator[Wish]:
        """Give the files of the directories that readers will go to next."""
        while (child := branch.next_of(self._tree, stream)) is not None:
            directory = self._first_below(child)
            if not self._want_listing(directory):
                return
            stream.advance()
            folder = self._folder(directory)
            if not folder.read:
                folder.inherited = folder.inherited or FIRST_AHEAD
            for _ in range(OF_EACH):
                ino = folder.next_of_rest(self._tree)
                if ino is None:
                    break
                yield Wish(ino, rest=False, from_tail=folder.from_tail)

    def _of_folder(self, folder: Folder) -> Iterator[Wish]:
        self._want_listing(folder.directory)
        for stream in folder.streams.trusted():
            while (ino := folder.next_of(self._tree, stream)) is not None:
                self._hold_back(stream, ino)
                yield Wish(ino, rest=False, from_tail=folder.from_tail)
            beyond = folder.beyond(stream)
            if beyond and stream.followed != stream.end and self._goes_on(folder):
                known = yield from self._of_followers(folder.directory, beyond, stream.ahead)
                stream.followed = stream.end if known else None

    def _goes_on(self, folder: Folder) -> bool:
        """Whether who reads a directory in order will go on into the next one."""
        return not folder.scattered and folder.read >= min(EVIDENCE, len(folder.roster.files))

    def _hold_back(self, stream: Stream, ino: Ino) -> None:
        """Of large files only a few are begun ahead."""
        if self._is_large(ino):
            stream.ahead = min(stream.ahead, LARGE_AHEAD)

    def _is_large(self, ino: Ino) -> bool:
        version = self._tree.version(ino)
        return version is not None and is_large(version[1].size)

    def _of_followers(self, directory: Ino, count: int, ahead: int) -> Generator[Wish, None, bool]:
        """Go on into the directories behind one that is read in order, as far as `count` files. Returns whether all of
        their names were known.
        """
        for _ in range(DIRECTORIES_AHEAD):
            following = self._following(directory)
            if following is None:
                break
            directory = following
            folder = self._folder(directory)
            of_another = folder.read > 0 and not folder.follows  # who is there already has a stream of his own
            folder.follows = not of_another
            if not folder.read:
                folder.inherited = max(FIRST_AHEAD, ahead)
            if not self._want_listing(directory):
                return False
            if of_another and not folder.roster.complete:
                break
            drawn = 0
            while drawn < count and not of_another and (ino := folder.next_of_rest(self._tree)) is not None:
                drawn += 1
                if self._is_large(ino):
                    count = min(count, LARGE_AHEAD)
                yield Wish(ino, rest=False, from_tail=folder.from_tail)
            count -= max(drawn, len(folder.roster.files))
            if count <= 0:
                break
        return True

    def _following(self, directory: Ino) -> Ino | None:
        """Return the directory with files behind this one, in the order in which a tree is walked."""
        child = directory
        for _ in range(LEVELS):
            above = self._tree.parent(child)
            if above is None:
                return None
            follower = self._branch(above[0]).after(self._tree, child)
            if follower is not None:
                return self._first_below(follower)
            child = above[0]
        return None

    def _first_below(self, directory: Ino) -> Ino:
        """Go down to the first directory that has files, as far as it is known."""
        for _ in range(LEVELS):
            folder = self._folder(directory)
            if not len(folder.roster.files):
                folder.load(self._tree)
            if len(folder.roster.files) or not len(folder.roster.directories):
                break
            directory = folder.roster.directories[0]
        return directory

    def _of_shards(self, directories: list[Ino]) -> Iterator[Wish]:
        for directory in directories:
            shards = self._shards.get(directory)
            for name, stream in () if shards is None else shards.wanted():
                ino = self._tree.file(directory, name)
                if ino is not None and self._claim(ino):
                    self._hold_back(stream, ino)
                    yield Wish(ino, rest=False, from_tail=False)

    def rest(self) -> Iterator[Wish]:
        """Give what will be wanted without anybody knowing when: the rest of shuffled directories and trees. Nothing
        as long as there is a plan, which knows.
        """
        if self.plan is not None and not self.plan.finished:
            return
        for folder in list(reversed(self._active.values())):
            while folder.scattered and (ino := folder.next_of_rest(self._tree)) is not None:
                folder.credit -= 1
                yield Wish(ino, rest=True, from_tail=folder.from_tail)
        for branch in list(reversed(self._branches.values()))[:BRANCHES]:
            if branch.scattered:
                yield from self._of_branch(branch)

    def _of_branch(self, branch: Branch) -> Iterator[Wish]:
        """Give the rest of a tree: directories that were read lately, then all in order."""
        unlisted = 0
        for child in branch.children(self._tree):
            if not self._want_listing(child):
                branch.postpone(child)
                unlisted += 1
                if unlisted >= UNLISTED_AT_ONCE:
                    return
                continue
            folder = self._folder(child)
            if folder.repetitive or folder.orderly:
                continue  # it is there for something else
            if folder.finished and branch.epochs > folder.epochs and child not in self._active:
                folder.begin_epoch()
                folder.epochs = branch.epochs
            while branch.credit > 0 and (ino := folder.next_of_rest(self._tree)) is not None:
                branch.credit -= 1
                yield Wish(ino, rest=True, from_tail=folder.from_tail)
            if branch.credit <= 0:
                branch.postpone(child)
                return

    def _claim(self, ino: Ino) -> bool:
        """Whether a file that was chosen by its number or name was neither read nor proposed in its directory."""
        above = self._tree.parent(ino)
        if above is None:
            return False
        folder = self._folders.get(above[0])
        return folder is None or folder.claim(ino)


def is_large(size: int) -> bool:
    """Whether a file is not fetched whole ahead of its reader."""
    return size > LARGE_BYTES


def _kept(all_of_them: OrderedDict[Ino, T], ino: Ino, make: Callable[[], T]) -> T:
    """Return what is known of a directory, as the one that was used last."""
    found = all_of_them.get(ino)
    if found is None:
        found = all_of_them[ino] = make()
        if len(all_of_them) > FOLDERS:
            all_of_them.popitem(last=False)
    else:
        all_of_them.move_to_end(ino)
    return found
