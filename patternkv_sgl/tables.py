"""Which pattern table a token was quantized with, and who keeps that table alive.

Host-side only: the patterns themselves live in the pool. Every decision here depends on counts
that all tensor-parallel ranks share, so ranks agree without communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

ZERO_TABLE = 0  # zero patterns and unit channel scales; always exists, never mined


class TableRuns(tuple[tuple[int, int], ...]):
    """Tables along a run of tokens: ascending ``(start, table_id)``, the last run open-ended.

    Positions are relative to the owner: the sequence for a request, the node's first token for a
    radix node. An open end means that decoding tokens onto a request changes nothing here.
    """

    __slots__ = ()

    def __new__(cls, runs: Iterable[tuple[int, int]] = ()) -> TableRuns:
        merged: list[tuple[int, int]] = []
        for start, table in runs:
            if merged and merged[-1][0] == start:
                merged.pop()
            if not merged or merged[-1][1] != table:
                merged.append((start, table))
        return super().__new__(cls, merged)

    @property
    def tables(self) -> set[int]:
        return {table for _, table in self}

    @property
    def last(self) -> int:
        """The table that further tokens inherit."""
        return self[-1][1]

    def slice(self, begin: int, end: int) -> TableRuns:
        """Runs of positions ``[begin, end)``, relative to ``begin``."""
        if begin == 0 and self and self[-1][0] < end:
            return self
        return TableRuns((lo - begin, table) for lo, _, table in self.spans(begin, end))

    def extended(self, start: int, table: int) -> TableRuns:
        """These runs up to ``start``, then ``table``."""
        if self and self[-1][0] < start and self.last == table:
            return self
        return TableRuns([*(run for run in self if run[0] < start), (start, table)])

    def followed_by(self, length: int, other: TableRuns) -> TableRuns:
        """These runs, none empty, for ``length`` positions, then those of ``other``."""
        if other and other[-1][0] > length:
            return TableRuns([*self, *((max(start, length), table) for start, table in other)])
        return self.extended(length, other.last) if other else self

    def spans(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """``(start, stop, table_id)`` pieces that cover ``[begin, end)``."""
        for index, (start, table) in enumerate(self):
            stop = self[index + 1][0] if index + 1 < len(self) else end
            start, stop = max(start, begin), min(stop, end)
            if start < stop:
                yield start, stop, table


class TableRefs:
    """Reference counts of the table slots.

    Owners are radix nodes, running requests and the tree root: every live table has at least one.
    A freed id may be reused at once: mining writes on the forward stream, after every forward that
    still reads the old content.

    Args:
        num_tables: table slots in the pool, including the zero table.
    """

    def __init__(self, num_tables: int) -> None:
        self.num_tables = num_tables
        self.clear()

    def clear(self) -> None:
        """Forget every owner; only the zero table stays live."""
        self._free = list(range(self.num_tables - 1, ZERO_TABLE, -1))
        self.refs: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def live(self) -> int:
        """Mined tables in use; the zero table is not counted."""
        return self.num_tables - 1 - len(self._free)

    def allocate(self) -> int | None:
        """A free table id without owners, or None when all are live (the caller inherits)."""
        return self._free.pop() if self._free else None

    def acquire(self, tables: Iterable[int]) -> None:
        """Add one owner to each of ``tables``."""
        self.refs.update(tables)

    def release(self, tables: Iterable[int]) -> None:
        """Remove one owner from each of ``tables``; a table without owners becomes free."""
        for table in tables:
            count = self.refs[table] - 1
            assert count >= 0, f"table {table} released more often than acquired: count {count}"
            if count:
                self.refs[table] = count
                continue
            del self.refs[table]
            if table != ZERO_TABLE:
                self._free.append(table)

    def check(self, owners: Counter[int]) -> None:
        """Assert that the counts equal ``owners`` and that every id is either free or owned."""
        assert self.refs == owners, f"table references {dict(self.refs)} but owners {dict(owners)}"
        free = set(self._free)
        assert len(free) == len(self._free), f"table freed twice: {sorted(self._free)}"
        used = set(self.refs) - {ZERO_TABLE}
        assert not free & used, f"tables both free and owned: {sorted(free & used)}"
        leaked = set(range(1, self.num_tables)) - free - used
        assert not leaked, f"tables neither free nor owned: {sorted(leaked)}"
