"""In which page of an LMDB data file does a value begin?

py-lmdb does not tell, but a value that is too long for a tree page begins 16 bytes into the first of its own pages,
behind a page header that carries the number of the page, a flag that says "overflow page" and the count of pages.
So the header is read from the 16 bytes before the value. It is only asked for values that were just written in the
open transaction, whose pages are in memory, and everything is checked: when anything looks different (another
LMDB), the answer is 0, "unknown", and the value is read through the map.
"""

from __future__ import annotations

import ctypes
import struct
from typing import ClassVar

from cachefs.block.ledger import PAGE_HEADER, value_pages

_PAGE_HEADER = struct.Struct("=QHHI")
"""Page number, pad, flags, number of pages."""
_OVERFLOW = 0x04


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer (stable ABI since 3.11)."""

    _fields_: ClassVar = [  # type: ignore[mutable-override] # the stub has no narrower way
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


def _address(view: memoryview) -> int:
    """Return the address of the first byte of `view`."""
    buffer = _PyBuffer()
    _get_buffer(view, ctypes.byref(buffer), 0)
    address = buffer.buf
    _release_buffer(ctypes.byref(buffer))
    return address or 0


def first_page(value: memoryview, last_page: int) -> int:
    """Return the number of the page in which `value` (a view that LMDB returned) begins, or 0 when it is not known."""
    pages = value_pages(value.nbytes)
    address = _address(value)
    if not pages or not address:
        return 0
    number, _, flags, count = _PAGE_HEADER.unpack(ctypes.string_at(address - PAGE_HEADER, PAGE_HEADER))
    usable = flags & _OVERFLOW and count == pages and 1 < number <= last_page
    return int(number) if usable else 0
