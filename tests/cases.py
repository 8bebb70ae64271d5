"""The decode matrix, the random packed caches it runs on and what a packed cache means, shared by
every suite that checks kernels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch

from patternkv_kernels import (
    DecodePlan,
    LayerTables,
    SlotFormat,
    SlotSource,
    Window,
    dequantize,
)

# conftest.py skips what is marked gpu where there is none.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

BITS_KV = ((4, 4), (4, 2), (2, 2), (2, 4))
PAGE_SIZES = (1, 3, 16, 64)
NUM_TABLES = 5


@dataclass(frozen=True)
class Segment:
    """``length`` tokens read by the batch rows ``rows``; a tree lists ancestors before
    descendants."""

    length: int
    rows: tuple[int, ...]


def balanced_tree(depth: int, branches: int, shared: int, private: list[int]) -> list[Segment]:
    """``depth`` shared levels, each splitting its groups in two, then one private suffix per
    branch.

    Suffix lengths repeat from ``private``.
    """
    segments = []
    for level in range(depth):
        num_groups = min(2**level, branches)
        bounds = [branches * i // num_groups for i in range(num_groups + 1)]
        for first, last in itertools.pairwise(bounds):
            segments.append(Segment(shared // (level + 1), tuple(range(first, last))))
    for row in range(branches):
        segments.append(Segment(private[row % len(private)], (row,)))
    return segments


@dataclass(frozen=True)
class DecodeCase:
    """One point of the matrix."""

    name: str
    bits: tuple[int, int] = (4, 4)
    d: int = 64
    h_kv: int = 2
    group: int = 3
    page_size: int = 1
    window: int = 0
    logit_cap: float = 0.0
    dtype: torch.dtype = torch.float32
    num_patterns: int = 16
    tree: list[Segment] = field(default_factory=lambda: balanced_tree(1, 4, 90, [20, 0, 1, 33]))


CASES = [
    *(DecodeCase(f"bits{k}{v}", bits=(k, v)) for k, v in BITS_KV),
    *(DecodeCase(f"d{d}", d=d, bits=(4, 2)) for d in (96, 128, 256)),
    *(DecodeCase(f"group{g}", group=g, h_kv=1) for g in (1, 2, 7, 16)),
    *(DecodeCase(f"page{p}", page_size=p, bits=(2, 2)) for p in (3, 16, 64)),
    *(DecodeCase(f"window{w}", window=w) for w in (1, 8, 64)),
    *(DecodeCase(f"depth{n}", tree=balanced_tree(n, 8, 80, [9, 1, 40])) for n in (2, 3, 4)),
    *(DecodeCase(f"branches{b}", tree=balanced_tree(1, b, 64, [5, 12])) for b in (1, 2, 17, 64)),
    DecodeCase("unshared", tree=balanced_tree(0, 5, 0, [300, 7, 64, 0, 129])),
    DecodeCase("only_shared", tree=balanced_tree(1, 6, 100, [0])),
    DecodeCase("one_token", tree=balanced_tree(1, 3, 1, [0])),
    DecodeCase("nothing", tree=balanced_tree(1, 3, 0, [0])),
    DecodeCase("only_window", tree=balanced_tree(1, 3, 0, [0]), window=8),
    DecodeCase("many_chunks", tree=balanced_tree(1, 3, 1500, [600, 255, 256])),
    DecodeCase("logit_cap", logit_cap=5.0, window=8),
    DecodeCase("bf16", dtype=torch.bfloat16, window=8, d=128),
]


@dataclass(frozen=True)
class DecodeInputs:
    """Arguments of ``tree_decode``, and the segments they were made from."""

    case: DecodeCase
    q: torch.Tensor
    fmt: SlotFormat
    buffer: torch.Tensor
    tables: LayerTables
    plan: DecodePlan
    window: Window | None
    sm_scale: float
    segment_slots: list[torch.Tensor]
    segment_tables: list[int]

    @property
    def args(self) -> tuple[torch.Tensor, SlotFormat, torch.Tensor, LayerTables, DecodePlan]:
        return self.q, self.fmt, self.buffer, self.tables, self.plan

    @property
    def options(self) -> dict[str, object]:
        return {
            "window": self.window,
            "sm_scale": self.sm_scale,
            "logit_cap": self.case.logit_cap,
        }


def random_tables(h_kv: int, d: int, seed: int, num_patterns: int = 16) -> LayerTables:
    """Tables of random patterns and channel scales between 1/2 and 2; the last table is NaN and
    must not be read."""
    generator = torch.Generator().manual_seed(seed)
    tables = LayerTables.allocate(NUM_TABLES + 1, h_kv, num_patterns, d, "cpu")
    tables.patterns.copy_(torch.randn(tables.patterns.shape, generator=generator))
    tables.channel_scale.copy_(
        torch.empty(tables.channel_scale.shape).uniform_(0.5, 2.0, generator=generator)
    )
    tables.patterns[-1] = math.nan
    tables.channel_scale[-1] = math.nan
    tables.channel_weight[-1] = math.nan
    return tables


def fill_slots(
    fmt: SlotFormat, buffer: torch.Tensor, slots: torch.Tensor, num_patterns: int, seed: int
) -> None:
    """Give ``slots`` random codes, pattern ids and scales."""
    generator = torch.Generator().manual_seed(seed)
    page, offset = slots // fmt.page_size, slots % fmt.page_size
    for view in fmt.views(buffer):
        shape = view[page, :, offset].shape
        if view.dtype == torch.float16:
            value = torch.empty(shape).uniform_(0.05, 0.5, generator=generator).half()
        else:
            high = 256 if view.dim() == 4 else num_patterns
            value = torch.randint(high, shape, generator=generator).to(torch.uint8)
        view[page, :, offset] = value


def chosen(fmt: SlotFormat, buffer: torch.Tensor, slots: torch.Tensor, side: int) -> torch.Tensor:
    """Pattern ids of ``slots``, int64 ``[n, h_kv]``."""
    views = fmt.views(buffer)
    ids = views.v_pattern_id if side else views.k_pattern_id
    return ids[slots // fmt.page_size, :, slots % fmt.page_size].long()


def formula(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``slots`` by the definition in ``SlotFormat``, float64 ``[n, h_kv, d]`` each."""
    views = fmt.views(buffer)
    page, offset = slots // fmt.page_size, slots % fmt.page_size
    heads = torch.arange(fmt.h_kv, device=buffer.device)
    table = table_ids.long().unsqueeze(1)
    sides = []
    for side, (codes, scale, bits) in enumerate(
        ((views.k_codes, views.k_scale, fmt.k_bits), (views.v_codes, views.v_scale, fmt.v_bits))
    ):
        packed = codes[page, :, offset].int().unsqueeze(3)
        shifts = torch.arange(0, 8, bits, device=buffer.device)
        level = (packed >> shifts & 2**bits - 1).flatten(2).double() - (2**bits - 1) / 2
        step = scale[page, :, offset].double().unsqueeze(2)
        step = step * tables.channel_scale[table, side, heads].double()
        pattern = tables.patterns[table, side, heads, chosen(fmt, buffer, slots, side)]
        sides.append(pattern.double() + step * level)
    return sides[0], sides[1]


