"""The CUDA kernels of store and dequantize against the torch ops and the laws of the format."""

from __future__ import annotations

import math

import pytest
import torch

from patternkv_kernels import LayerTables, SlotFormat, WindowWrite, dequantize, store_kv
from patternkv_kernels.format import HEAD_DIMS
from tests.cases import BITS_KV, PAGE_SIZES, chosen, formula

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
NUM_TABLES = 10
# Tokens of 2 heads that fill any GPU several times: stored by `store_many`. A batch of 64 goes to
# `store_few`.
MANY = 9000


def random_tables(
    h_kv: int, num_patterns: int, d: int, seed: int = 0, device: str = DEVICE
) -> LayerTables:
    """Tables with random patterns, channel scales and (K only, as in mined tables) weights; the
    last one is NaN and must not be read."""
    generator = torch.Generator().manual_seed(seed)
    tables = LayerTables.allocate(NUM_TABLES, h_kv, num_patterns, d, "cpu")
    tables.patterns.copy_(torch.randn(tables.patterns.shape, generator=generator))
    shape = tables.channel_scale.shape
    tables.channel_scale.copy_(torch.empty(shape).uniform_(0.3, 2.0, generator=generator))
    weight = torch.empty(shape).uniform_(0.1, 3.0, generator=generator)
    tables.channel_weight[:, 0].copy_(weight[:, 0])
    for tensor in (tables.patterns, tables.channel_scale, tables.channel_weight):
        tensor[-1] = math.nan
    return tables.to(device)


