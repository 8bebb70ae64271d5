"""Published cache methods against cases worked out by hand from their specifications."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality.bf16 import Bf16
from benchmarks.quality.cache import LayerCache, LayerPrompt
from benchmarks.quality.fp8 import Fp8
from benchmarks.quality.hadamard_lloyd import HadamardLloyd, lloyd_max, rotation
from benchmarks.quality.int_pth import IntPerTokenHead
from benchmarks.quality.kivi import KiviG32, KiviG128
from benchmarks.quality.methods import METHODS, SETTINGS, Setting
from benchmarks.quality.min_max import round_min_max
from benchmarks.quality.ott import EXTRA, OTT, Pool
from benchmarks.quality.patternkv_paper import PatternKVPaper, gate, k_means, narrowest, nearest
from benchmarks.quality.patternkv_sgl import PatternKVSgl
from benchmarks.quality.storage import bits_at

D = 64
SCALE = D**-0.5


def prompt(length: int, p: int = 1, h: int = 1, layer: int = 1) -> LayerPrompt:
    q, k, v = (torch.randn(p, h * (1 + (i == 0)), length, D) for i in range(3))
    return LayerPrompt(q, k, v, layer, num_layers=4)


def grow(cache: LayerCache, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append random tokens; their exact K and V ``[p, n, h, tokens, d]``."""
    k, v = (torch.randn(cache.p, cache.n, cache.h, tokens, cache.d) for _ in range(2))
    for i in range(tokens):
        q = torch.zeros(cache.p, cache.n, cache.h, cache.d)
        cache.step(q, k[..., i, :], v[..., i, :], SCALE)
    return k, v


