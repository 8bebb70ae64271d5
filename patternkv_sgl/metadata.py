"""The plan of a decode step in device memory, at addresses that captured CUDA graphs keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from patternkv_kernels import DecodePlan
from patternkv_sgl.batch import DecodeBatch
from patternkv_sgl.segments import Segments


@dataclass(frozen=True)
class TreePlan:
    """Metadata of a decode batch, shared by all layers; ``b`` counts the padding of a CUDA graph,
    whose rows read nothing and write to the padding request's window."""

    decode: DecodePlan
    token_tables: torch.Tensor  # int32 [b]
    ring: torch.Tensor  # int64 [b], the request row
    window_start: torch.Tensor  # int64 [b]
    window_end: torch.Tensor  # int64 [b], one past the token being decoded
    window_index: torch.Tensor  # int64 [b], that token's entry of the flattened rings


class DecodeBuffers:
    """Host to device in one copy a step.

    Args:
        req_to_token: int32 [num_request_rows, max_context_len], SGLang's slot of each position.
        max_rows: most rows of a batch.
        max_entries: most segments, each counted once for every row that reads it.
    """

    def __init__(self, req_to_token: torch.Tensor, max_rows: int, max_entries: int) -> None:
        self._req_to_token = req_to_token
        self.max_rows, self.max_entries = max_rows, max_entries
        self._pinned = req_to_token.is_cuda
        size = sum(words * 4 for words in self._words())
        self._device = torch.zeros(size, dtype=torch.uint8, device=req_to_token.device)
        self._views = self._split(self._device)

    def fits(self, num_rows: int, segments: Segments) -> bool:
        return num_rows <= self.max_rows and len(segments.rows) <= self.max_entries

    def _words(self) -> tuple[int, ...]:
        rows, entries = self.max_rows, self.max_entries
        # The planner loads a segment as 16 bytes, so segments come before what is not a multiple.
        return 8 * rows, 4 * entries, entries, entries + 1, rows

    def _split(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """int64 ``[4, max_rows]``, then int32: segments, rows, row_indptr, token tables."""
        per_row, segments, rows, indptr, tables = memory.view(torch.int32).split(self._words())
        per_row = per_row.view(torch.int64).view(4, self.max_rows)
        return per_row, segments.view(-1, 4), rows, indptr, tables

    def load_segments(self, segments: Segments) -> DecodePlan:
        """The reading plan alone, of rows without window or new tokens."""
        nothing = np.zeros(0, dtype=np.int64)
        return self.load(DecodeBatch(segments, *[nothing] * 4), 0, window=0).decode

    def load(self, batch: DecodeBatch, num_rows: int, *, window: int) -> TreePlan:
        """Copy ``batch``, padded to ``num_rows``, on the current stream.

        Without pinned memory of its own for every step the host could overwrite what a copy still
        reads; PyTorch's host allocator keeps it until the copy is done.
        """
        segments, n = batch.segments, len(batch.tables)
        host = torch.empty(len(self._device), dtype=torch.uint8, pin_memory=self._pinned)
        views = tuple(view.numpy() for view in self._split(host))
        per_row, segment_view, row_view, indptr_view, table_view = views
        per_row[:] = 0
        ends = batch.seq_lens
        per_row[:3, :n] = batch.req_pool_indices, batch.window_starts, ends
        if window:
            per_row[3, :n] = batch.req_pool_indices * window + (ends - 1) % window
        num_segments = len(segments.segments)
        segment_view[:num_segments] = segments.segments
        row_view[: len(segments.rows)] = segments.rows
        indptr_view[: num_segments + 1] = segments.row_indptr
        table_view[:num_rows] = 0
        table_view[:n] = batch.tables
        self._device.copy_(host, non_blocking=True)
        on_device, device_segments, rows, indptr, tables = self._views
        ring, start, end, index = on_device[:, :num_rows]
        plan = DecodePlan(
            self._req_to_token, device_segments[:num_segments], indptr[: num_segments + 1], rows
        )
        return TreePlan(plan, tables[:num_rows], ring, start, end, index)