def random_kv(
    n: int, h_kv: int, d: int, dtype: torch.dtype = BF16, seed: int = 0, device: str = DEVICE
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as views of a fused projection of one query head and ``h_kv`` KV heads."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(n, 1 + 2 * h_kv, d, generator=generator) * 2
    fused = fused.to(dtype).to(device)
    return fused[:, 1 : 1 + h_kv], fused[:, 1 + h_kv :]


def random_slots(
    fmt: SlotFormat, n: int, seed: int = 0, device: str = DEVICE
) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned buffer with twice ``n`` slots, and ``n`` of them in shuffled order."""
    num_slots = -(-2 * n // fmt.page_size) * fmt.page_size
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))
    return fmt.allocate(num_slots, device).fill_(0xAB), order[:n].to(device)


def random_table_ids(n: int, seed: int = 0, device: str = DEVICE) -> torch.Tensor:
    """Runs of equal tables and mixed ones, never the last table."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(NUM_TABLES - 1, (n,), generator=generator)
    ids[: n // 2] = torch.arange(n // 2) // 37 % (NUM_TABLES - 1)
    return ids.int().to(device)


def weighted_distances(
    x: torch.Tensor, tables: LayerTables, table_ids: torch.Tensor, side: int
) -> torch.Tensor:
    """Squared distances from all patterns by channel weight, float64 ``[n, h_kv, m]``."""
    n, h_kv, _ = x.shape
    out = x.new_empty(n, h_kv, tables.num_patterns, dtype=torch.float64)
    for table in table_ids.unique().tolist():
        rows = (table_ids == table).nonzero().squeeze(1)
        for head in range(h_kv):
            weight = tables.channel_weight[table, side, head].double()
            patterns = tables.patterns[table, side, head].double() * weight
            tokens = x[rows, head].double() * weight
            difference = tokens.unsqueeze(1) - patterns
            out[rows, head] = difference.square().sum(2)
    return out


def weighted_errors(
    x: torch.Tensor, back: torch.Tensor, tables: LayerTables, table_ids: torch.Tensor, side: int
) -> torch.Tensor:
    """Squared errors by channel weight, float64 ``[n, h_kv]``."""
    weight = tables.channel_weight[table_ids.long(), side].double()
    return ((back.double() - x.double()) * weight).square().sum(2)


@pytest.mark.parametrize("num_patterns", [5, 64, 256])
@pytest.mark.parametrize("h_kv", [1, 2, 8])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS_KV)
def test_store_follows_the_reference(
    bits: tuple[int, int], d: int, page_size: int, h_kv: int, num_patterns: int
) -> None:
    n = 100
    fmt = SlotFormat(*bits, d, page_size, h_kv=h_kv)
    tables = random_tables(h_kv, num_patterns, d)
    k, v = random_kv(n, h_kv, d)
    table_ids = random_table_ids(n)
    buffer, slots = random_slots(fmt, n)
    reference = buffer.clone()
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    store_kv(fmt, reference, slots, k, v, tables, table_ids, impl="reference")
    assert_as_good_as_the_reference(fmt, buffer, reference, slots, k, v, tables, table_ids)


def assert_as_good_as_the_reference(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    reference: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
) -> None:
    """Two pools that the same tokens were stored in, by the kernels and by the reference."""
    back = formula(fmt, buffer, slots, tables, table_ids)
    expected = formula(fmt, reference, slots, tables, table_ids)
    for side, (name, x) in enumerate((("K", k), ("V", v))):
        ids, reference_ids = (chosen(fmt, b, slots, side) for b in (buffer, reference))
        assert ids.max() < tables.num_patterns, f"{name}: a pattern id beyond the table"
        distance = weighted_distances(x, tables, table_ids, side)
        margin = distance.gather(2, ids.unsqueeze(2)).squeeze(2) / distance.amin(2)
        assert margin.max() <= 1.001, f"{name}: not the nearest pattern"
        same = ids == reference_ids
        assert same.double().mean() >= 0.98, f"{name}: more near ties than there can be"
        errors = weighted_errors(x, back[side], tables, table_ids, side)[same]
        reference_errors = weighted_errors(x, expected[side], tables, table_ids, side)[same]
        ratio = errors / reference_errors
        assert errors.sum() <= 1.01 * reference_errors.sum(), f"{name}: worse by {ratio.mean()}"
        # A component halfway between two codes may tip the choice of the scale, either way.
        assert ratio.flatten().quantile(0.95) <= 1.02, f"{name}: many tokens are worse"
        assert ratio.max() <= 1.5, f"{name}: one token is worse by {ratio.max()}"


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_only_the_given_slots_are_written(page_size: int) -> None:
    n, d, h_kv = 50, 96, 3
    fmt = SlotFormat(4, 2, d, page_size, h_kv=h_kv)
    tables = random_tables(h_kv, 16, d)
    k, v = random_kv(n, h_kv, d)
    buffer, slots = random_slots(fmt, n)
    store_kv(fmt, buffer, slots, k, v, tables, random_table_ids(n), impl="cuda")
    untouched = torch.ones(buffer.shape[0] * page_size, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    for section in fmt.sections(buffer):
        by_slot = section.transpose(1, 2).flatten(0, 1).flatten(1)
        assert (by_slot[untouched] == 0xAB).all()
    assert (buffer[:, fmt.padding_offset :] == 0xAB).all()


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS_KV)
def test_batching_never_changes_bytes(bits: tuple[int, int], d: int) -> None:
    """Prefill chunks, decode batches, single tokens, other neighbours and other tables next to a
    token."""
    n, h_kv = MANY, 2
    fmt = SlotFormat(*bits, d, 16, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    k, v = random_kv(n, h_kv, d)
    table_ids = random_table_ids(n)

    def stored(*batches: torch.Tensor) -> list[torch.Tensor]:
        buffer = fmt.allocate(-(-n // 16) * 16, DEVICE)
        for batch in batches:
            rows = batch.to(DEVICE)
            store_kv(fmt, buffer, rows, k[rows], v[rows], tables, table_ids[rows], impl="cuda")
        return [x.transpose(1, 2).flatten(0, 1) for x in fmt.sections(buffer)]

    def equal(left: list[torch.Tensor], right: list[torch.Tensor], rows: torch.Tensor) -> bool:
        return all(torch.equal(a[rows], b[rows]) for a, b in zip(left, right, strict=True))

    everything = torch.arange(n)
    together = stored(everything)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    some = shuffled[:500]
    assert equal(together, stored(everything), everything), "two runs differ"
    assert equal(together, stored(shuffled), everything), "order"
    assert equal(together, stored(*shuffled.split(1700)), everything), "large decode batches"
    assert equal(together, stored(*some.split(64)), some), "decode batches"
    assert equal(together, stored(*some.split(7)), some), "small decode batches"
    assert equal(together, stored(*some[:40].split(1)), some[:40]), "single tokens"
    one_table = (table_ids.cpu() == t for t in range(NUM_TABLES - 1))
    assert equal(together, stored(*(everything[t] for t in one_table)), everything), "tables"


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("n", [40, MANY])
@pytest.mark.parametrize("bits", BITS_KV)
def test_tokens_that_equal_a_pattern_come_back_exactly(
    bits: tuple[int, int], n: int, dtype: torch.dtype
) -> None:
    """Also when patterns are so alike that float32 scores cannot tell them apart."""
    d, h_kv, m = 128, 2, 64
    fmt = SlotFormat(*bits, d, h_kv=h_kv)
    tables = random_tables(h_kv, m, d)
    tables.patterns[:2] *= 20
    # Pattern 2 i + 1 is pattern 2 i but for the last bit of one component.
    tables.patterns[:2] = tables.patterns[:2].to(dtype).half()
    tables.patterns[:2, :, :, 1::2] = tables.patterns[:2, :, :, ::2]
    tables.patterns[:2, :, :, 1::2, 7] *= 1 + 2.0**-7
    tables.patterns[:2] = tables.patterns[:2].to(dtype).half()
    ids = torch.arange(n, device=DEVICE) * 5 % m
    table_ids = (torch.arange(n, device=DEVICE) // 16 % 2).int()
    k, v = (tables.patterns[table_ids.long(), side, :, ids].to(dtype) for side in range(2))
    buffer, slots = random_slots(fmt, n)
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    back = dequantize(fmt, buffer, slots, tables, table_ids, dtype, impl="reference")
    for side, x in enumerate((k, v)):
        assert torch.equal(back[side], x)
        assert (chosen(fmt, buffer, slots, side) == ids.unsqueeze(1)).all()


@pytest.mark.parametrize("n", [40, MANY])
def test_of_equal_patterns_the_lowest_id_wins(n: int) -> None:
    d, h_kv = 64, 2
    fmt = SlotFormat(4, 4, d, h_kv=h_kv)
    tables = random_tables(h_kv, 100, d)
    tables.patterns[:, :, :, 50:] = tables.patterns[:, :, :, :1]
    tables.patterns[:, :, :, 20:40] = tables.patterns[:, :, :, :20]
    k, v = random_kv(n, h_kv, d)
    buffer, slots = random_slots(fmt, n)
    store_kv(fmt, buffer, slots, k, v, tables, random_table_ids(n), impl="cuda")
    for side in range(2):
        ids = chosen(fmt, buffer, slots, side)
        assert ((ids < 20) | ((ids >= 40) & (ids < 50))).all()


@pytest.mark.parametrize("n", [40, MANY])
def test_zero_tables_and_zero_tokens(n: int) -> None:
    """A table that nothing was mined for: all patterns are 0, of which the first one counts."""
    d, h_kv = 128, 2
    fmt = SlotFormat(2, 4, d, h_kv=h_kv)
    tables = LayerTables.allocate(2, h_kv, 256, d, DEVICE)
    k, v = random_kv(n, h_kv, d)
    k[::3], v[1::3] = 0, 0
    table_ids = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    buffer, slots = random_slots(fmt, n)
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    back = dequantize(fmt, buffer, slots, tables, table_ids, impl="reference")
    assert not chosen(fmt, buffer, slots, 0).any() and not chosen(fmt, buffer, slots, 1).any()
    assert not back[0][::3].any() and not back[1][1::3].any()
    # On average the distortion of a Gaussian (Max 1960); single tokens may be unlucky.
    k_error = (back[0] - k).square().sum(2)[1::3] / k.float().square().sum(2)[1::3]
    v_error = (back[1] - v).square().sum(2)[::3] / v.float().square().sum(2)[::3]
    assert k_error.mean() < 0.13 and k_error.max() < 0.4
    assert v_error.mean() < 0.013 and v_error.max() < 0.04


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("n", [40, MANY])
def test_garbage_tokens_poison_nothing(n: int, dtype: torch.dtype) -> None:
    d, h_kv = 64, 2
    fmt = SlotFormat(4, 2, d, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    k, v = random_kv(n, h_kv, d, dtype)
    table_ids = random_table_ids(n)
    clean, slots = random_slots(fmt, n)
    buffer = clean.clone()
    store_kv(fmt, clean, slots, k, v, tables, table_ids, impl="cuda")
    k, v = k.clone(), v.clone()
    k[1], v[1] = math.nan, math.inf
    k[2, 0, 3], v[2, 1, 5] = -math.inf, torch.finfo(dtype).max
    k[9, 1, 63], v[9, 0, 0] = math.nan, -math.inf
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    good = torch.ones(n, dtype=torch.bool, device=DEVICE)
    good[[1, 2, 9]] = False
    assert torch.equal(buffer[slots[good]], clean[slots[good]])
    for x in dequantize(fmt, buffer, slots, tables, table_ids, impl="reference"):
        assert x.isfinite().all()
    zeroed = k[9].nan_to_num(nan=0.0)
    again = buffer.clone()
    store_kv(fmt, again, slots[9:10], zeroed[None], v[9:10], tables, table_ids[9:10], impl="cuda")
    assert torch.equal(again, buffer), "NaN is stored as 0"


def test_the_padding_slot_may_be_written_many_times() -> None:
    n, d, h_kv = 64, 128, 8
    fmt = SlotFormat(4, 4, d, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    k, v = random_kv(n, h_kv, d)
    table_ids = random_table_ids(n)
    buffer, slots = random_slots(fmt, n)
    slots = torch.where(slots == 0, slots.max() + 1, slots).clamp_max(2 * n - 1)
    alone = buffer.clone()
    padding = torch.arange(n, device=DEVICE) % 3 > 0
    store_kv(fmt, buffer, slots.masked_fill(padding, 0), k, v, tables, table_ids, impl="cuda")
    kept = ~padding
    store_kv(fmt, alone, slots[kept], k[kept], v[kept], tables, table_ids[kept], impl="cuda")
    assert torch.equal(buffer[1:], alone[1:])


def test_argument_forms_do_not_matter() -> None:
    n, d, h_kv = 70, 128, 2
    fmt = SlotFormat(4, 4, d, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    k, v = random_kv(n, h_kv, d)
    table_ids = random_table_ids(n)
    expected, slots = random_slots(fmt, n)
    empty = expected.clone()
    store_kv(fmt, expected, slots, k, v, tables, table_ids, impl="cuda")
    shifted = torch.empty(n * h_kv * d + 1, dtype=BF16, device=DEVICE)[1:].view(n, h_kv, d)
    shifted.copy_(k)
    for name, arguments in {
        "contiguous": (slots, k.contiguous(), v.contiguous(), table_ids),
        "unaligned": (slots, shifted, v, table_ids),
        "head by head": (slots, k.transpose(0, 1).contiguous().transpose(0, 1), v, table_ids),
        "strided dims": (slots, k.transpose(1, 2).contiguous().transpose(1, 2), v, table_ids),
        "int32 slots": (slots.int(), k, v, table_ids),
        "int64 tables": (slots, k, v, table_ids.long()),
        "strided tables": (slots, k, v, table_ids.repeat_interleave(2)[::2]),
    }.items():
        buffer = empty.clone()
        at, keys, values, ids = arguments
        store_kv(fmt, buffer, at, keys, values, tables, ids, impl="cuda")
        assert torch.equal(buffer, expected), name


def test_no_tokens_is_a_no_op() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 16, 64)
    buffer = fmt.allocate(4, DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    k, v = random_kv(0, 2, 64)
    store_kv(fmt, buffer, nothing, k, v, tables, nothing, impl="cuda")
    assert not buffer.any()
    for x in dequantize(fmt, buffer, nothing, tables, nothing, impl="cuda"):
        assert x.shape == (0, 2, 64)


def test_a_captured_store_follows_its_inputs() -> None:
    n, d, h_kv = 64, 128, 2
    fmt = SlotFormat(4, 4, d, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    table_ids = random_table_ids(n)
    buffer, slots = random_slots(fmt, n)
    expected = buffer.clone()
    k, v = (x.clone() for x in random_kv(n, h_kv, d))
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    other_k, other_v = random_kv(n, h_kv, d, seed=1)
    k.copy_(other_k)
    v.copy_(other_v)
    graph.replay()
    store_kv(fmt, expected, slots, k, v, tables, table_ids, impl="cuda")
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("n", [64, MANY])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_windows_keep_strided_tokens(d: int, n: int, dtype: torch.dtype) -> None:
    """Also where several tables meet in a block, and in a captured graph."""
    h_kv, size = 3, 32
    fmt = SlotFormat(4, 2, d, 16, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    k, v = random_kv(n, h_kv, d, dtype)
    table_ids = random_table_ids(n)
    buffer, slots = random_slots(fmt, n)
    expected = buffer.clone()
    num_rings = -(-n // size) + 1
    rows = torch.randperm(num_rings * size, generator=torch.Generator().manual_seed(1))[:n]
    rings = torch.zeros(2, num_rings, size, h_kv, d, dtype=dtype, device=DEVICE)
    window = WindowWrite(rings[0], rings[1], rows.to(DEVICE))
    store_kv(fmt, expected, slots, k, v, tables, table_ids, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda", window=window)
    graph.replay()
    assert torch.equal(buffer, expected)
    for ring, x in zip(rings.flatten(1, 2), (k, v), strict=True):
        assert torch.equal(ring[rows], x)
        ring[rows] = 0
        assert not ring.any()


def test_other_dtypes_go_to_the_torch_ops() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 16, 64)
    k, v = random_kv(3, 2, 64)
    buffer, slots = random_slots(fmt, 3)
    expected = buffer.clone()
    table_ids = random_table_ids(3)
    with pytest.raises(ValueError, match="the kernels take bfloat16 or float16"):
        store_kv(fmt, buffer, slots, k.float(), v.float(), tables, table_ids, impl="cuda")
    store_kv(fmt, buffer, slots, k.float(), v.float(), tables, table_ids)
    store_kv(fmt, expected, slots, k.float(), v.float(), tables, table_ids, impl="reference")
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS_KV)
def test_dequantize_rounds_the_formula(
    bits: tuple[int, int], d: int, page_size: int, dtype: torch.dtype, nan_empty: None
) -> None:
    n, h_kv = 333, 3
    fmt = SlotFormat(*bits, d, page_size, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    buffer, slots = random_slots(fmt, n)
    generator = torch.Generator().manual_seed(0)
    buffer.copy_(torch.randint(256, buffer.shape, generator=generator))
    views = fmt.views(buffer)
    for ids, scale in ((views.k_pattern_id, views.k_scale), (views.v_pattern_id, views.v_scale)):
        ids.copy_(torch.randint(64, ids.shape, generator=generator))
        scale.copy_(torch.empty(scale.shape).uniform_(0.0, 0.5, generator=generator))
    table_ids = random_table_ids(n)
    out = dequantize(fmt, buffer, slots, tables, table_ids, dtype, impl="cuda")
    for x, exact in zip(out, formula(fmt, buffer, slots, tables, table_ids), strict=True):
        assert x.dtype == dtype and x.shape == exact.shape
        # Rounded to float32 first: a value next to the middle of two may go either way.
        assert torch.equal(x, exact.float().to(dtype))


def test_dequantize_reads_many_slots(nan_empty: None) -> None:
    """More tokens than one wave of blocks, some slots more than once."""
    n, d, h_kv = 20000, 128, 8
    fmt = SlotFormat(4, 4, d, 16, h_kv=h_kv)
    tables = random_tables(h_kv, 64, d)
    k, v = random_kv(n, h_kv, d)
    table_ids = random_table_ids(n)
    buffer, slots = random_slots(fmt, n)
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="cuda")
    again = torch.randint(n, (n,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out = dequantize(fmt, buffer, slots[again], tables, table_ids[again], BF16, impl="cuda")
    expected = dequantize(fmt, buffer, slots, tables, table_ids, BF16, impl="reference")
    for x, reference in zip(out, expected, strict=True):
        torch.testing.assert_close(x, reference[again], rtol=2.0**-7, atol=1e-5)
