"""Inputs of the decode kernels, laid out as SGLang lays them out, filled with random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernel_cases import H_KV, H_Q, HEAD_DIM, Case
from patternkv_kernels import DecodePlan, LayerTables, SlotFormat

KV = tuple[torch.Tensor, torch.Tensor]
"""Unpacked K and V, ``[num_pages, page_size, h_kv, d]`` each."""


@dataclass(frozen=True)
class Tree:
    """Where the tokens of a case lie.

    Attributes:
        pages: int32 ``[branches, context // page_size]``, page of every block of positions.
        plan: the same for our kernels, segment by segment.
        slot_tables: int32 ``[case.tokens]``, the pattern table of every slot.
    """

    case: Case
    page_size: int
    pages: torch.Tensor
    plan: DecodePlan
    slot_tables: torch.Tensor

    @property
    def num_pages(self) -> int:
        return self.case.tokens // self.page_size

    def level_pages(self, level: int) -> torch.Tensor:
        """The pages of the nodes of one level, int32 ``[nodes, tokens // page_size]``."""
        lengths = [level.tokens // self.page_size for level in self.case.levels]
        first = sum(lengths[:level])
        nodes = self.case.levels[level].nodes
        return self.pages[:: self.case.branches // nodes, first : first + lengths[level]]


def build_tree(
    case: Case, page_size: int, device: torch.device | str, *, shuffle: bool = False
) -> Tree:
    """Lay out ``case`` in a pool that it fills.

    A prompt's pages follow each other, as prefill allocates them. Text that branches generate after
    a shared prefix takes its pages in turns, as decode allocates them. ``shuffle`` puts every page
    anywhere instead, as in a pool that has served for long.
    """
    if any(level.tokens % page_size for level in case.levels):
        raise ValueError(f"{case.name}: lengths must be multiples of page_size={page_size}")
    branches, columns, first = case.branches, [], 0
    for depth, level in enumerate(case.levels):
        count = level.tokens // page_size
        run = torch.arange(first, first + level.nodes * count, dtype=torch.int32, device=device)
        in_turns = run.view(count, level.nodes).t()
        nodes = in_turns if case.is_generated(depth) else run.view(level.nodes, count)
        columns.append(nodes.repeat_interleave(branches // level.nodes, dim=0))
        first += level.nodes * count
    pages = torch.cat(columns, dim=1)
    if shuffle:
        pages = torch.randperm(first, dtype=torch.int32, device=device)[pages]
    within = torch.arange(page_size, dtype=torch.int32, device=device)
    req_to_token = (pages.unsqueeze(2) * page_size + within).flatten(1)
    segments, readers = _segments(case)
    slot_tables = torch.zeros(case.tokens, dtype=torch.int32, device=device)
    for row, start, end, table in segments:
        slot_tables[req_to_token[row, start:end]] = table
    indptr = [0]
    for rows in readers:
        indptr.append(indptr[-1] + len(rows))
    plan = DecodePlan(
        req_to_token,
        *(
            torch.tensor(x, dtype=torch.int32, device=device)
            for x in (segments, indptr, [row for rows in readers for row in rows])
        ),
    )
    return Tree(case, page_size, pages, plan, slot_tables)


def _segments(case: Case) -> tuple[list[tuple[int, int, int, int]], list[range]]:
    """``(row, start, end, table)`` of each node with tokens, and the rows that read it."""
    segments, readers = [], []
    start = first_table = 0
    for depth, level in enumerate(case.levels):
        each = case.branches // level.nodes
        if case.is_generated(depth):
            above = case.levels[depth - 1].nodes
            first = first_table - above
            tables = [first + node * above // level.nodes for node in range(level.nodes)]
        else:
            tables = list(range(first_table, first_table + level.nodes))
            first_table += level.nodes
        if level.tokens:
            for node, table in enumerate(tables):
                segments.append((node * each, start, start + level.tokens, table))
                readers.append(range(node * each, (node + 1) * each))
        start += level.tokens
    return segments, readers


def random_queries(case: Case, device: torch.device) -> torch.Tensor:
    """bfloat16 ``[branches, h_q, d]``."""
    return torch.randn(case.branches, H_Q, HEAD_DIM, dtype=torch.bfloat16, device=device)


def random_kv(tree: Tree, dtype: torch.dtype) -> KV:
    """Unpacked K and V of every slot."""
    shape = (tree.num_pages, tree.page_size, H_KV, HEAD_DIM)
    device = tree.pages.device
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device).to(dtype) for _ in range(2))
    return k, v


def random_pool(fmt: SlotFormat, tree: Tree, patterns: int) -> torch.Tensor:
    """A packed pool with random codes, pattern ids below ``patterns`` and scales of 0.05 to 0.5."""
    pool = fmt.allocate(tree.case.tokens, tree.pages.device).random_(256)
    views = fmt.views(pool)
    for ids in (views.k_pattern_id, views.v_pattern_id):
        ids.random_(patterns)
    for scale in (views.k_scale, views.v_scale):
        scale.uniform_(0.05, 0.5)
    return pool


def random_tables(case: Case, patterns: int, device: torch.device) -> LayerTables:
    """Tables of normal patterns, with channel scales of 0.5 to 2."""
    tables = LayerTables.allocate(case.tables, H_KV, patterns, HEAD_DIM, device)
    tables.patterns.normal_()
    tables.channel_scale.uniform_(0.5, 2.0)
    return tables
