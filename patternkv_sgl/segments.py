"""Turns the requests of a decode batch into segments: which slots are read once for whom.

Host-side policy: plain lists in, plain lists out. A segment is a run of slots of one table that
the same rows read; shared ones come from radix nodes that several requests of the batch hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from patternkv_sgl.tables import TableRuns

# Below this many tokens a shared run is read by each branch on its own: a work item of its own
# costs more than the re-read.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class Reader:
    """One row of a decode batch.

    Attributes:
        req_pool_idx: the request's row of ``req_to_token``.
        path: ``(start, end, node)`` of the radix nodes it holds, from the root, by position.
        runs: tables along its sequence.
        end: positions ``[0, end)`` are read from the pool (later ones from the window).
    """

    req_pool_idx: int
    path: Sequence[tuple[int, int, Hashable]]
    runs: TableRuns
    end: int


@dataclass
class Segments:
    """The decode work of a batch, in the layout of ``patternkv_kernels.DecodePlan``.

    Attributes:
        segments: ``(req_pool_idx, start, end, table_id)`` each.
        row_indptr, rows: rows ``rows[row_indptr[i]:row_indptr[i + 1]]`` read segment ``i``.
    """

    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    row_indptr: list[int] = field(default_factory=lambda: [0])
    rows: list[int] = field(default_factory=list)

    def add(self, reader: Reader, start: int, end: int, rows: Sequence[int]) -> None:
        for lo, hi, table in reader.runs.spans(start, end):
            self.segments.append((reader.req_pool_idx, lo, hi, table))
            self.rows.extend(rows)
            self.row_indptr.append(len(self.rows))

    @property
    def shared_reads(self) -> int:
        """KV token reads saved by reading each shared segment once."""
        return sum(
            (end - start) * (hi - lo - 1)
            for (_, start, end, _), lo, hi in zip(
                self.segments, self.row_indptr, self.row_indptr[1:], strict=False
            )
        )

    @property
    def max_branches(self) -> int:
        pairs = zip(self.row_indptr, self.row_indptr[1:], strict=False)
        return max((hi - lo for lo, hi in pairs), default=0)


def build_segments(readers: Sequence[Reader], *, share: bool = True) -> Segments:
    """Segments that cover ``[0, end)`` of every reader exactly once.

    Args:
        readers: the batch's rows in order.
        share: False reads every row on its own, for comparison with the grouped result.
    """
    out = Segments()
    done = [0] * len(readers)
    if share:
        for start, end, rows in _shared_runs(readers):
            out.add(readers[rows[0]], start, end, rows)
            for row in rows:
                done[row] = end
    for row, reader in enumerate(readers):
        out.add(reader, done[row], reader.end, [row])
    return out


def _shared_runs(readers: Sequence[Reader]) -> list[tuple[int, int, list[int]]]:
    """``(start, end, rows)``, contiguous from 0 along each row.

    Radix paths are chains from the root, so the rows of a node contain those of its children and
    consecutive nodes with as many rows are one run. A run too short to share is left to the next
    one below it, or to the private segments.
    """
    rows_of: dict[Hashable, list[int]] = defaultdict(list)
    for row, reader in enumerate(readers):
        for _, _, node in reader.path:
            rows_of[node].append(row)
    runs: list[tuple[int, int, list[int]]] = []
    for row, reader in enumerate(readers):
        start = 0
        for index, (_, end, node) in enumerate(reader.path):
            rows = rows_of[node]
            if len(rows) < 2:
                break
            below = reader.path[index + 1 : index + 2]
            if below and len(rows_of[below[0][2]]) == len(rows):
                continue
            end = min(end, *(readers[other].end for other in rows))
            if end - start < MIN_SHARED_TOKENS:
                continue
            if rows[0] == row:
                runs.append((start, end, rows))
            start = end
    return sorted(runs, key=lambda run: run[0])
