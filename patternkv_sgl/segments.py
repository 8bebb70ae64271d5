"""Turns the requests of a decode batch into segments: which slots are read once for whom.

Host-side policy. A segment is a run of slots of one table that the same rows read; shared ones come
from radix nodes that several requests of the batch hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

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
        runs: tables along its sequence, at least one.
        end: positions ``[0, end)`` are read from the pool (later ones from the window).
    """

    req_pool_idx: int
    path: Sequence[tuple[int, int, Hashable]]
    runs: TableRuns
    end: int


class Segments:
    """The decode work of a batch, in the layout of ``patternkv_kernels.DecodePlan``.

    Every row ends in a segment of its own, which may be empty: as the row decodes, only that one
    grows, so a batch of the same rows keeps its segments from step to step (:meth:`grow`).

    Attributes:
        segments: int32 [num_segments, 4], ``(req_pool_idx, start, end, table_id)`` each.
        row_indptr, rows: int32; rows ``rows[row_indptr[i]:row_indptr[i + 1]]`` read segment ``i``.
        growable: False while a row ends before its last table begins.
        shared_reads: KV token reads saved by reading each shared segment once.
        max_branches: most rows on one segment that has tokens.
    """

    def __init__(self, readers: Sequence[Reader], shared: Sequence[tuple[int, int, list[int]]]):
        segments: list[tuple[int, int, int, int]] = []
        readers_of: list[Sequence[int]] = []

        def add(reader: Reader, start: int, end: int, rows: Sequence[int]) -> None:
            for lo, hi, table in reader.runs.spans(start, end):
                segments.append((reader.req_pool_idx, lo, hi, table))
                readers_of.append(rows)

        done = [0] * len(readers)
        for start, end, rows in shared:
            add(readers[rows[0]], start, end, rows)
            for row in rows:
                done[row] = end
        tails = []
        self.growable = True
        for row, reader in enumerate(readers):
            last_start, last_table = reader.runs[-1]
            start = max(done[row], last_start)
            add(reader, done[row], min(start, reader.end), [row])
            tails.append(len(segments))
            segments.append((reader.req_pool_idx, start, max(start, reader.end), last_table))
            readers_of.append([row])
            self.growable &= start <= reader.end
        counts = [len(rows) for rows in readers_of]
        self.segments = np.array(segments, dtype=np.int32).reshape(-1, 4)
        self.row_indptr = np.cumsum([0, *counts], dtype=np.int32)
        self.rows = np.fromiter(chain.from_iterable(readers_of), np.int32, sum(counts))
        self._tails = np.array(tails, dtype=np.intp)
        lengths = self.segments[:, 2] - self.segments[:, 1]
        branches = np.array(counts, dtype=np.int64)
        self.shared_reads = int((lengths * (branches - 1)).sum())
        self.max_branches = int(branches[lengths > 0].max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments, shared ones counted once."""
        return int((self.segments[:, 2] - self.segments[:, 1]).sum())

    def grow(self, ends: np.ndarray) -> None:
        """Let row ``i`` read ``[0, ends[i])``; ends never go back."""
        assert self.growable, "a row ends before its last table begins"
        assert (ends >= self.segments[self._tails, 2]).all(), f"rows shrink to {ends}"
        self.segments[self._tails, 2] = ends


def build_segments(readers: Sequence[Reader], *, share: bool = True) -> Segments:
    """Segments that cover ``[0, end)`` of every reader exactly once.

    Args:
        readers: the batch's rows in order.
        share: False reads every row on its own, for comparison with the grouped result.
    """
    return Segments(readers, _shared_runs(readers) if share else [])


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
    ends: dict[Hashable, int] = {}
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
            if node not in ends:
                ends[node] = min(end, *(readers[other].end for other in rows))
            end = ends[node]
            if end - start < MIN_SHARED_TOKENS:
                continue
            if rows[0] == row:
                runs.append((start, end, rows))
            start = end
    return sorted(runs, key=lambda run: run[0])
