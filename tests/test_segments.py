"""Segments of a decode batch against a reading of the paths token by token."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patternkv_sgl.segments import MIN_SHARED_TOKENS, Reader, Segments, build_segments
from patternkv_sgl.tables import TableRuns

FIXED = settings(max_examples=150, derandomize=True, database=None, deadline=None)
SHORT, LONG = MIN_SHARED_TOKENS - 1, MIN_SHARED_TOKENS


@dataclass(frozen=True)
class Node:
    """A radix node: the token range it covers, and the table of each of its tokens."""

    name: str
    start: int
    tables: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.tables)


def reader(index: int, nodes: list[Node], own: list[int], window: int = 0) -> Reader:
    """Row ``index`` that holds ``nodes`` and then private tokens with tables ``own``.

    It reads its last ``window`` private tokens from elsewhere.
    """
    per_token = [table for node in nodes for table in node.tables] + own
    path = [(node.start, node.end, node.name) for node in nodes]
    end = len(per_token) - min(window, len(own))
    return Reader(100 + index, path, TableRuns(enumerate(per_token or [0])), end)


def slot(readers: list[Reader], req_pool_idx: int, position: int) -> object:
    """What a row holds at a position: a token of a node, or one of its own."""
    path = readers[req_pool_idx - 100].path
    node = next((name for lo, hi, name in path if lo <= position < hi), None)
    return (node, position) if node is not None else (req_pool_idx, position)


def items(segments: Segments) -> list[tuple[int, int, int, int, list[int]]]:
    """The segments that have tokens, and their rows."""
    assert len(segments.row_indptr) == len(segments.segments) + 1
    assert segments.row_indptr[0] == 0 and segments.row_indptr[-1] == len(segments.rows)
    bounds = itertools.pairwise(segments.row_indptr.tolist())
    return [
        (req_pool_idx, start, end, table, segments.rows[lo:hi].tolist())
        for (req_pool_idx, start, end, table), (lo, hi) in zip(
            segments.segments.tolist(), bounds, strict=True
        )
        if start < end
    ]


def check_cover(readers: list[Reader], segments: Segments) -> None:
    """Every row reads each of its positions once, from its own slot, with that slot's table."""
    reads: dict[int, list[int]] = defaultdict(list)
    for req_pool_idx, start, end, table, rows in items(segments):
        assert start < end and rows and len(set(rows)) == len(rows)
        for row in rows:
            for position in range(start, end):
                own = slot(readers, readers[row].req_pool_idx, position)
                assert slot(readers, req_pool_idx, position) == own
                assert [*readers[row].runs.spans(position, position + 1)] == [
                    (position, position + 1, table)
                ]
            reads[row] += range(start, end)
    for row, reader in enumerate(readers):
        assert sorted(reads[row]) == list(range(reader.end)), f"row {row}"


def saved_reads(segments: Segments) -> tuple[int, int]:
    """Reads saved by sharing and the most rows on one token, counted token by token."""
    readers_of = [
        len(rows) for _, start, end, _, rows in items(segments) for _ in range(start, end)
    ]
    return sum(n - 1 for n in readers_of), max(readers_of, default=0)


@st.composite
def batches(draw: st.DrawFn) -> list[Reader]:
    """Rows at random nodes of a random tree whose nodes are up to 40 tokens long."""
    nodes: list[list[Node]] = [[]]  # paths from the root
    for i in range(draw(st.integers(0, 6))):
        parent = draw(st.sampled_from(nodes))
        start = parent[-1].end if parent else 0
        length = draw(st.sampled_from([1, 3, SHORT, LONG, 20, 40]))
        tables = draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(0, length))
        split = tables[2]
        per_token = (tables[0],) * split + (tables[1],) * (length - split)
        nodes.append([*parent, Node(f"node {i}", start, per_token)])
    return [
        reader(
            row,
            draw(st.sampled_from(nodes)),
            [draw(st.integers(0, 2))] * draw(st.sampled_from([0, 1, 7, 30])),
            draw(st.sampled_from([0, 1, 5, 64])),
        )
        for row in range(draw(st.integers(0, 6)))
    ]


@FIXED
@given(batches())
def test_every_token_is_read_once(readers: list[Reader]) -> None:
    for share in (True, False):
        segments = build_segments(readers, share=share)
        check_cover(readers, segments)
        saved, branches = saved_reads(segments)
        assert segments.shared_reads == saved
        assert segments.max_branches == branches
        if not share:
            assert saved == 0 and branches <= 1


@FIXED
@given(batches(), st.data())
def test_rows_grow(readers: list[Reader], data: st.DataObject) -> None:
    """Segments that grew cover what segments made anew would."""
    segments = build_segments(readers)
    if any(reader.end < reader.runs[-1][0] for reader in readers):
        with pytest.raises(AssertionError, match="before its last table"):
            segments.grow(np.array([reader.end for reader in readers]))
        return
    for _ in range(2):
        readers = [
            reader._replace(end=reader.end + data.draw(st.integers(0, 40))) for reader in readers
        ]
        segments.grow(np.array([reader.end for reader in readers]))
        for _, _, end, _, rows in items(segments):
            assert all(end <= readers[row].end for row in rows)
        check_cover(readers, segments)


def test_rows_do_not_shrink() -> None:
    segments = build_segments([reader(0, chain(20), [])])
    with pytest.raises(AssertionError, match="shrink"):
        segments.grow(np.array([19]))