def make_inputs(case: DecodeCase, seed: int = 0) -> DecodeInputs:
    """Random inputs for ``case`` on the CPU.

    Slots are shuffled over the pool. Everything that must not be read is poisoned: free slots are
    0xff bytes (scales of NaN), free ``req_to_token`` entries point to one of them, and ring entries
    outside the window are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    b = 1 + max(row for segment in case.tree for row in segment.rows)
    fmt = SlotFormat(*case.bits, case.d, case.page_size, h_kv=case.h_kv)
    total = sum(segment.length for segment in case.tree)
    num_pages = (total + 16) // case.page_size + 1
    num_slots = num_pages * case.page_size
    buffer = fmt.allocate(num_slots, "cpu").fill_(0xFF)
    order = torch.randperm(num_slots, generator=generator)
    fill_slots(fmt, buffer, order[:total], case.num_patterns, seed)

    context = max(
        sum(segment.length for segment in case.tree if row in segment.rows) for row in range(b)
    )
    req_to_token = torch.full((b + 1, context + 1), int(order[-1]), dtype=torch.int32)
    length = [0] * b
    segments, indptr, rows = [], [0], []
    segment_slots, segment_tables = [], []
    taken = 0
    for segment in case.tree:
        slots = order[taken : taken + segment.length]
        taken += segment.length
        start = length[segment.rows[0]]
        for row in segment.rows:
            assert length[row] == start, "rows of a segment share all their ancestors"
            # Request i is row i + 1's: pool index and batch row differ.
            req_to_token[row + 1, start : start + segment.length] = slots.int()
            length[row] += segment.length
        table_id = int(torch.randint(NUM_TABLES, (1,), generator=generator))
        segments.append((segment.rows[0] + 1, start, start + segment.length, table_id))
        rows.extend(segment.rows)
        indptr.append(len(rows))
        segment_slots.append(slots)
        segment_tables.append(table_id)
    plan = DecodePlan(
        req_to_token,
        torch.tensor(segments, dtype=torch.int32),
        torch.tensor(indptr, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32),
    )
    q = torch.randn(b, case.h_kv * case.group, case.d, generator=generator).to(case.dtype)
    window = random_window(case, length, generator) if case.window else None
    tables = random_tables(case.h_kv, case.d, seed + 1, case.num_patterns)
    sm_scale = case.d**-0.5
    return DecodeInputs(
        case, q, fmt, buffer, tables, plan, window, sm_scale, segment_slots, segment_tables
    )


def to_list(plan: DecodePlan) -> tuple[DecodePlan, SlotSource]:
    """``plan`` with the slots of its segments one after the other, a list that ``plan_decode`` is
    to fill from the source; until then it names no slots."""
    req, start, end, table = plan.segments.long().T
    ends = (end - start).cumsum(0)
    starts = ends - (end - start)
    sources = req * plan.req_to_token.stride(0) + start - starts
    num_tokens = int(ends[-1])
    listed = DecodePlan(
        torch.full((1, num_tokens + 5), -1, dtype=torch.int32),
        torch.stack([torch.zeros_like(req), starts, ends, table], 1).int(),
        plan.row_indptr,
        plan.rows,
    )
    return listed, SlotSource(plan.req_to_token, sources, num_tokens)


def random_window(case: DecodeCase, length: list[int], generator: torch.Generator) -> Window:
    """Rings in shuffled order, with row ``i`` reading between 0 and all of its ring, wrapped
    around. Newest tokens are not in their ring yet."""
    b = len(length)
    shape = (b + 2, case.window, case.h_kv, case.d)
    k = torch.randn(shape, generator=generator)
    v = torch.randn(shape, generator=generator)
    ring = torch.randperm(b + 2, generator=generator)[:b]
    start = torch.tensor(length) + 5
    end = start + torch.tensor([(case.window * (i % 3)) // 2 for i in range(b)])
    valid = torch.zeros(shape[:2], dtype=torch.bool)
    for i in range(b):
        older = torch.arange(int(start[i]), max(int(start[i]), int(end[i]) - 1))
        valid[ring[i], older % case.window] = True
    k[~valid] = math.nan
    v[~valid] = math.nan
    new_k, new_v = (torch.randn(b, case.h_kv, case.d, generator=generator) for _ in range(2))
    for new in (new_k, new_v):
        new[start == end] = math.nan
    k, v, new_k, new_v = (x.to(case.dtype) for x in (k, v, new_k, new_v))
    return Window(k, v, ring, start, end, new_k, new_v)


def rings_afterwards(window: Window) -> list[torch.Tensor]:
    """K's and V's rings once a decode has put the newest tokens into them, as int16."""
    rows = window.end > window.start
    place = window.ring[rows], (window.end[rows] - 1) % window.k.shape[1]
    rings = [window.k.clone(), window.v.clone()]
    for ring, new in zip(rings, (window.new_k, window.new_v), strict=True):
        ring[place] = new[rows]
    return [ring.view(torch.int16) for ring in rings]


def window_tokens(window: Window, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact K and V that ``row`` reads, ``[end - start, h_kv, d]`` each."""
    start, end = int(window.start[row]), int(window.end[row])
    older = torch.arange(start, max(start, end - 1)) % window.k.shape[1]
    newest = slice(row, row + min(1, end - start))
    rings = window.k[window.ring[row], older], window.v[window.ring[row], older]
    new = window.new_k[newest], window.new_v[newest]
    return torch.cat([rings[0], new[0]]), torch.cat([rings[1], new[1]])


