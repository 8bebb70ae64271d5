"""The plan of a decode step in device memory, at addresses that captured CUDA graphs keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from patternkv_kernels import DecodePlan, DecodeWorkspace, SlotSource, plan_decode
from patternkv_sgl.batch import DecodeBatch
from patternkv_sgl.segments import MIN_SHARED_TOKENS, Segments


@dataclass(frozen=True)
class DecodeMetadata:
    """Metadata of a decode batch, shared by all layers; ``b`` counts the padding of a CUDA graph,
    whose rows read nothing and write to the padding request's window."""

    decode: DecodePlan
    token_tables: torch.Tensor  # int32 [b]
    ring: torch.Tensor  # int64 [b], the request row
    window_start: torch.Tensor  # int64 [b]
    window_end: torch.Tensor  # int64 [b], one past the token being decoded
    window_index: torch.Tensor  # int64 [b], that token's entry of the flattened rings
    workspace: DecodeWorkspace | None = None  # where kernels decode; None: torch does


def most_tokens(pool_tokens: int, max_rows: int) -> int:
    """Most tokens that the segments of a batch have: those of the pool, and runs too short to be
    shared, which each row lists for itself."""
    return pool_tokens + MIN_SHARED_TOKENS * max_rows


class DecodeBuffers:
    """Host to device in one copy a step, and the slots that the step reads in one list.

    Segments index that list, not SGLang's ``req_to_token``: layers of a captured graph read nothing
    that the scheduler may already write for the next batch.

    Args:
        req_to_token: int32 [num_request_rows, max_context_len], SGLang's slot of each position.
        max_rows: most rows of a batch.
        max_entries: most segments, each counted once for every row that reads it.
        max_tokens: most tokens of all segments.
    """

    def __init__(
        self, req_to_token: torch.Tensor, max_rows: int, max_entries: int, max_tokens: int
    ) -> None:
        device = req_to_token.device
        self._req_to_token = req_to_token
        self.max_rows, self.max_entries, self.max_tokens = max_rows, max_entries, max_tokens
        self._device = torch.zeros(4 * sum(self._words()), dtype=torch.uint8, device=device)
        self._parts = self._split(self._device)
        self._slots = torch.zeros(1, max_tokens, dtype=torch.int32, device=device)

    @staticmethod
    def nbytes(max_rows: int, max_entries: int, max_tokens: int) -> int:
        """Bytes of device memory; the list of slots is nearly all of it."""
        return 4 * (sum(_words(max_rows, max_entries)) + max_tokens)

    def fits(self, num_rows: int, segments: Segments) -> bool:
        return (
            num_rows <= self.max_rows
            and len(segments.rows) <= self.max_entries
            and segments.num_tokens <= self.max_tokens
        )

    def _words(self) -> tuple[int, ...]:
        return _words(self.max_rows, self.max_entries)

    def _split(self, memory: torch.Tensor) -> _Parts:
        parts = _Parts(*memory.view(torch.int32).split(self._words()))
        return parts._replace(
            per_row=parts.per_row.view(torch.int64).view(4, self.max_rows),
            segments=parts.segments.view(-1, 4),
            sources=parts.sources.view(torch.int64),
        )

    def load_segments(
        self, segments: Segments, num_rows: int, workspace: DecodeWorkspace | None
    ) -> DecodePlan:
        """The reading plan alone, of ``num_rows`` rows without window or new tokens."""
        nothing = np.zeros(0, dtype=np.int64)
        batch = DecodeBatch(segments, *[nothing] * 4)
        return self.load(batch, num_rows, window=0, workspace=workspace).decode

    def load(
        self,
        batch: DecodeBatch,
        num_rows: int,
        *,
        window: int,
        workspace: DecodeWorkspace | None,
    ) -> DecodeMetadata:
        """Copy ``batch``, padded to ``num_rows``, on the current stream, and plan it in
        ``workspace`` if there is one.

        Without pinned memory of its own for every step the host could overwrite what a copy still
        reads; PyTorch's host allocator keeps it until the copy is done.
        """
        segments, n = batch.segments, len(batch.tables)
        pinned = self._device.is_cuda
        host = torch.empty(len(self._device), dtype=torch.uint8, pin_memory=pinned)
        parts = self._split(host)
        per_row = parts.per_row.numpy()
        per_row[:] = 0
        ends = batch.seq_lens
        per_row[:3, :n] = batch.req_pool_indices, batch.window_starts, ends
        if window:
            per_row[3, :n] = batch.req_pool_indices * window + (ends - 1) % window
        s = len(segments.segments)
        req, start, end, table = segments.segments.T.astype(np.int64)
        ends_in_list = np.cumsum(end - start)
        starts_in_list = ends_in_list - (end - start)
        parts.sources.numpy()[:s] = req * self._req_to_token.stride(0) + start - starts_in_list
        fields = [np.zeros(s, np.int64), starts_in_list, ends_in_list, table]
        parts.segments.numpy()[:s] = np.stack(fields, axis=1)
        parts.rows.numpy()[: len(segments.rows)] = segments.rows
        parts.row_indptr.numpy()[: s + 1] = segments.row_indptr
        tables = parts.tables.numpy()
        tables[:num_rows] = 0
        tables[:n] = batch.tables
        self._device.copy_(host, non_blocking=True)
        return self._plan(s, int(ends_in_list[-1]) if s else 0, num_rows, workspace)

    def _plan(
        self, num_segments: int, num_tokens: int, num_rows: int, workspace: DecodeWorkspace | None
    ) -> DecodeMetadata:
        """Plan a batch of this size that has been copied, and view what it uses."""
        parts = self._parts
        segments, indptr = parts.segments[:num_segments], parts.row_indptr[: num_segments + 1]
        plan = DecodePlan(self._slots, segments, indptr, parts.rows)
        source = SlotSource(self._req_to_token, parts.sources[:num_segments], num_tokens)
        if workspace is None:
            _list_slots(plan, source)
        else:
            plan_decode(plan, workspace, num_rows, source)
        ring, start, end, index = parts.per_row[:, :num_rows]
        return DecodeMetadata(plan, parts.tables[:num_rows], ring, start, end, index, workspace)


def _list_slots(plan: DecodePlan, source: SlotSource) -> None:
    """What :func:`~patternkv_kernels.plan_decode` does with ``source``, by torch."""
    place = torch.arange(source.num_tokens, device=plan.segments.device)
    segment = torch.searchsorted(plan.segments[:, 2].contiguous(), place, right=True)
    at = source.sources[segment].add_(place)
    plan.req_to_token[0, : source.num_tokens] = source.req_to_token.view(-1)[at]


class _Parts(NamedTuple):
    """What one copy brings, side by side."""

    per_row: torch.Tensor  # int64 [4, max_rows]: row of req_to_token, window start, end and index
    segments: torch.Tensor  # int32 [max_entries, 4]
    sources: torch.Tensor  # int64 [max_entries], as in SlotSource
    rows: torch.Tensor  # int32 [max_entries]
    row_indptr: torch.Tensor  # int32 [max_entries + 1]
    tables: torch.Tensor  # int32 [max_rows], of each row's new token


def _words(max_rows: int, max_entries: int) -> tuple[int, ...]:
    """int32 words of each of `_Parts`."""
    # The planner loads a segment as 16 bytes, so segments come before what is not a multiple.
    return 8 * max_rows, 4 * max_entries, 2 * max_entries, max_entries, max_entries + 1, max_rows