def best_possible(readers: list[Reader]) -> int:
    """Reads saved when every token held by several rows is read once, as long as the run of tokens
    from the previous change of rows is not too short to share."""
    saved = 0
    rows_of: dict[object, list[int]] = defaultdict(list)
    for row, each in enumerate(readers):
        for position in range(each.end):
            rows_of[slot(readers, each.req_pool_idx, position)].append(row)
    for row, each in enumerate(readers):
        start, position = 0, 0
        while position < each.end:
            rows = rows_of[slot(readers, each.req_pool_idx, position)]
            if len(rows) < 2:
                break
            while position < each.end and (
                rows_of[slot(readers, each.req_pool_idx, position)] == rows
            ):
                position += 1
            if position - start < MIN_SHARED_TOKENS:
                continue  # folded into the run below
            if rows[0] == row:
                saved += (position - start) * (len(rows) - 1)
            start = position
    return saved


@FIXED
@given(batches())
def test_all_that_is_worth_sharing_is_shared(readers: list[Reader]) -> None:
    assert build_segments(readers).shared_reads == best_possible(readers)


def chain(*lengths: int) -> list[Node]:
    """Nodes of the given lengths one below the other, table 1."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        Node(f"chain {i}", start, (1,) * length)
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def test_a_shared_prefix_is_one_segment_for_all_its_branches() -> None:
    prefix = chain(100)
    readers = [reader(row, prefix, [2] * (row + 1)) for row in range(3)]
    assert items(build_segments(readers)) == [
        (100, 0, 100, 1, [0, 1, 2]),
        (100, 100, 101, 2, [0]),
        (101, 100, 102, 2, [1]),
        (102, 100, 103, 2, [2]),
    ]


def test_consecutive_nodes_of_the_same_rows_are_one_segment() -> None:
    prefix = chain(5, 30, 1, 70)
    readers = [reader(row, prefix, []) for row in range(2)]
    assert items(build_segments(readers)) == [(100, 0, 106, 1, [0, 1])]


def test_a_segment_has_one_table() -> None:
    prefix = [Node("mixed", 0, (1,) * 40 + (2,) * 30)]
    readers = [reader(row, prefix, []) for row in range(2)]
    assert items(build_segments(readers)) == [
        (100, 0, 40, 1, [0, 1]),
        (100, 40, 70, 2, [0, 1]),
    ]


def test_branches_of_branches() -> None:
    root, left, right = chain(50)[0], Node("left", 50, (2,) * 20), Node("right", 50, (3,) * 20)
    readers = [reader(i, [root, leaf], [1]) for i, leaf in enumerate([left, right, left, right])]
    shared = [item for item in items(build_segments(readers)) if len(item[4]) > 1]
    assert shared == [
        (100, 0, 50, 1, [0, 1, 2, 3]),
        (100, 50, 70, 2, [0, 2]),
        (101, 50, 70, 3, [1, 3]),
    ]


@pytest.mark.parametrize(("length", "branches"), [(SHORT, 1), (LONG, 3)])
def test_a_short_shared_run_is_private(length: int, branches: int) -> None:
    readers = [reader(row, chain(length), [1] * 9) for row in range(3)]
    assert build_segments(readers).max_branches == branches


def test_a_short_shared_run_goes_to_the_longer_one_below_it() -> None:
    root, below = Node("root", 0, (1,) * SHORT), Node("below", SHORT, (2,) * LONG)
    readers = [reader(0, [root, below], []), reader(1, [root], []), reader(2, [root, below], [])]
    assert items(build_segments(readers)) == [
        (100, 0, SHORT, 1, [0, 2]),
        (100, SHORT, SHORT + LONG, 2, [0, 2]),
        (101, 0, SHORT, 1, [1]),
    ]


def test_a_short_shared_run_below_a_shared_one_goes_to_the_longer_one_below_it() -> None:
    prefix = chain(LONG, SHORT, LONG)
    readers = [reader(row, prefix[:depth], []) for row, depth in enumerate([3, 3, 2, 1])]
    assert items(build_segments(readers)) == [
        (100, 0, LONG, 1, [0, 1, 2, 3]),
        (100, LONG, LONG + SHORT + LONG, 1, [0, 1]),
        (102, LONG, LONG + SHORT, 1, [2]),
    ]


def test_a_row_that_reads_less_than_its_node_bounds_the_shared_segment() -> None:
    prefix = chain(100)
    longer, shorter = reader(0, prefix, []), reader(1, prefix, [])
    assert items(build_segments([longer, shorter._replace(end=60)])) == [
        (100, 0, 60, 1, [0, 1]),
        (100, 60, 100, 1, [0]),
    ]


def test_a_shared_run_begins_where_a_bounded_one_above_it_ends() -> None:
    prefix = chain(100, 50)
    readers = [reader(row, prefix, []) for row in range(2)]
    shorter = reader(2, prefix[:1], [])._replace(end=60)
    assert items(build_segments([*readers, shorter])) == [
        (100, 0, 60, 1, [0, 1, 2]),
        (100, 60, 150, 1, [0, 1]),
    ]


def test_no_rows_and_empty_rows() -> None:
    assert items(build_segments([])) == []
    assert items(build_segments([Reader(100, [], TableRuns([(0, 1)]), 0)])) == []
    assert build_segments([]).max_branches == 0
