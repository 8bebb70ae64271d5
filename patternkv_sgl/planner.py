"""Plans a forward batch once for all layers, in device memory made at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from patternkv_kernels import DecodeWorkspace, RaggedAttention
from patternkv_sgl.batch import DecodeBatch, ExtendBatch
from patternkv_sgl.metadata import DecodeBuffers, DecodeMetadata, most_tokens
from patternkv_sgl.prefill import (
    ExtendMetadata,
    PackedPrefix,
    plan_pieces,
    token_index,
    window_index,
)
from patternkv_sgl.scratch import Scratch
from patternkv_sgl.segments import Segments

if TYPE_CHECKING:
    from patternkv_sgl.pool import PatternKVPool


class Planner:
    """Turns what is known of a batch into what the kernels of every layer read.

    Args:
        pool: the packed cache; planning a batch records the tables of its new slots.
        req_to_token: int32 [num_request_rows, max_context_len], SGLang's slot of each position.
        scratch: device memory for kernels.
    """

    def __init__(self, pool: PatternKVPool, req_to_token: torch.Tensor, scratch: Scratch) -> None:
        self._pool, self._req_to_token, self._scratch = pool, req_to_token, scratch
        self._config = pool.geometry.config
        shape = scratch.shape
        self.buffers = DecodeBuffers(
            req_to_token, shape.max_rows, shape.max_entries, most_tokens(pool.size, shape.max_rows)
        )

    def fits(self, batch: DecodeBatch) -> bool:
        """Whether a batch has room in the memory made at start-up, as a captured graph needs it."""
        return self.buffers.fits(len(batch.tables), batch.segments)

    def decode(self, batch: DecodeBatch, slots: torch.Tensor, num_rows: int) -> DecodeMetadata:
        """The plan of a decode batch, padded to ``num_rows``.

        Args:
            slots: int64 [at least the rows of ``batch``], where the new tokens go.
        """
        buffers, workspace = self._memory(num_rows, batch.segments)
        plan = buffers.load(batch, num_rows, window=self._config.window, workspace=workspace)
        slots = slots[: len(batch.tables)]
        self._pool.slot_table[slots] = plan.token_tables[: len(slots)]
        self._check(batch.segments)
        return plan

    def extend(self, batch: ExtendBatch, slots: torch.Tensor) -> ExtendMetadata:
        """The plan of an extend batch.

        Args:
            slots: int64 [at least the new tokens of ``batch``], where they go; a prefill graph pads
                its batch.
        """
        extends, device = batch.extends, self._req_to_token.device
        token_tables = torch.from_numpy(
            np.repeat(
                np.array([extend.table for extend in extends], dtype=np.int32),
                [extend.num_tokens for extend in extends],
            )
        ).to(device)
        self._pool.slot_table[slots[: len(token_tables)]] = token_tables
        workspace = self._scratch.ragged
        if workspace is not None:
            workspace.begin()
        index = window_index(batch, self._config.window)
        return ExtendMetadata(
            batch,
            token_tables,
            None if index is None else torch.from_numpy(index).to(device),
            RaggedAttention(
                batch.token_indptr, batch.token_indptr, causal=True, workspace=workspace
            ),
            self._tree(batch),
            plan_pieces(
                batch,
                self._req_to_token,
                self._pool.slot_table,
                max_tokens=self._scratch.shape.prefix[0],
                workspace=workspace,
            ),
        )

    def _tree(self, batch: ExtendBatch) -> PackedPrefix | None:
        if batch.tree_segments is None:
            return None
        starts = batch.token_indptr
        ranges = [(starts[i], starts[i + 1]) for i in sorted(batch.tree_requests)]
        num_rows = sum(end - start for start, end in ranges)
        self._check(batch.tree_segments)
        buffers, workspace = self._memory(num_rows, batch.tree_segments)
        plan = buffers.load_segments(batch.tree_segments, num_rows, workspace)
        return PackedPrefix(token_index(ranges, self._req_to_token.device), plan, workspace)

    def _memory(
        self, num_rows: int, segments: Segments
    ) -> tuple[DecodeBuffers, DecodeWorkspace | None]:
        """Where a batch is planned: what was made at start-up, or its own if it is larger."""
        if self.buffers.fits(num_rows, segments):
            return self.buffers, self._scratch.decode
        num_entries = len(segments.rows)
        own = DecodeBuffers(self._req_to_token, num_rows, num_entries, segments.num_tokens)
        return own, self._scratch.larger_decode(num_rows, num_entries)

    def _check(self, segments: Segments) -> None:
        """With ``--kv-quant-check``: slots were quantized with the tables they are read with."""
        if not self._config.check:
            return
        for row, start, end, table in segments.segments.tolist():
            stored = self._pool.slot_table[self._req_to_token[row, start:end].long()]
            assert bool((stored == table).all()), (
                f"request row {row} reads positions [{start}, {end}) with table {table} but their "
                f"slots were quantized with {sorted(set(stored.tolist()))}"
            )
