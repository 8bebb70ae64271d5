"""Batches without requests, of warm-up and graph capture: they touch only the padding page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patternkv_sgl.batch import DecodeBatch, ExtendBatch
from patternkv_sgl.requests import Extend
from patternkv_sgl.segments import Reader, build_segments
from patternkv_sgl.tables import ZERO_TABLE, TableRuns

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def dummy_extend(forward_batch: ForwardBatch, page_size: int) -> ExtendBatch:
    """What an extend forward without requests prefills, with the zero table."""
    _assert_dummy(forward_batch, page_size)
    lens = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
    extends = [Extend(prefix, new, ZERO_TABLE, mine=False) for prefix, new in lens]
    return ExtendBatch(extends, forward_batch.req_pool_indices.tolist())


def dummy_decode(forward_batch: ForwardBatch, page_size: int, window: int) -> DecodeBatch:
    """A step of rows that share nothing, with the zero table."""
    _assert_dummy(forward_batch, page_size)
    seq_lens = forward_batch.seq_lens.cpu().numpy().astype(np.int64)
    runs = TableRuns([(0, ZERO_TABLE)])
    rows = forward_batch.req_pool_indices.cpu().numpy().astype(np.int64)
    starts = seq_lens - min(1, window)
    ends = zip(rows.tolist(), starts.tolist(), strict=True)
    segments = build_segments([Reader(row, [], runs, end) for row, end in ends])
    return DecodeBatch(segments, rows, np.full(len(rows), ZERO_TABLE, np.int32), starts, seq_lens)


def _assert_dummy(forward_batch: ForwardBatch, page_size: int) -> None:
    highest = int(forward_batch.out_cache_loc.max()) if len(forward_batch.out_cache_loc) else 0
    assert highest < page_size, (
        f"a batch without requests writes slot {highest}, beyond the padding page of {page_size}: "
        "the ForwardBatch.init_new hook did not see it"
    )
