"""Blocks of a file in shared memory as huge pages, without a mount option and without rights.

The kernel gives and zeroes a page of 4 KiB at a time: 580 us of CPU per MiB, most of what it costs to keep a block
that came from the store. The same MiB in huge pages costs 100 us. /dev/shm is mounted without huge pages nearly
everywhere and its switch in sysfs is off, but MADV_COLLAPSE (madvise(2), Linux 6.1) asks for them by hand, for whoever
has the file mapped: it wants one page of each 2 MiB to be there and replaces it, and the hole around it, by one huge
page.

The host of a virtual machine may take free memory back (free page reporting), and it takes whole huge pages: then a MiB
of those costs 2.5 ms the next time, while small pages come from what others have freed a moment ago. So the cost is
measured, and small pages are used for a while where huge ones are dear.

`HugePages.allocate` does for a part of a file what posix_fallocate does, with huge pages where it can. INVARIANT: it
never changes what the file holds, and when it returns every byte of the part has its block.

LMDB's own map must begin at a multiple of 2 MiB, or the processor cannot use the huge pages behind it: `address_of`
tells where a file is mapped.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import time

log = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
"""x86-64, and ARM with pages of 4 KiB; elsewhere madvise refuses, and pages are small."""
DEAR_S = 0.0005
"""CPU time for a MiB from which on small pages are cheaper."""
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HugePages:
    """The huge pages of one file. `usable` turns False for good when the kernel does not know how."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.usable = True
        self._dear_until = 0.0
        self._pause_s = FIRST_PAUSE_S

    def allocate(self, start: int, end: int) -> None:
        """Give blocks to the bytes `start` to `end` of the file. Raises OSError as posix_fallocate(3) does."""
        first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if self.usable and first < last and time.monotonic() >= self._dear_until:
            self._collapse(first, last)
        os.posix_fallocate(self._descriptor, start, end - start)  # what is there already costs next to nothing

    def _collapse(self, first: int, last: int) -> None:
        """Try to have huge pages from `first` to `last`, both multiples of a huge page."""
        try:
            address, size = self._map(first, last - first)
        except OSError as error:
            log.debug("no huge pages: %s", error)
            return
        try:
            place = -(-address // HUGE_PAGE) * HUGE_PAGE
            for offset in range(first, last, HUGE_PAGE):
                os.posix_fallocate(self._descriptor, offset, mmap.PAGESIZE)
            # One call for all: each makes every processor empty its list of new pages first.
            began = time.thread_time()
            refused = _libc.madvise(place, last - first, _MADV_COLLAPSE) != 0
            self._judge((time.thread_time() - began) / ((last - first) >> 20))
            if refused:
                code = ctypes.get_errno()
                self.usable = code != errno.EINVAL  # an older kernel; else no free huge page now, perhaps later
                log.debug("no huge page: %s", os.strerror(code))
        finally:
            _libc.munmap(address, size)

    def _judge(self, cost_s: float) -> None:
        """Take note of what a MiB of huge pages has cost."""
        if cost_s < DEAR_S:
            self._pause_s = FIRST_PAUSE_S
            return
        self._dear_until = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _map(self, offset: int, length: int) -> tuple[int, int]:
        """Map a part of the file at a multiple of a huge page, inside of a reserved piece of address space.

        Returns address and size of the reserved piece. Raises OSError.
        """
        size = length + HUGE_PAGE
        reserved = _libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if reserved == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        place = -(-reserved // HUGE_PAGE) * HUGE_PAGE
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(place, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._descriptor, offset) == _MAP_FAILED:
            code = ctypes.get_errno()
            _libc.munmap(reserved, size)
            raise OSError(code, "mmap")
        return reserved, size


def address_of(descriptor: int) -> int | None:
    """Return where this process has the beginning of the file mapped for writing, None when it has not."""
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            where, rights, offset, on, inode = line.split(maxsplit=5)[:5]
            if rights.startswith("rw") and on == device and int(inode) == status.st_ino and int(offset, 16) == 0:
                return int(where.partition("-")[0], 16)
    return None
