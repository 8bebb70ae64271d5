"""Mining: which patterns and channel scales come out, and that they always come out the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patternkv_kernels import (
    LayerTables,
    MinedTable,
    SlotFormat,
    dequantize,
    mine_kv,
    mine_table,
    query_weight,
    store_kv,
)
from patternkv_kernels.dispatch import Impl
from patternkv_kernels.store_reference import fit, nearest_pattern
from tests.simt_library import unavailable
from tests.simt_mining import simt_mine


class Mine:
    """``mine_table`` and ``mine_kv`` on CPU tensors, by the reference."""

    most = 5000
    """Tokens that it mines in a second."""

    def __init__(self, device: str = "cpu", impl: Impl = "reference") -> None:
        self.device, self.impl = device, impl

    def __call__(self, x: torch.Tensor, **options: Any) -> MinedTable:
        if (weight := options.get("channel_weight")) is not None:
            options["channel_weight"] = weight.to(self.device)
        return _on_cpu(mine_table(self.given(x), impl=self.impl, **options))

    def kv(self, *vectors: torch.Tensor, **options: Any) -> tuple[MinedTable, MinedTable]:
        k, v = mine_kv(*map(self.given, vectors), impl=self.impl, **options)
        return _on_cpu(k), _on_cpu(v)

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """As the kernel takes it."""
        low = self.impl == "cuda" and x.dtype == torch.float32
        return (x.half() if low else x).to(self.device)


class SimtMine(Mine):
    """The kernel's source, on the CPU."""

    most = 600

    def __init__(self) -> None:
        super().__init__("cpu", "cuda")

    def __call__(self, x: torch.Tensor, **options: Any) -> MinedTable:
        return simt_mine(self.given(x).contiguous(), **options)[0]

    def kv(self, *vectors: torch.Tensor, **options: Any) -> tuple[MinedTable, MinedTable]:
        q, k, v = map(self.given, vectors)
        mined_k, mined_v = simt_mine(k, v, q, **options)
        assert mined_v.channel_weight is not None and (mined_v.channel_weight == 1).all()
        return mined_k, mined_v._replace(channel_weight=None)


def _on_cpu(table: MinedTable) -> MinedTable:
    return MinedTable(*(None if x is None else x.cpu() for x in table))  # type: ignore[arg-type]


REASON = unavailable()
SIMT = pytest.param(
    SimtMine(),
    marks=[pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))],
    id="simt",
)
CUDA = pytest.param(Mine("cuda", "cuda"), marks=pytest.mark.gpu, id="cuda")
KERNEL = [SIMT, CUDA]
EVERY = [
    pytest.param(Mine(), id="reference"),
    pytest.param(Mine("cuda"), marks=pytest.mark.gpu, id="reference_cuda"),
    *KERNEL,
]
every_implementation = pytest.mark.parametrize("mine", EVERY)
# What takes the emulator too long, and says nothing that shorter tests do not.
all_but_the_emulator = pytest.mark.parametrize("mine", [x for x in EVERY if x is not SIMT])
the_kernel = pytest.mark.parametrize("mine", KERNEL)


