"""What the rows of a decode batch read: segments of packed slots."""

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
