"""What may wait for a mount, in a child process each, because it may wait for ever: does it answer? (And `do`.)

The children are forks that close every descriptor before they ask: a child that hangs must not keep a device open, and
with it a mount alive that nobody serves. A few at a time; what does not answer in time is killed and not waited for.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from cachefs.mount.loop import Loop
from cachefs.mount.mountinfo import Answer

AT_ONCE = 16
ANSWER_S = 2.0
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
_MOST_DESCRIPTORS = 1 << 20
_OTHER_FAILURE = 255


class _Question(NamedTuple):
    act: Callable[[], object]
    on_answer: Callable[[Answer], object]
    timeout_s: float


class Prober:
    """Asks mounts, one child each. `on_answer` comes exactly once per question, never from within `ask`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: deque[_Question] = deque()
        self._under_way = 0

    def ask(self, path: str, on_answer: Callable[[Answer], object]) -> None:
        """Ask the mount at `path`."""
        self.do(functools.partial(os.statvfs, path), on_answer)

    def do(self, act: Callable[[], object], on_answer: Callable[[Answer], object], timeout_s: float = ANSWER_S) -> None:
        """Call something that may wait for a mount, and raises OSError."""
        self._waiting.append(_Question(act, on_answer, timeout_s))
        self._loop.after(self, 0, self._begin)

    def _begin(self) -> None:
        while self._waiting and self._under_way < AT_ONCE:
            self._under_way += 1
            question = self._waiting.popleft()
            try:
                _Probe(self._loop, question, self._over)
            except OSError:  # no process, or no descriptor, is to be had
                self._loop.after(question, 0, functools.partial(self._over, question, Answer.SILENT))

    def _over(self, question: _Question, answer: Answer) -> None:
        self._under_way -= 1
        self._begin()
        question.on_answer(answer)


class _Probe:
    def __init__(self, loop: Loop, question: _Question, on_over: Callable[[_Question, Answer], None]) -> None:
        self._loop = loop
        self._question = question
        self._on_over = on_over
        self._silent = False
        self._pid = os.fork()
        if self._pid == 0:
            _act(question.act)
        loop.children.add(self._pid)
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError:
            os.kill(self._pid, signal.SIGKILL)
            loop.children.discard(self._pid)  # buried as an orphan
            raise
        loop.watch(self._pidfd, self._ended)
        loop.after(self, question.timeout_s, self._give_up)

    def _give_up(self) -> None:
        self._silent = True
        os.kill(self._pid, signal.SIGKILL)  # it may end much later, with the connection; then it is buried
        self._on_over(self._question, Answer.SILENT)

    def _ended(self) -> None:
        self._loop.cancel(self)
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        _, status = os.waitpid(self._pid, 0)
        self._loop.children.discard(self._pid)
        if not self._silent:
            self._on_over(self._question, _meaning(status))


def _meaning(status: int) -> Answer:
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return Answer.ALIVE
    return Answer.DEAD if code in _DEAD else Answer.FAILING


def _act(act: Callable[[], object]) -> None:
    """In the child: act, and end. Nothing of the parent's may run here."""
    code = _OTHER_FAILURE
    try:
        os.closerange(0, _MOST_DESCRIPTORS)
        act()
        code = 0
    except OSError as error:
        code = min(error.errno or _OTHER_FAILURE, _OTHER_FAILURE)
    finally:
        os._exit(code)