def held(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of everything one branch would read, ``[h, length, d]`` of the first."""
    own = slice(0, cache.held)
    return (
        torch.cat([cache.shared_k[0], cache.own_k[0, 0, :, own]], 1),
        torch.cat([cache.shared_v[0], cache.own_v[0, 0, :, own]], 1),
    )


def exact(now: torch.Tensor, before: torch.Tensor) -> list[bool]:
    """Per token, whether it is what it was."""
    return (now == before).all(-1).all(0).tolist()


# Rounding


def test_min_max_levels_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 9.0, -3.0, -3.0, -3.0, -3.0]])
    # Levels 0, 3, 6, 9 in the first group of four; the second is constant.
    wanted = torch.tensor([[0.0, 0.0, 3.0, 9.0, -3.0, -3.0, -3.0, -3.0]])
    assert torch.equal(round_min_max(x, 2, -1, 4), wanted)
    assert torch.equal(round_min_max(x.T, 2, -2, 4), wanted.T)


def test_int_per_token_head_has_its_own_levels_for_each_token() -> None:
    x = torch.stack([torch.linspace(0, 15, D).round(), torch.linspace(0, 150, D)])
    p = LayerPrompt(x[None, None], x[None, None], x[None, None], 0, 1)
    k, _ = held(IntPerTokenHead(p, 1, 1, (4, 4)))
    assert torch.equal(k[0, 0], x[0])  # its levels are the integers
    assert (k[0, 1] - x[1]).abs().max() <= 5.01


def test_fp8_keeps_three_bits_of_mantissa_and_clamps() -> None:
    x = torch.full((1, 1, 1, D), 1.0)
    x[..., :4] = torch.tensor([1.0625, 17.0, 1000.0, -1000.0])
    k, _ = held(Fp8(LayerPrompt(x, x, x, 0, 1), 1, 1, (8, 8)))
    assert k[0, 0, :5].tolist() == [1.0, 16.0, 448.0, -448.0, 1.0]


# Max (1960), Quantizing for minimum distortion, table I.
@pytest.mark.parametrize(
    ("bits", "positive"),
    [(1, [0.7980]), (2, [0.4528, 1.510]), (4, [0.1284, 0.3881, 0.6568, 0.9424])],
)
def test_lloyd_max_levels_are_the_published_ones(bits: int, positive: list[float]) -> None:
    levels = lloyd_max(bits)
    upper = levels[len(levels) // 2 :][: len(positive)]
    assert torch.allclose(upper.float(), torch.tensor(positive), atol=1e-3)
    assert torch.allclose(levels, -levels.flip(0), atol=1e-9)


def test_rotation_is_orthogonal_and_flattens_a_spike() -> None:
    turn = rotation(D)
    assert torch.allclose(turn @ turn.T, torch.eye(D), atol=1e-6)
    assert torch.allclose(turn[:, 3].abs(), torch.full((D,), 1 / math.sqrt(D)))


def test_hadamard_reaches_the_distortion_of_its_code() -> None:
    x = torch.randn(1, 1, 500, D)
    k, _ = held(HadamardLloyd(LayerPrompt(x, x, x, 0, 1), 1, 1, (2, 2)))
    error = (k - x[0]).square().sum() / x.square().sum()
    assert error.item() == pytest.approx(0.1175, abs=0.006)  # Max (1960), 4 levels


def test_rotation_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"head_dim 96: .*power of two"):
        rotation(96)


# Which tokens are exact when


@pytest.mark.parametrize(("kivi", "group"), [(KiviG32, 32), (KiviG128, 128)], ids=["g32", "g128"])
def test_kivi_flushes_k_in_blocks_and_slides_v(kivi: type[LayerCache], group: int) -> None:
    p = prompt(300)
    cache = kivi(p, 1, 200, (2, 2))
    k, v = held(cache)
    assert exact(k, p.k[0]) == [i >= 256 for i in range(300)]
    assert exact(v, p.v[0]) == [i >= 172 for i in range(300)]
    assert torch.equal(k[:, :256], round_min_max(p.k[0, :, :256], 2, -2, group))
    new_k, new_v = grow(cache, 83)
    whole_k, whole_v = torch.cat([p.k[0], new_k[0, 0]], 1), torch.cat([p.v[0], new_v[0, 0]], 1)
    assert exact(held(cache)[0], whole_k) == [i >= 256 for i in range(383)]
    last_k, last_v = grow(cache, 1)
    k, v = held(cache)
    assert not any(exact(k, torch.cat([whole_k, last_k[0, 0]], 1)))
    expected = [i >= 384 - 128 for i in range(384)]
    assert exact(v, torch.cat([whole_v, last_v[0, 0]], 1)) == expected
    # Both branches of the block are rounded as one: tokens of prompt and answer in a group.
    block = torch.cat([whole_k, last_k[0, 0]], 1)[:, 256:]
    assert torch.equal(k[:, 256:], round_min_max(block, 2, -2, group))


def test_ours_reads_the_window_exactly_and_all_else_stored() -> None:
    p = prompt(300)
    cache = PatternKVSgl(p, 1, 64, (4, 4))
    new_k, _ = grow(cache, 40)
    k, _ = held(cache)
    now_exact = exact(k, torch.cat([p.k[0], new_k[0, 0]], 1))
    window = [i >= 340 - cache.config.window for i in range(340)]
    assert now_exact[cache.config.sinks : 300] == [False] * (300 - cache.config.sinks)
    assert now_exact[300:] == window[300:]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_branches_and_prompts_do_not_touch_each_other(setting: Setting) -> None:
    p = prompt(350, p=2, h=2)  # every method quantizes a block within 70 tokens
    q, k, v = (torch.randn(2, 3, 2 * (1 + (i == 0)), 70, D) for i in range(3))
    together = METHODS[setting.method](p, 3, 70, setting.bits)
    alone = METHODS[setting.method](
        LayerPrompt(p.q[1:], p.k[1:], p.v[1:], 1, 4), 1, 70, setting.bits
    )
    for i in range(70):
        out = together.step(q[..., i, :], k[..., i, :], v[..., i, :], SCALE)
        one = (x[1:, 2:, :, i] for x in (q, k, v))
        # Products of other shapes round differently, and a code at a tie follows: 0.002 here;
        # another branch's output is 0.1 away.
        torch.testing.assert_close(out[1:, 2:], alone.step(*one, SCALE), atol=1e-2, rtol=0)


# PatternKV


def test_gate_is_the_threshold_of_the_specification() -> None:
    # rho* = 0.8764 at d = 64: a residual range just below it passes, just above does not.
    v = torch.zeros(2, D)
    v[:, 0] = 1.0
    pattern = torch.zeros(2, D)
    pattern[:, 0] = torch.tensor([1 - 0.875, 1 - 0.878])
    assert gate(v, pattern).tolist() == [True, False]


def test_assignment_by_distance_and_by_range_differ_as_specified() -> None:
    patterns = torch.zeros(1, 2, D)
    patterns[0, 0] = 5.0  # far, but the residual of a flat token has no range
    patterns[0, 1, 0] = 1.0
    token = torch.zeros(1, 1, D)
    assert nearest(token, patterns).item() == 1
    assert narrowest(token, patterns).item() == 0


def test_k_means_finds_separate_clusters_and_needs_enough_tokens() -> None:
    centres = torch.arange(4.0).view(1, 4, 1) * 100 * torch.ones(1, 4, D)
    x = centres.repeat_interleave(50, 1) + torch.randn(1, 200, D)
    found = k_means(x, 8)
    assert (x[0, :, None] - found[0]).norm(dim=-1).amin(1).max() < 2 * D**0.5
    with pytest.raises(ValueError, match="7 tokens"):
        k_means(x[:, :7], 8)


def test_patternkv_adds_the_centre_of_each_decoded_block() -> None:
    p = prompt(256)
    cache = PatternKVPaper(p, 1, 128, (2, 2))
    k, _ = grow(cache, 127)
    assert cache._k_patterns.shape[1] == 32 and exact(cache.own_k[0, 0, :, :127], k[0, 0])[0]
    last, _ = grow(cache, 1)
    block = torch.cat([k, last], 3)[0, 0, 0]
    centre = ((block.amin(0) + block.amax(0)) / 2).half().float()
    assert torch.equal(cache._k_patterns[0, 32], centre)
    ids = narrowest(block[None], cache._k_patterns)
    base = cache._k_patterns[0, ids[0]]
    assert torch.equal(cache.own_k[0, 0, 0], round_min_max(block - base, 2, -2, 128) + base)


# OTT


def test_ott_keeps_the_smallest_keys_and_rounds_without_them() -> None:
    p = prompt(160)
    small = [3, 50, 99]
    p.k[0, 0, small] *= 0.01
    k, v = held(OTT(p, 1, 1, (2, 2)))
    assert [i for i, same in enumerate(exact(k, p.k[0])) if same and i < 128] == small
    assert all(exact(v, p.v[0])[i] for i in [*small, *range(128, 160)])
    filled = p.k[0, :, :128].clone()
    filled[:, small] = filled.mean(1, keepdim=True)
    rounded = round_min_max(filled, 2, -2, 128)
    assert torch.equal(k[:, 4], rounded[:, 4])


def test_ott_first_layer_has_no_pool() -> None:
    p = prompt(160, layer=0)
    assert not any(exact(held(OTT(p, 1, 1, (2, 2)))[0], p.k[0])[:128])


def test_ott_stops_tracing_when_the_second_pool_is_full() -> None:
    pool = Pool(1, torch.device("cpu"))
    chosen = [
        # Every group has smaller keys than all before: three are evicted each time.
        int(pool.choose(torch.full((1, 8, D), 0.5**i)).sum())
        for i in range(15)
    ]
    groups = 1 + EXTRA // 3
    assert chosen == [3] * groups + [0] * (15 - groups)
    assert pool.exact == 3 * groups


# Bits


@pytest.mark.parametrize(
    ("setting", "bits"),
    [
        ("bf16", 16),
        ("fp8", 8),
        ("int_pth:4/2", 3 + 0.5),
        ("hadamard_lloyd:2/2", 2 + 0.25),
        # 256 of 384 tokens of K and V; 32 bits per 32 tokens or channels.
        ("kivi_g32:2/2", (3 * (384 + 256) + 16 * 128) / 768),
        # Groups of V have all 64 channels.
        ("kivi_g128:2/2", (2.25 * 384 + 2.5 * 256 + 16 * 128) / 768),
        # 384 packed tokens with two ids and a gate bit, 32 patterns.
        ("patternkv_paper:2/2", 2 + (0.25 + 0.5) / 2 + 17 / 128 + 16 * 32 / 384),
    ],
)
def test_bits_per_element_count_everything(setting: str, bits: float) -> None:
    (parsed,) = Setting.parse(setting)
    assert parsed.maker(1, 1)(prompt(384)).bits_per_element == pytest.approx(bits)


def test_bits_of_ott_count_the_pools() -> None:
    cache = OTT(prompt(384), 1, 1, (2, 2))
    outliers = cache._pool.exact
    assert 3 <= outliers <= 6  # two groups
    # K has 32 bits per channel and group, V 32 per token.
    packed = 256 * (2 * 2 * D + 32 * (D / 128 + 1))
    wanted = packed + 128 * 2 * 16 * D + outliers * (2 * 16 * D + 32)
    assert cache.stored_bits() == pytest.approx(wanted)


def test_bits_of_ours_count_slots_ids_table_and_window() -> None:
    cache = PatternKVSgl(prompt(384, h=2), 1, 64, (2, 2))
    grow(cache, 40)
    slots = 424 * (38 + 38 + 4) / 2 * 8  # padded to 80 bytes for both heads
    table_ids = 424 * 32 / (4 * 2)
    table = 2 * 16 * D * (64 + 2)
    assert cache.stored_bits() == slots + table_ids + table + 32 * 2 * 16 * D


def test_bits_at_a_length_include_a_full_window() -> None:
    (setting,) = Setting.parse("patternkv_sgl:2/2")
    # One of 32 layers has K at 4 bits.
    slots = 1024 * (16 + 16 + 6) * 8 + 1024 * 16 * 8 / 32
    table = 2 * 16 * D * (64 + 2)
    wanted = slots + 1024 * 32 / (32 * 4) + table + 32 * 2 * 16 * D
    assert bits_at(setting, 1024, D) == pytest.approx(wanted / (2 * D * 1024))


def test_exact_attention_is_softmax_attention() -> None:
    p = prompt(9, h=2)
    cache = Bf16(p, 2, 4, (16, 16))
    k, v = grow(cache, 2)
    q, new_k, new_v = torch.randn(1, 2, 4, D), torch.randn(1, 2, 2, D), torch.randn(1, 2, 2, D)
    out = cache.step(q, new_k, new_v, SCALE)
    for branch in range(2):
        keys = torch.cat([p.k[0], k[0, branch], new_k[0, branch][:, None]], 1)
        values = torch.cat([p.v[0], v[0, branch], new_v[0, branch][:, None]], 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q[0, branch][:, None], keys, values, scale=SCALE, enable_gqa=True
        )
        torch.testing.assert_close(out[0, branch], wanted[:, 0])


def test_settings_are_named_and_unknown_ones_refused() -> None:
    assert [str(s) for s in Setting.parse("kivi_g32")] == [
        f"kivi_g32:{b}" for b in ("4/4", "4/2", "2/2")
    ]
    with pytest.raises(ValueError, match="'kivi': use one of bf16"):
        Setting.parse("kivi")
    with pytest.raises(ValueError, match="fp8 is defined at bits 8/8"):
        Setting.parse("fp8:4/4")
