"""The failed state of a mount: nobody serves it any more, and every request is answered with EIO instead of hanging."""

from __future__ import annotations

from collections.abc import Callable

from cachefs.mount import kernel
from cachefs.mount.device import Device
from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop


class Refusal:
    """Refuses requests between `begin` and `end`. `on_gone` is called when the mount is gone meanwhile."""

    def __init__(self, loop: Loop, journal: Journal, device: Device, on_gone: Callable[[], None]) -> None:
        self._loop = loop
        self._journal = journal
        self._device = device
        self._on_gone = on_gone
        self._refuser: kernel.Refuser | None = None

    @property
    def begun(self) -> bool:
        """Whether the mount is in this state."""
        return self._refuser is not None

    def begin(self) -> None:
        """Refuse what waits, and what comes."""
        self._refuser = kernel.Refuser(self._device.descriptor)
        self._loop.watch(self._device.descriptor, self._refuse)

    def end(self) -> None:
        """Leave the requests to a worker again. Nothing happens when the state was not entered."""
        if self._refuser is None:
            return
        self._loop.unwatch(self._device.descriptor)
        self._journal.info(f"{self._refuser.answered} requests were refused meanwhile")
        self._refuser.close()
        self._refuser = None

    def _refuse(self) -> None:
        if self._refuser is not None and not self._refuser.refuse_waiting():
            self._on_gone()
