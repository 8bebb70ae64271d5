"""Store and dequantize: what is written, what is read back, and that batching changes nothing."""

from __future__ import annotations

import pytest
import torch

from patternkv_kernels import (
    LayerTables,
    MinedTable,
    SlotFormat,
    WindowWrite,
    dequantize,
    mine_table,
    store_kv,
)
from patternkv_kernels.format import HEAD_DIMS
from patternkv_kernels.store_reference import fit, nearest_pattern
from tests.cases import BITS_KV, DEVICES, NUM_TABLES, PAGE_SIZES, formula, random_tables


def random_kv(n: int, h: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.empty(2, 1, h, d).uniform_(0.2, 3.0, generator=generator)
    k, v = (torch.randn(2, n, h, d, generator=generator) * spread).bfloat16()
    return k, v


def mirrored(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its second half of dims equal to the first."""
    half = x.shape[-1] // 2
    return torch.cat([x[..., :half], x[..., :half]], dim=-1)


def with_ties(patterns: torch.Tensor) -> torch.Tensor:
    """``patterns [..., m, d]`` whose last half are the first half with the halves of dims swapped.

    A mirrored token is exactly as far from one as from the other, which rounding would hide.
    """
    first = patterns[..., : patterns.shape[-2] // 2, :]
    return torch.cat([first, first.roll(first.shape[-1] // 2, dims=-1)], dim=-2)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS_KV)
def test_dequantize_follows_the_formula(bits: tuple[int, int], d: int, page_size: int) -> None:
    fmt = SlotFormat(*bits, d, page_size, h_kv=2)
    buffer = fmt.allocate(8 * page_size + 64 // page_size * page_size, "cpu")
    tables = random_tables(2, d, seed=3)
    k, v = random_kv(20, 2, d)
    slots = torch.randperm(buffer.shape[0] * page_size, generator=torch.manual_seed(0))[:20]
    table_ids = torch.arange(20) % NUM_TABLES
    store_kv(fmt, buffer, slots, k, v, tables, table_ids)
    expected = formula(fmt, buffer, slots, tables, table_ids)
    for x, reference in zip(
        dequantize(fmt, buffer, slots, tables, table_ids), expected, strict=True
    ):
        torch.testing.assert_close(x.double(), reference, rtol=1e-5, atol=1e-5)
    for x, reference in zip(
        dequantize(fmt, buffer, slots, tables, table_ids, torch.bfloat16), expected, strict=True
    ):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), reference, rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS_KV)
def test_error_is_within_half_a_covering_step(bits: tuple[int, int], device: str) -> None:
    """A step that covers the largest residual errs by at most half of it per channel; the search
    never does worse."""
    d, n = 128, 300
    fmt = SlotFormat(*bits, d, h_kv=2)
    tables = random_tables(2, d, seed=1)
    k, v = random_kv(n, 2, d)
    buffer = fmt.allocate(n, device)
    on_device = tables.to(device)
    slots = torch.arange(n, device=device)
    table_ids = torch.full((n,), 2, device=device)
    store_kv(fmt, buffer, slots, k.to(device), v.to(device), on_device, table_ids)
    stored = dequantize(fmt, buffer, slots, on_device, table_ids)
    views = fmt.views(buffer)
    for side, (x, back, ids, b) in enumerate(
        ((k, stored[0], views.k_pattern_id, bits[0]), (v, stored[1], views.v_pattern_id, bits[1]))
    ):
        ids = ids.squeeze(2).long().cpu()
        pattern = tables.patterns[2, side].float()[torch.arange(2), ids]
        channel_scale = tables.channel_scale[2, side].float()
        residual = (x.float() - pattern) / channel_scale
        step = residual.abs().amax(-1) / ((2**b - 1) / 2)
        bound = (step.unsqueeze(-1) * channel_scale / 2).square().sum(-1)
        error = (back.cpu() - x.float()).square().sum(-1)
        assert (error <= bound * 1.01).all()


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.1188), (4, 0.01154)])
def test_scales_of_gaussian_residuals_are_optimal(bits: int, limit: float) -> None:
    """Uniform quantizers of a Gaussian reach these distortions at best (Max 1960, table II).

    A scale per token may undercut them slightly, since it adapts to the sample; the limit allows 3
    % above.
    """
    residual = torch.randn(400, 1, 256, generator=torch.manual_seed(0))
    channel_scale = torch.ones_like(residual)
    codes, scale = fit(residual, channel_scale, bits)
    back = scale.float().unsqueeze(2) * (codes.float() - (2**bits - 1) / 2)
    assert (back - residual).square().mean() < 1.03 * limit


@pytest.mark.parametrize("bits", BITS_KV)
def test_sinks_are_stored_exactly(bits: tuple[int, int]) -> None:
    n, d = 200, 64
    k, v = random_kv(n, 2, d)
    k[:4] *= 20
    fmt = SlotFormat(*bits, d, h_kv=2)
    tables = LayerTables.allocate(2, 2, 32, d, "cpu")
    mined = [mine_table(x, num_patterns=32, num_sinks=4) for x in (k, v)]
    tables.write(1, *mined)
    buffer = fmt.allocate(n, "cpu")
    table_ids = torch.ones(n, dtype=torch.int32)
    store_kv(fmt, buffer, torch.arange(n), k, v, tables, table_ids)
    back = dequantize(fmt, buffer, torch.arange(4), tables, table_ids[:4], torch.bfloat16)
    assert torch.equal(back[0], k[:4])
    assert torch.equal(back[1], v[:4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [(4, 4), (4, 2)])
@pytest.mark.parametrize("h_kv", [1, 2])
def test_batching_never_changes_bytes(h_kv: int, bits: tuple[int, int], device: str) -> None:
    n, d = 333, 96
    fmt = SlotFormat(*bits, d, h_kv=h_kv)
    tables = random_tables(h_kv, d, seed=5)
    tables.patterns.copy_(with_ties(tables.patterns))
    tables = tables.to(device)
    k, v = (mirrored(x).to(device) for x in random_kv(n, h_kv, d))
    generator = torch.Generator().manual_seed(0)
    table_ids = torch.randint(NUM_TABLES, (n,), generator=generator).to(device)

    def stored(*batches: torch.Tensor) -> torch.Tensor:
        buffer = fmt.allocate(n, device)
        for batch in batches:
            batch = batch.to(device)
            store_kv(fmt, buffer, batch, k[batch], v[batch], tables, table_ids[batch])
        return buffer

    together = stored(torch.arange(n))
    shuffled = torch.randperm(n, generator=generator)
    assert torch.equal(together, stored(shuffled))
    assert torch.equal(together, stored(*torch.arange(n).split(7)))
    alone = stored(*shuffled[:40].split(1))
    assert torch.equal(together[shuffled[:40]], alone[shuffled[:40]])
    one_table = stored(*((table_ids.cpu() == t).nonzero().squeeze(1) for t in range(NUM_TABLES)))
    assert torch.equal(together, one_table)


@pytest.mark.parametrize("h_kv", [1, 2, 3, 8])
def test_pages_hold_the_same_bytes_as_single_slots(h_kv: int) -> None:
    n = 48
    k, v = random_kv(n, h_kv, 64)
    tables = random_tables(h_kv, 64, seed=0)
    table_ids = torch.zeros(n, dtype=torch.int64)
    stored = []
    for page_size in (1, 3, 16):
        fmt = SlotFormat(4, 2, 64, page_size, h_kv=h_kv)
        buffer = fmt.allocate(n, "cpu")
        store_kv(fmt, buffer, torch.arange(n), k, v, tables, table_ids)
        stored.append([view.transpose(1, 2).flatten(0, 1) for view in fmt.views(buffer)])
    for single, *paged in zip(*stored, strict=True):
        assert all(torch.equal(single, pages) for pages in paged)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_only_the_given_slots_are_written(page_size: int) -> None:
    fmt = SlotFormat(2, 2, 64, page_size, h_kv=3)
    assert (fmt.padding_offset < fmt.page_bytes) == (page_size != 16)
    buffer = fmt.allocate(48, "cpu").fill_(0xAB)
    k, v = random_kv(3, 3, 64)
    tables = random_tables(3, 64, seed=0)
    store_kv(fmt, buffer, torch.tensor([5, 17, 47]), k, v, tables, torch.zeros(3).long())
    written = torch.zeros(48, dtype=torch.bool)
    written[[5, 17, 47]] = True
    for section in fmt.sections(buffer):
        by_slot = section.transpose(1, 2).flatten(0, 1).flatten(1)
        assert (by_slot[~written] == 0xAB).all()
        assert (by_slot[written] != 0xAB).any(1).all()
    assert (buffer[:, fmt.padding_offset :] == 0xAB).all()


def test_garbage_tokens_poison_nothing() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 64, seed=0)
    k, v = random_kv(6, 2, 64)
    table_ids = torch.zeros(6, dtype=torch.int64)
    clean = fmt.allocate(6, "cpu")
    store_kv(fmt, clean, torch.arange(6), k, v, tables, table_ids)
    k[1], v[1] = torch.nan, torch.inf
    k[2, 0, 3], v[2, 1, 5] = -torch.inf, 3e38
    buffer = fmt.allocate(6, "cpu")
    store_kv(fmt, buffer, torch.arange(6), k, v, tables, table_ids)
    assert torch.equal(buffer[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])
    for x in dequantize(fmt, buffer, torch.arange(6), tables, table_ids):
        assert x.isfinite().all()


def test_the_padding_slot_may_be_written_many_times() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 64, seed=0)
    k, v = random_kv(8, 2, 64)
    slots = torch.tensor([0, 3, 0, 0, 5, 0, 0, 0])
    buffer = fmt.allocate(8, "cpu")
    store_kv(fmt, buffer, slots, k, v, tables, torch.zeros(8).long())
    alone = fmt.allocate(8, "cpu")
    for i in (1, 4):
        one = slice(i, i + 1)
        store_kv(fmt, alone, slots[one], k[one], v[one], tables, torch.zeros(1).long())
    assert torch.equal(buffer[1:], alone[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [1, 70, 9000])
def test_windows_keep_tokens_bit_by_bit(n: int, index_dtype: torch.dtype, device: str) -> None:
    """Every other token, also what a slot cannot hold; nothing but its own rows changes."""
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 64, seed=0).to(device)
    k, v = random_kv(n, 2, 64)
    k[0, 0], v[0, 1, 3] = torch.nan, torch.inf
    k, v = k.to(device), v.to(device)
    slots = torch.arange(n, device=device)
    table_ids = torch.arange(n, device=device) % NUM_TABLES
    num_rings, size = -(-2 * n // 16), 16
    rows = torch.randperm(num_rings * size, generator=torch.Generator().manual_seed(1))[:n]
    index = torch.where(torch.arange(n) % 2 == 0, rows, -1 - rows)
    before = torch.full((2, num_rings, size, 2, 64), 7.0, dtype=k.dtype)
    window_k, window_v = before.to(device)
    window = WindowWrite(window_k, window_v, index.to(device, index_dtype))
    buffer, plain = fmt.allocate(n, device), fmt.allocate(n, device)
    store_kv(fmt, buffer, slots, k, v, tables, table_ids, window=window)
    store_kv(fmt, plain, slots, k, v, tables, table_ids)
    assert torch.equal(buffer, plain)
    for ring, x, expected in zip((window_k, window_v), (k, v), before, strict=True):
        expected.flatten(0, 1)[rows[::2]] = x.cpu()[::2]
        assert torch.equal(ring.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("device", DEVICES)
def test_padding_rows_may_share_a_row_of_a_window(device: str) -> None:
    """It holds parts of theirs; the rest is as without them."""
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 64, seed=0).to(device)
    k, v = (x.to(device) for x in random_kv(40, 2, 64))
    slots = table_ids = torch.zeros(40, dtype=torch.int64, device=device)
    index = torch.arange(40, device=device).clamp_max(24)
    window = WindowWrite(*torch.zeros(2, 4, 8, 2, 64, dtype=k.dtype, device=device), index)
    store_kv(fmt, fmt.allocate(1, device), slots, k, v, tables, table_ids, window=window)
    for ring, x in ((window.k.flatten(0, 1), k), (window.v.flatten(0, 1), v)):
        assert torch.equal(ring[:24], x[:24])
        assert (ring[24] == x[24:]).any(0).all()
        assert not ring[25:].any()


def test_windows_that_do_not_fit_the_tokens_are_refused() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    tables = random_tables(2, 64, seed=0)
    k, v = random_kv(3, 2, 64)
    slots = table_ids = torch.zeros(3, dtype=torch.int64)
    ring = torch.zeros(2, 8, 2, 64, dtype=k.dtype)
    for window, message in (
        (WindowWrite(ring.float(), ring.float(), slots), "rings are torch.float32 and tokens"),
        (WindowWrite(ring[..., :32], ring[..., :32], slots), r"need \[num_rings, window, 2, 64\]"),
        (WindowWrite(ring, ring[:1], slots), "both alike"),
        (WindowWrite(ring[:, ::2], ring[:, ::2], slots), "must be contiguous"),
        (WindowWrite(ring, ring, slots[:2]), r"index is torch.int64 \[2\]"),
        (WindowWrite(ring, ring, slots.float()), "index is torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            store_kv(fmt, fmt.allocate(1, "cpu"), slots, k, v, tables, table_ids, window=window)
    assert not ring.any()


def test_zero_vectors_and_patterns_come_back_exactly() -> None:
    fmt = SlotFormat(2, 2, 64, h_kv=1)
    tables = LayerTables.allocate(1, 1, 4, 64, "cpu")
    buffer = fmt.allocate(4, "cpu").fill_(0xFF)
    zeros = torch.zeros(4, 1, 64)
    store_kv(fmt, buffer, torch.arange(4), zeros, zeros, tables, torch.zeros(4).long())
    for x in dequantize(fmt, buffer, torch.arange(4), tables, torch.zeros(4).long()):
        assert torch.equal(x, zeros)
    assert (fmt.views(buffer).k_pattern_id == 0).all()


def test_no_tokens_is_a_no_op() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    buffer = fmt.allocate(4, "cpu")
    tables = random_tables(2, 64, seed=0)
    nothing = torch.zeros(0, dtype=torch.int64)
    store_kv(fmt, buffer, nothing, *torch.zeros(2, 0, 2, 64), tables, nothing)
    assert not buffer.any()
    for x in dequantize(fmt, buffer, nothing, tables, nothing):
        assert x.shape == (0, 2, 64)


@pytest.mark.parametrize("num_patterns", [1, 3, 64, 256])
def test_nearest_pattern_matches_brute_force(num_patterns: int) -> None:
    generator = torch.Generator().manual_seed(num_patterns)
    x = torch.randn(2, 100, 64, generator=generator)
    patterns = torch.randn(2, num_patterns, 64, generator=generator).half()
    distance = (x.double().unsqueeze(2) - patterns.double().unsqueeze(1)).square().sum(3)
    assert torch.equal(nearest_pattern(x, patterns), distance.argmin(2))


@pytest.mark.parametrize("octaves", [0, 14])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_exact_ties_go_to_the_lowest_id(d: int, octaves: int) -> None:
    """Also when components span many octaves, where products of floats do not sum exactly."""
    generator = torch.Generator().manual_seed(d)

    def spread(*shape: int) -> torch.Tensor:
        exponent = octaves * torch.rand(*shape, generator=generator)
        return torch.randn(*shape, generator=generator) * torch.exp2(-exponent)

    x = mirrored(spread(2, 300, d) * spread(2, 300, d))
    patterns = with_ties(spread(2, 32, d).half())
    ids = nearest_pattern(x, patterns)
    assert ids.max() < 16
    assert torch.equal(ids[:, :1], nearest_pattern(x[:, :1], patterns))


def test_repeated_patterns_are_never_chosen() -> None:
    mined = MinedTable(torch.randn(1, 3, 64).half(), torch.ones(1, 64).half())
    tables = LayerTables.allocate(2, 1, 100, 64, "cpu")
    tables.write(1, mined, mined)
    assert torch.equal(tables.k_patterns[1, :, 3:], mined.patterns[:, :1].expand(1, 97, 64))
    x = torch.cat([mined.patterns.float(), torch.randn(1, 500, 64)], dim=1)
    ids = nearest_pattern(x, tables.k_patterns[1])
    assert ids[0, :3].tolist() == [0, 1, 2]
    assert ids.max() < 3


def test_tables_are_written_one_by_one() -> None:
    tables = LayerTables.allocate(3, 2, 8, 64, "cpu")
    mined = MinedTable(torch.full((2, 8, 64), 2.0).half(), torch.full((2, 64), 0.5).half())
    tables.write(1, mined, mined)
    assert torch.equal(tables.v_patterns[1], mined.patterns)
    assert torch.equal(tables.channel_scale[1, 0], mined.channel_scale)
    assert not tables.patterns[[0, 2]].any()
    assert (tables.channel_scale[[0, 2]] == 1).all()
    assert (tables.channel_weight[[0, 2]] == 1).all()
    assert tables.nbytes == 3 * 2 * 2 * (8 + 2) * 64 * 2


def test_shapes_that_do_not_fit_the_pool_are_refused() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    buffer = fmt.allocate(8, "cpu")
    tables = random_tables(2, 64, seed=0)
    k, v = random_kv(3, 2, 64)
    slots = table_ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k is \[3, 1, 64\]"):
        store_kv(fmt, buffer, slots, k[:, :1], v, tables, table_ids)
    with pytest.raises(ValueError, match=r"table_ids \[2\]"):
        store_kv(fmt, buffer, slots, k, v, tables, table_ids[:2])
    with pytest.raises(ValueError, match=r"table_ids \[2\]"):
        dequantize(fmt, buffer, slots, tables, table_ids[:2])
    one_head = random_tables(1, 64, seed=0)
    with pytest.raises(ValueError, match="do not fit 2 KV heads"):
        store_kv(fmt, buffer, slots, k, v, one_head, table_ids)
    with pytest.raises(ValueError, match="do not fit 2 KV heads"):
        dequantize(fmt, buffer, slots, one_head, table_ids)


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="num_patterns=257"):
        LayerTables.allocate(1, 1, 257, 64, "cpu")
    with pytest.raises(ValueError, match="d=80"):
        LayerTables.allocate(1, 1, 8, 80, "cpu")
    with pytest.raises(ValueError, match="num_tables=0"):
        LayerTables.allocate(0, 1, 8, 64, "cpu")
    tables = LayerTables.allocate(1, 1, 8, 64, "cpu")
    large = MinedTable(torch.zeros(1, 9, 64).half(), torch.ones(1, 64).half())
    with pytest.raises(ValueError, match="9 patterns"):
        tables.write(0, large, large)
