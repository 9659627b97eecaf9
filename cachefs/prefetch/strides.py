"""Records at equal distances in one file: backward readers, and readers of every n-th record. Pure arithmetic.

A *record* is what is read in one go: everything between two jumps. Three equal distances between the beginnings of
records (a page more or less: the kernel rounds reads to pages) are a stride. It may go backward: then a reader who
goes through a file from its end is one, too. What comes next is either *dense* (records lie so near that all of the
file on the way is wanted: `DENSE_TIMES`), asked for like the readahead of a sequence, or *sparse*: the next records
by themselves.

What is ahead of the reader grows from `FIRST_RECORDS` records (`FIRST_BYTES` when they are dense) to `MOST_RECORDS`
(`MOST_BYTES`), doubled whenever as many records were read.

INVARIANT: nothing is asked for before `EVIDENCE` equal distances, and no record twice while the stride goes on.
"""

from __future__ import annotations

MIB = 1 << 20
EVIDENCE = 3
PAGE = 4096
TOLERANCE = 2 * PAGE
"""Two pages: the beginnings of two records, both of them rounded."""
DENSE_TIMES = 4
"""A stride of at most so many times the length of a record is dense."""
DENSE_BYTES = 256 << 10
"""A stride that is no longer is dense, too: several records share a block."""
FIRST_BYTES, MOST_BYTES = 4 * MIB, 32 * MIB
FIRST_RECORDS, MOST_RECORDS = 4, 32
MOST_SPARSE_BYTES = 16 * MIB
"""Of the records that are asked for ahead, all together."""

Span = tuple[int, int]


class Strides:
    """The stride of one file, if it has one."""

    __slots__ = ("_ahead", "_edge", "_hits", "_length", "_records", "_start", "_total")

    def __init__(self) -> None:
        self._start = -1
        """Where the last record begins."""
        self._length = 0
        """Of the longest record of this stride."""
        self._total = 0
        """From the first record of this stride to the last."""
        self._hits = 0
        self._records = FIRST_RECORDS
        self._ahead = FIRST_BYTES
        self._edge = 0
        """Dense: up to where the file was asked for. Sparse: how many records were, counted as `_hits` is."""

    @property
    def trusted(self) -> bool:
        """Whether there is a stride."""
        return self._hits >= EVIDENCE

    @property
    def dense(self) -> bool:
        """Whether all of the file on the way is wanted."""
        return self.trusted and abs(self._step()) <= max(DENSE_TIMES * self._length, DENSE_BYTES)

    def _step(self) -> int:
        return round(self._total / self._hits)

    @property
    def record_bytes(self) -> int:
        """How long the records of the stride are; 0 while there is none."""
        return self._length if self.trusted else 0

    def ended(self, end: int) -> None:
        """The last record went on to `end`."""
        if self._start >= 0:
            self._length = max(self._length, end - self._start)

    def note(self, start: int, end: int, file_size: int) -> list[Span]:
        """A record begins; `end`: of its first read. Returns what to ask for now, as (first byte, end byte)."""
        if self._start < 0:
            self._begin(start, end, 0)
            return []
        distance = start - self._start
        follows = self._hits and abs(distance - self._total / self._hits) <= TOLERANCE
        if not follows or not distance:
            self._begin(start, end, distance)
            return []
        self._start = start
        self._length = max(self._length, end - start)
        self._hits += 1
        self._total += distance
        if not self.trusted:
            return []
        if self.dense:
            return self._dense(start, end, file_size)
        return self._sparse(start, file_size)

    def _begin(self, start: int, end: int, distance: int) -> None:
        """One distance is the first of a stride, until the next one is another."""
        self._length = max(end - start, self._length if distance else 0)
        self._start, self._total, self._hits = start, distance, int(distance != 0)
        self._records, self._ahead, self._edge = FIRST_RECORDS, FIRST_BYTES, 0

    def _dense(self, start: int, end: int, file_size: int) -> list[Span]:
        backward = self._total < 0
        first_time = self._hits == EVIDENCE
        at = start if backward else end
        edge = at if first_time else self._edge
        left = at - edge if backward else edge - at
        if not first_time and left > self._ahead // 2:
            return []
        if not first_time:
            self._ahead = min(2 * self._ahead, MOST_BYTES)
        if backward:
            self._edge = max(0, start - self._ahead)
            return [(self._edge, min(edge, start))] if self._edge < min(edge, start) else []
        self._edge = min(file_size, end + self._ahead)
        return [(max(edge, end), self._edge)] if max(edge, end) < self._edge else []

    def _sparse(self, start: int, file_size: int) -> list[Span]:
        if self._hits == EVIDENCE:
            self._edge = self._hits
        elif self._hits - EVIDENCE >= self._records:
            self._records = min(2 * self._records, MOST_RECORDS)
        most = max(1, min(self._records, MOST_SPARSE_BYTES // max(1, self._length)))
        step = self._total / self._hits
        spans: list[Span] = []
        for number in range(max(self._edge, self._hits) + 1, self._hits + most + 1):
            first = start + round(step * (number - self._hits))
            slack = 0
            if first % PAGE or step != round(step):  # rounded to pages, and the step is known as well as that only
                slack = PAGE * (1 + -(-(number - self._hits) // self._hits))
                first = max(0, first - first % PAGE - slack)
            last = min(first + self._length + 2 * slack, file_size)
            if first < 0 or first >= last:
                break
            spans.append((first, last))
            self._edge = number
        return spans