def clustered(n: int, h: int = 2, d: int = 64, clusters: int = 12, seed: int = 0) -> torch.Tensor:
    """Tokens around a few centres, with channels of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(clusters, h, d, generator=generator)
    spread = torch.logspace(-1, 0.5, d)[torch.randperm(d, generator=generator)]
    member = torch.randint(clusters, (n,), generator=generator)
    return centres[member] + spread * torch.randn(n, h, d, generator=generator)


def relative_error(x: torch.Tensor, table: MinedTable, bits: int) -> float:
    ids = nearest_pattern(x.transpose(0, 1), table.patterns).t()
    pattern = table.patterns.float()[torch.arange(x.shape[1]), ids]
    channel_scale = table.channel_scale.float().expand_as(x)
    codes, scale = fit(x - pattern, channel_scale, bits)
    level = codes.float() - (2**bits - 1) / 2
    back = pattern + scale.float().unsqueeze(2) * channel_scale * level
    return float((back - x).square().sum() / x.square().sum())


def sampled_rows(n: int, most: int, tail: int) -> torch.Tensor:
    """Which of ``n`` rows are looked at: no more than ``most``, evenly spaced before a tail."""
    if n <= most:
        return torch.arange(n)
    spread = torch.arange(most - tail) * (n - tail) // (most - tail)
    return torch.cat([spread, torch.arange(n - tail, n)])


@every_implementation
@pytest.mark.parametrize("n", [1, 5, 32, 33, 500, 5000])
def test_same_tokens_give_the_same_bits(mine: Mine, n: int) -> None:
    n = min(n, mine.most)
    x = clustered(n)
    first = mine(x, num_patterns=32, num_sinks=min(n, 4))
    torch.randn(1000, 10) @ torch.randn(10, 10)
    # Another stride and place in memory, same values.
    again = torch.cat([x, x])[n:].transpose(0, 1).contiguous().transpose(0, 1)
    second = mine(again, num_patterns=32, num_sinks=min(n, 4))
    assert torch.equal(first.patterns, second.patterns)
    assert torch.equal(first.channel_scale, second.channel_scale)


@all_but_the_emulator
@pytest.mark.parametrize("n", [1, 2, 40, 400])
@pytest.mark.parametrize("num_patterns", [1, 16, 256])
@pytest.mark.parametrize("d", [64, 96])
def test_shapes_and_ranges(mine: Mine, n: int, num_patterns: int, d: int) -> None:
    table = mine(clustered(n, 3, d), num_patterns=num_patterns, num_sinks=1)
    assert table.patterns.shape == (3, num_patterns, d)
    assert table.channel_scale.shape == (3, d)
    assert table.patterns.dtype == table.channel_scale.dtype == torch.float16
    assert table.patterns.isfinite().all()
    assert table.channel_scale.isfinite().all()
    assert (table.channel_scale > 0).all()


@every_implementation
def test_sinks_are_the_first_patterns(mine: Mine) -> None:
    x = clustered(300).bfloat16()
    x[:4] *= 30
    table = mine(x, num_patterns=16, num_sinks=4)
    assert torch.equal(table.patterns[:, :4].transpose(0, 1).bfloat16(), x[:4])
    tiny = torch.full((1, 1, 64), 2.0**-20).bfloat16()
    table = mine(tiny, num_patterns=1, num_sinks=1)
    assert (table.patterns.float() - tiny.float()).abs().max() <= 2.0**-25


@every_implementation
def test_every_pattern_may_be_a_sink(mine: Mine) -> None:
    x = clustered(50).bfloat16()
    table = mine(x, num_patterns=4, num_sinks=4)
    assert torch.equal(table.patterns.transpose(0, 1).bfloat16(), x[:4])


@every_implementation
def test_few_tokens_are_their_own_patterns(mine: Mine) -> None:
    x = clustered(10).bfloat16()
    table = mine(x, num_patterns=16, num_sinks=2)
    assert torch.equal(table.patterns[:, :10].transpose(0, 1).bfloat16(), x)
    assert torch.equal(table.patterns[:, 10:], table.patterns[:, :1].expand(2, 6, 64))


@every_implementation
def test_one_token_and_constant_tokens(mine: Mine) -> None:
    one = torch.full((1, 1, 64), 1.5)
    for x in (one, one.expand(100, 1, 64)):
        table = mine(x, num_patterns=8, num_sinks=0)
        assert (table.patterns == 1.5).all()
        assert (table.channel_scale == 1).all()


@every_implementation
@pytest.mark.parametrize("iterations", [0, 3])
def test_outliers_get_patterns(mine: Mine, iterations: int) -> None:
    x = clustered(1000).bfloat16()
    x[[123, 777]] = (100 * torch.randn(2, 2, 64, generator=torch.manual_seed(0))).bfloat16()
    table = mine(x, num_patterns=32, num_sinks=0, iterations=iterations)
    for token in (123, 777):
        exact = (table.patterns.float() == x[token].float().unsqueeze(1)).all(2)
        assert exact.any(1).all()


@every_implementation
@pytest.mark.parametrize(("max_sample", "tail"), [(300, 64), (100, 50), (1, 0)])
def test_long_segments_are_sampled_evenly_but_for_their_end(
    mine: Mine, max_sample: int, tail: int
) -> None:
    x = clustered(2000)
    sampled = mine(x, num_patterns=16, num_sinks=4, max_sample=max_sample)
    chosen = torch.cat([x[:4], x[4:][sampled_rows(1996, max_sample, tail)]])
    whole = mine(chosen, num_patterns=16, num_sinks=4)
    assert torch.equal(sampled.patterns, whole.patterns)
    assert torch.equal(sampled.channel_scale, whole.channel_scale)


@every_implementation
def test_channel_scale_follows_the_residuals(mine: Mine) -> None:
    generator = torch.manual_seed(0)
    spread = torch.logspace(-1, 0.5, 64)
    x = torch.randn(2000, 1, 64, generator=generator) * spread
    table = mine(x, num_patterns=1, num_sinks=0)
    relative = spread / spread.square().mean().sqrt()
    torch.testing.assert_close(table.channel_scale[0].float(), relative, rtol=0.1, atol=0.0)
    assert abs(float(table.channel_scale.float().square().mean()) - 1) < 0.01


@all_but_the_emulator
@pytest.mark.parametrize("bits", [2, 4])
def test_patterns_and_channel_scale_pay(mine: Mine, bits: int) -> None:
    x = clustered(1000)
    error = {m: relative_error(x, mine(x, num_patterns=m, num_sinks=0), bits) for m in (1, 16, 64)}
    assert error[16] < 0.35 * error[1]
    assert error[64] < error[16]
    mined = mine(x, num_patterns=16, num_sinks=0)
    flat = mined._replace(channel_scale=torch.ones_like(mined.channel_scale))
    assert error[16] < 0.7 * relative_error(x, flat, bits)


@every_implementation
def test_garbage_does_not_spread(mine: Mine) -> None:
    x = clustered(200)
    x[50], x[60, 0, 3] = torch.nan, torch.inf
    table = mine(x, num_patterns=16, num_sinks=2)
    assert table.patterns.isfinite().all()
    assert (table.channel_scale > 0).all()
    assert table.channel_scale.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_patterns": 0}, "num_patterns=0"),
        ({"num_patterns": 257}, "num_patterns=257"),
        ({"num_sinks": 17}, "num_sinks=17"),
        ({"num_sinks": -1}, "num_sinks=-1"),
        ({"max_sample": 0}, "max_sample=0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, int], message: str) -> None:
    arguments = {"num_patterns": 16, "num_sinks": 4, **options}
    with pytest.raises(ValueError, match=message):
        mine_table(clustered(50), **arguments)


def test_weights_of_other_channels_are_refused() -> None:
    x = clustered(50)
    weight = torch.ones(1, x.shape[2], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"channel_weight is \[1, "):
        mine_table(x, num_patterns=8, num_sinks=0, channel_weight=weight)


def test_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        mine_table(torch.zeros(0, 2, 64), num_patterns=4, num_sinks=0)


@every_implementation
def test_weighted_channels_are_stored_better_and_sinks_stay_exact(mine: Mine) -> None:
    """What counts more errs less, in clusters and in codes, and nothing else changes."""
    x = torch.randn(300, 2, 64).bfloat16().float()
    weight = torch.ones(2, 64, dtype=torch.float16)
    weight[:, :16] = 4.0

    def stored(channel_weight: torch.Tensor | None) -> torch.Tensor:
        mined = mine(x, num_patterns=16, num_sinks=2, channel_weight=channel_weight)
        tables = LayerTables.allocate(1, 2, 16, 64, "cpu")
        tables.write(0, mined, mined)
        fmt = SlotFormat(2, 2, 64, h_kv=2)
        buffer, slots = fmt.allocate(300, "cpu"), torch.arange(300)
        table_ids = torch.zeros(300, dtype=torch.int32)
        store_kv(fmt, buffer, slots, x, x, tables, table_ids)
        return dequantize(fmt, buffer, slots, tables, table_ids)[0]

    plain, weighted = stored(None), stored(weight)
    assert torch.equal(plain, stored(torch.ones_like(weight)))
    assert torch.equal(weighted[:2], x[:2])

    def error(k: torch.Tensor) -> float:
        return float(((k - x) * weight).square().sum())

    assert error(weighted) < 0.95 * error(plain)


@every_implementation
@pytest.mark.parametrize("n", [3, 40, 3000])
def test_k_and_v_are_mined_together_as_alone(mine: Mine, n: int) -> None:
    n = min(n, mine.most)
    k, v = clustered(n, seed=1).bfloat16(), clustered(n, seed=2).bfloat16()
    q = (torch.randn(n, 6, 64) * torch.linspace(0.5, 2.0, 64)).bfloat16()
    together = mine.kv(q, k, v, num_patterns=32, num_sinks=2)
    weight = together[0].channel_weight
    assert weight is not None and together[1].channel_weight is None
    sampled = q[sampled_rows(n, 2048, 64)]
    torch.testing.assert_close(weight, query_weight(sampled, 2), rtol=2e-3, atol=0.0)
    alone = (
        mine(k, num_patterns=32, num_sinks=2, channel_weight=weight),
        mine(v, num_patterns=32, num_sinks=2),
    )
    for mined, expected, x in zip(together, alone, (k, v), strict=True):
        assert torch.equal(mined.patterns[:, :2], expected.patterns[:, :2])
        if mine.impl == "cuda":
            assert torch.equal(mined.patterns, expected.patterns)
            assert torch.equal(mined.channel_scale, expected.channel_scale)
        # Products of other batches round differently, which may tip a token to another cluster.
        torch.testing.assert_close(mined.channel_scale, expected.channel_scale, rtol=0.1, atol=0.0)
        errors = [relative_error(x.float(), table, 4) for table in (mined, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


@the_kernel
@pytest.mark.parametrize(
    ("n", "num_patterns", "num_sinks", "d"),
    [(600, 64, 4, 128), (1100, 256, 4, 64), (270, 100, 0, 96), (300, 40, 40, 256), (140, 9, 1, 64)],
)
def test_the_kernel_errs_like_the_reference(
    mine: Mine, n: int, num_patterns: int, num_sinks: int, d: int
) -> None:
    h = 1 if n > 1000 else 2
    k, v = (clustered(n, h, d, 30, seed).bfloat16() for seed in (1, 2))
    k[:num_sinks] *= 20
    k += 10 * (torch.arange(d) % 16 == 3)  # channels far from zero, as keys have
    q = (torch.randn(n, 2 * h, d) * torch.linspace(0.5, 2.0, d)).bfloat16()
    options = {"num_patterns": num_patterns, "num_sinks": num_sinks}
    expected = mine_kv(q, k, v, impl="reference", **options)
    for x, table, reference in zip((k, v), mine.kv(q, k, v, **options), expected, strict=True):
        assert torch.equal(table.patterns[:, :num_sinks].transpose(0, 1).bfloat16(), x[:num_sinks])
        torch.testing.assert_close(table.channel_scale, reference.channel_scale, rtol=0.1, atol=0.0)
        error = relative_error(x.float(), table, 4)
        assert error <= 1.02 * relative_error(x.float(), reference, 4)


@the_kernel
def test_a_head_is_mined_alike_whatever_the_others(mine: Mine) -> None:
    x = clustered(200, 3).bfloat16()
    others = x.clone()
    others[:, ::2] *= 7
    options = {"num_patterns": 24, "num_sinks": 3}
    alone = mine(x[:, 1:2], **options)
    for table in (mine(x, **options), mine(others, **options)):
        assert torch.equal(table.patterns[1:2], alone.patterns)
        assert torch.equal(table.channel_scale[1:2], alone.channel_scale)


@the_kernel
def test_few_of_many_tokens_have_most_members(mine: Mine) -> None:
    """All tokens but few are one: a mean of many equal tokens is that token."""
    x = clustered(5)[torch.arange(700).clamp_max(4)].bfloat16()
    table = mine(x, num_patterns=2, num_sinks=1)
    mean = x[1:].float().mean(0)
    torch.testing.assert_close(table.patterns[:, 1].float(), mean, rtol=2e-3, atol=1e-4)


def test_k_and_v_of_other_shapes_are_refused() -> None:
    k = clustered(10)
    with pytest.raises(ValueError, match=r"k is \[10, 2, 64\] and v \[10, 1, 64\]"):
        mine_kv(k, k, k[:, :1], num_patterns=8, num_sinks=0)


@every_implementation
def test_centres_without_tokens_move(mine: Mine) -> None:
    """Nearly all tokens are the same, so all centres start on one, and outliers are three."""
    distinct = clustered(11).bfloat16()
    x = distinct[torch.arange(1000).clamp_max(10)]
    mined = mine(x, num_patterns=24, num_sinks=0)
    for head in range(2):
        exact = mined.patterns[head].float().unsqueeze(0) == distinct[:, head].float().unsqueeze(1)
        assert exact.all(2).any(1).all()


def test_query_weights_are_finite_whatever_the_queries() -> None:
    q = torch.randn(5, 4, 64)
    q[0, 0, 3], q[1, 2, 5] = torch.nan, torch.inf
    weight = query_weight(q, 2)
    assert weight.isfinite().all() and (weight > 0).all()


def test_query_weight_is_the_spread_of_a_group_of_query_heads() -> None:
    q = torch.randn(500, 6, 64) * torch.linspace(0.5, 2.0, 64)
    q[:, 3:] *= 100  # a KV head's own scale does not count
    weight = query_weight(q, 2).float()
    expected = torch.linspace(0.5, 2.0, 64) / 1.25
    torch.testing.assert_close(weight, expected.expand(2, 64), rtol=0.1, atol=0.0)
    assert (query_weight(torch.zeros(3, 4, 64), 2) == 1).all()
