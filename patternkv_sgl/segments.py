"""Turns the requests of a decode batch into segments: which slots are read once for whom.

Host-side policy. A segment is a run of slots of one table that the same rows read; shared ones come
from radix nodes that several requests of the batch hold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from patternkv_sgl.tables import TableRuns

# Below this many tokens a shared run is read by each branch on its own: a work item of its own
# costs more than the re-read.
MIN_SHARED_TOKENS = 16

Path = Sequence[tuple[int, int, Hashable]]
"""``(start, end, node)`` of the radix nodes that a request holds, from the root, by position."""


class Reader(NamedTuple):
    """One row of a decode batch.

    Attributes:
        req_pool_idx: the request's row of ``req_to_token``.
        path: the same object for rows at the same node saves time.
        runs: tables along its sequence, at least one.
        end: positions ``[0, end)`` are read from the pool (later ones from the window).
    """

    req_pool_idx: int
    path: Path
    runs: TableRuns
    end: int


class SharedRun(NamedTuple):
    """Tokens that several rows read at once."""

    start: int
    end: int
    rows: np.ndarray  # ascending


class Segments:
    """The decode work of a batch, in the layout of ``patternkv_kernels.DecodePlan``.

    Every row ends in a segment of its own, which may be empty: as the row decodes, only that one
    grows, so a batch of the same rows keeps its segments from step to step (:meth:`grow`).

    Args:
        request, runs, ends: of the rows, see `Reader`.
        shared: contiguous from 0 along each row.

    Attributes:
        segments: int32 [num_segments, 4], ``(req_pool_idx, start, end, table_id)`` each: shared
            ones, private ones of tables before a row's last, and the rows' own in their order.
        row_indptr, rows: int32; rows ``rows[row_indptr[i]:row_indptr[i + 1]]`` read segment ``i``.
        growable: False while a row ends before its last table begins.
        shared_reads: KV token reads saved by reading each shared segment once.
        max_branches: most rows on one segment that has tokens.
    """

    def __init__(
        self,
        request: Sequence[int],
        runs: Sequence[TableRuns],
        ends: np.ndarray,
        shared: Sequence[SharedRun],
    ) -> None:
        n = len(request)
        last = chain.from_iterable(own[-1] for own in runs)
        last_start, last_table = np.fromiter(last, np.int64, 2 * n).reshape(n, 2).T
        spans: list[tuple[int, int, int, int]] = []
        readers_of: list[np.ndarray] = []

        def add(row: int, start: int, end: int, rows: np.ndarray) -> None:
            for span in runs[row].spans(start, end):
                spans.append((request[row], *span))
                readers_of.append(rows)

        all_rows = np.arange(n, dtype=np.int32)
        done = np.zeros(n, dtype=np.int64)
        for start, end, rows in shared:
            add(int(rows[0]), start, end, rows)
            done[rows] = end
        starts = np.maximum(done, last_start)
        before_last = np.minimum(starts, ends)
        for row in np.flatnonzero(done < before_last).tolist():
            add(row, int(done[row]), int(before_last[row]), all_rows[row : row + 1])
        own = np.stack([request, starts, np.maximum(starts, ends), last_table], 1)
        others = np.array(spans, dtype=np.int64).reshape(-1, 4)
        self.segments = np.concatenate([others, own]).astype(np.int32)
        self.growable = bool((starts <= ends).all())
        self._own = slice(len(others), None)
        branches = np.ones(len(self.segments), dtype=np.int64)
        branches[: len(others)] = [len(rows) for rows in readers_of]
        self.row_indptr = np.zeros(len(branches) + 1, dtype=np.int32)
        np.cumsum(branches, out=self.row_indptr[1:])
        self.rows = np.concatenate([*readers_of, all_rows])
        lengths = self.segments[:, 2] - self.segments[:, 1]
        self.shared_reads = int((lengths * (branches - 1)).sum())
        self.max_branches = int(branches[lengths > 0].max(initial=0))

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments, shared ones counted once."""
        return int((self.segments[:, 2] - self.segments[:, 1]).sum())

    def grow(self, ends: np.ndarray) -> None:
        """Let row ``i`` read ``[0, ends[i])``; ends never go back."""
        assert self.growable, "a row ends before its last table begins"
        assert (ends >= self.segments[self._own, 2]).all(), f"rows shrink to {ends}"
        self.segments[self._own, 2] = ends


def build_segments(readers: Sequence[Reader], *, share: bool = True) -> Segments:
    """Segments that cover ``[0, end)`` of every reader exactly once.

    Args:
        readers: the batch's rows in order.
        share: False reads every row on its own, for comparison with the grouped result.
    """
    request, paths, runs, ends = zip(*readers, strict=True) if readers else ((), (), (), ())
    stops = np.array(ends, dtype=np.int64)
    return Segments(request, runs, stops, _shared_runs(paths, stops) if share else [])


def _shared_runs(paths: Sequence[Path], row_ends: np.ndarray) -> list[SharedRun]:
    """Contiguous from 0 along each row.

    Radix paths are chains from the root, so the rows of a node contain those of its children and
    consecutive nodes with as many rows are one run. A run too short to share is left to the next
    one below it, or to the private segments. Rows of one path are looked at together.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, key in enumerate(map(id, paths)):
        groups[key].append(row)
    groups_of: dict[Hashable, list[list[int]]] = defaultdict(list)
    count: Counter[Hashable] = Counter()
    for group in groups.values():
        for _, _, node in paths[group[0]]:
            groups_of[node].append(group)
            count[node] += len(group)
    found: dict[Hashable, SharedRun] = {}
    for group in groups.values():
        path, start = paths[group[0]], 0
        for index, (_, end, node) in enumerate(path):
            if count[node] < 2:
                break
            below = path[index + 1 : index + 2]
            if below and count[below[0][2]] == count[node]:
                continue
            if node not in found:
                rows = np.array(sorted(chain.from_iterable(groups_of[node])), dtype=np.int32)
                found[node] = SharedRun(start, min(end, int(row_ends[rows].min())), rows)
            end = found[node].end
            if end - start >= MIN_SHARED_TOKENS:
                start = end
    runs = [run for run in found.values() if run.end - run.start >= MIN_SHARED_TOKENS]
    return sorted(runs, key=lambda run: run.start)
