"""Decode plans in device memory, and prefixes cut into pieces."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from patternkv_sgl.batch import DecodeBatch, ExtendBatch
from patternkv_sgl.metadata import DecodeBuffers
from patternkv_sgl.prefill import plan_pieces, token_index, window_index
from patternkv_sgl.requests import Extend
from patternkv_sgl.segments import Reader, Segments, build_segments
from patternkv_sgl.tables import TableRuns

CPU = torch.device("cpu")
REQ_TO_TOKEN = torch.arange(6 * 100, dtype=torch.int32).view(6, 100)


def segments(*ends: int) -> Segments:
    """Rows ``1, 2, …`` that share their first 20 tokens with table 3 and go on with table 4."""
    runs = TableRuns([(0, 3), (20, 4)])
    return build_segments(
        [Reader(row, [(0, 20, "shared")], runs, end) for row, end in enumerate(ends, start=1)]
    )


def decode_batch(*ends: int) -> DecodeBatch:
    rows = np.arange(1, len(ends) + 1)
    return DecodeBatch(
        segments(*ends), rows, np.full(len(ends), 4, np.int32), np.array(ends), np.array(ends) + 3
    )


def test_a_batch_is_loaded_as_it_is_and_padded() -> None:
    buffers = DecodeBuffers(REQ_TO_TOKEN, max_rows=5, max_entries=20, max_tokens=200)
    batch = decode_batch(33, 40, 27)
    plan = buffers.load(batch, 5, window=8, workspace=None)
    loaded = plan.decode
    for (_, start, end, table), (req, first, last, expected) in zip(
        loaded.segments.tolist(), batch.segments.segments.tolist(), strict=True
    ):
        assert table == expected
        assert torch.equal(loaded.req_to_token[0, start:end], REQ_TO_TOKEN[req, first:last])
    assert loaded.row_indptr.tolist() == batch.segments.row_indptr.tolist()
    nnz = len(batch.segments.rows)
    assert loaded.rows[:nnz].tolist() == batch.segments.rows.tolist()
    assert plan.token_tables.tolist() == [4, 4, 4, 0, 0]
    assert plan.ring.tolist() == [1, 2, 3, 0, 0]
    assert plan.window_start.tolist() == [33, 40, 27, 0, 0]
    assert plan.window_end.tolist() == [36, 43, 30, 0, 0]
    # Padding writes to ring 0, which no request has.
    assert plan.window_index.tolist() == [8 + 35 % 8, 16 + 42 % 8, 24 + 29 % 8, 0, 0]


def test_addresses_stay_from_batch_to_batch() -> None:
    buffers = DecodeBuffers(REQ_TO_TOKEN, max_rows=5, max_entries=20, max_tokens=200)
    first = buffers.load(decode_batch(33, 40, 27), 4, window=8, workspace=None)
    second = buffers.load(decode_batch(21), 4, window=8, workspace=None)
    for name in ("token_tables", "ring", "window_start", "window_end", "window_index"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr(), name
    assert first.decode.rows.data_ptr() == second.decode.rows.data_ptr()
    assert second.token_tables.tolist() == [4, 0, 0, 0]
    assert second.ring.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("max_rows", "max_entries"), [(3, 9), (8, 8), (7, 20), (1, 3)])
def test_segments_are_aligned_as_the_planner_loads_them(max_rows: int, max_entries: int) -> None:
    buffers = DecodeBuffers(REQ_TO_TOKEN, max_rows, max_entries, 20)
    plan = buffers.load_segments(segments(20), 1, None)
    start = buffers._device.data_ptr()
    assert (plan.segments.data_ptr() - start) % 16 == 0


def test_what_fits() -> None:
    batch = segments(33, 40)
    nnz, tokens = len(batch.rows), 20 + 13 + 20
    assert batch.num_tokens == tokens
    assert DecodeBuffers(REQ_TO_TOKEN, 2, nnz, tokens).fits(2, batch)
    assert not DecodeBuffers(REQ_TO_TOKEN, 2, nnz - 1, tokens).fits(2, batch)
    assert not DecodeBuffers(REQ_TO_TOKEN, 2, nnz, tokens - 1).fits(2, batch)
    assert not DecodeBuffers(REQ_TO_TOKEN, 2, nnz, tokens).fits(3, batch)


def test_the_stated_bytes_are_those_allocated() -> None:
    buffers = DecodeBuffers(REQ_TO_TOKEN, 3, 9, 50)
    held = [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
    allocated = sum(value.nbytes for value in held if value is not REQ_TO_TOKEN)
    assert allocated == DecodeBuffers.nbytes(3, 9, 50)


def extend_batch(*lens: tuple[int, int], tree: frozenset[int] = frozenset()) -> ExtendBatch:
    extends = [Extend(prefix, new, 1, mine=False) for prefix, new in lens]
    return ExtendBatch(extends, list(range(1, len(lens) + 1)), tree)


@pytest.mark.parametrize("max_tokens", [1, 7, 30, 1000])
def test_pieces_cover_every_prefix_once(max_tokens: int) -> None:
    batch = extend_batch((20, 3), (0, 4), (45, 1), (9, 2), (31, 5), tree=frozenset({3}))
    tables = torch.arange(600, dtype=torch.int32) % 11
    pieces = plan_pieces(batch, REQ_TO_TOKEN, tables, max_tokens=max_tokens, workspace=None)
    assert all(0 < len(piece.slots) <= max_tokens for piece in pieces)
    assert all(len(piece.slots) == max_tokens for piece in pieces[:-1])
    read = []
    for piece in pieces:
        assert torch.equal(piece.tables, tables[piece.slots])
        tokens = torch.arange(15)[piece.tokens].tolist()
        attention = piece.attention
        for (q0, q1), (k0, k1) in zip(
            itertools.pairwise(attention.qo_indptr),
            itertools.pairwise(attention.kv_indptr),
            strict=True,
        ):
            slots = piece.slots[k0:k1].tolist()
            read += [(token, slot) for token in tokens[q0:q1] for slot in slots]
        assert len(tokens) == attention.qo_indptr[-1]
    expected = [
        (token, slot)
        for request, first, new, prefix in ((1, 0, 3, 20), (3, 7, 1, 45), (5, 10, 5, 31))
        for token in range(first, first + new)
        for slot in REQ_TO_TOKEN[request, :prefix].tolist()
    ]
    assert sorted(read) == sorted(expected)


def test_no_prefix_no_piece() -> None:
    batch = extend_batch((0, 3), (0, 4))
    tables = torch.zeros(600, dtype=torch.int32)
    assert not plan_pieces(batch, REQ_TO_TOKEN, tables, max_tokens=8, workspace=None)


def test_one_run_of_tokens_is_a_slice() -> None:
    assert token_index([(2, 4), (4, 9)], CPU) == slice(2, 9)
    scattered = token_index([(0, 2), (5, 6)], CPU)
    assert isinstance(scattered, torch.Tensor) and scattered.tolist() == [0, 1, 5]
    partly = token_index([(0, 2), (2, 3), (5, 6)], CPU)
    assert isinstance(partly, torch.Tensor) and partly.tolist() == [0, 1, 2, 5]


def test_a_window_keeps_the_exact_tokens_of_each_request_where_their_positions_are() -> None:
    extends = [
        Extend(20, 5, 1, mine=False, num_exact=3),
        Extend(9, 4, 1, mine=True),
        Extend(6, 2, 1, mine=False, num_exact=2),
    ]
    index = window_index(ExtendBatch(extends, [1, 2, 3]), 8)
    assert index is not None
    assert index.tolist() == [-1, -1, 8 + 6, 8 + 7, 8 + 0, -1, -1, -1, -1, 24 + 6, 24 + 7]
    assert window_index(extend_batch((20, 5), (0, 4)), 8) is None