def dense_decode(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row float64 attention over the dequantized vectors: ``out [b, h_q, d]`` and ``lse [b,
    h_q]``."""
    case = inputs.case
    b, h_q, d = inputs.q.shape
    out, lse = torch.zeros(b, h_q, d).double(), torch.full((b, h_q), -math.inf).double()
    for row in range(b):
        ks, vs = [], []
        for i, segment in enumerate(case.tree):
            if row in segment.rows and segment.length:
                table_ids = torch.full((segment.length,), inputs.segment_tables[i])
                k, v = dequantize(
                    inputs.fmt, inputs.buffer, inputs.segment_slots[i], inputs.tables, table_ids
                )
                ks.append(k)
                vs.append(v)
        if inputs.window is not None:
            k, v = window_tokens(inputs.window, row)
            ks.append(k)
            vs.append(v)
        if not sum(len(k) for k in ks):
            continue
        k = torch.cat([k.double() for k in ks]).repeat_interleave(case.group, dim=1)
        v = torch.cat([v.double() for v in vs]).repeat_interleave(case.group, dim=1)
        logits = torch.einsum("hd,thd->ht", inputs.q[row].double(), k) * inputs.sm_scale
        if case.logit_cap:
            logits = case.logit_cap * torch.tanh(logits / case.logit_cap)
        lse[row] = logits.logsumexp(1)
        out[row] = torch.einsum("ht,thd->hd", logits.softmax(1), v)
    return out, lse
