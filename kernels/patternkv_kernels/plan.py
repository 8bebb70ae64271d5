"""What the rows of a decode batch read: segments of packed slots and exact recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """What each row of a decode batch reads: a snapshot of one step, used by all layers.

    A segment is a run of positions whose slots were all quantized with one table. Shared segments
    list several rows (branches), private ones a single row; a segment without tokens or rows is
    legal.
    """

    req_to_token: torch.Tensor
    """int32 ``[max_reqs, max_context]``: slot of each position (SGLang's
    ``ReqToTokenPool.req_to_token``)"""
    segments: torch.Tensor
    """int32 ``[num_segments, 4]``: ``req_pool_idx, start, end, table_id``; the slots are
    ``req_to_token[req_pool_idx, start:end]``"""
    row_indptr: torch.Tensor
    """int32 ``[num_segments + 1]``"""
    rows: torch.Tensor
    """int32 ``[>= row_indptr[-1]]``: the batch rows that read segment ``i`` are
    ``rows[row_indptr[i]:row_indptr[i + 1]]``"""


@dataclass(frozen=True)
class Window:
    """The exact recent tokens of every batch row, for one layer.

    Row ``i`` reads positions ``[start[i], end[i])``; position ``p`` is at index ``p % window`` of
    ring ``ring[i]``, but the last of them is read from ``new_k`` and ``new_v``, and decode puts it
    into the ring. ``start == end`` means none; ``end - start <= window``.
    """

    k: torch.Tensor
    """model dtype ``[num_rings, window, h_kv, d]``"""
    v: torch.Tensor
    """model dtype ``[num_rings, window, h_kv, d]``"""
    ring: torch.Tensor
    """int64 ``[b]``"""
    start: torch.Tensor
    """int64 ``[b]``"""
    end: torch.Tensor
    """int64 ``[b]``"""
    new_k: torch.Tensor
    """model dtype ``[b, h_kv, d]``; rows that read nothing may hold anything"""
    new_v: torch.Tensor
    """as ``new_k``"""

    def check(self, q: torch.Tensor) -> None:
        """Raises ``ValueError`` unless queries ``[b, h_q, d]`` can read this window."""
        expected = (len(q), *self.k.shape[2:])
        if self.new_k.shape != expected or self.new_v.shape != expected:
            raise ValueError(
                f"new_k is {list(self.new_k.shape)} and new_v {list(self.new_v.shape)}: {len(q)} "
                f"rows with rings {list(self.k.shape)} need {list(expected)}, both alike"
            )
        if not self.new_k.dtype == self.new_v.dtype == self.k.dtype:
            raise ValueError(
                f"new_k is {self.new_k.dtype} and new_v {self.new_v.dtype}: the rings are "
                f"{self.k.dtype}, and they must be alike"
            )
