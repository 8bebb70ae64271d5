"""The guard: what it measures, and the one warning."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from patternkv_kernels import mine_kv, store_kv
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.guard import LIMIT, LogitGuard, logit_error
from patternkv_sgl.stats import Stats
from tests.fakes import make_pool

TOKENS, H_Q, H_KV, D = 200, 4, 2, 64


def test_the_error_is_that_of_logits_over_their_spread() -> None:
    # Two keys per head; head 0: logits 1 and 3, stored 1.5 and 2.5; head 1: exact.
    q = torch.ones(1, 2, 1)
    k = torch.tensor([[[1.0], [5.0]], [[3.0], [9.0]]])
    stored = torch.tensor([[[1.5], [5.0]], [[2.5], [9.0]]])
    assert logit_error(q, k, stored).tolist() == [0.5, 0.0]


def test_what_all_keys_have_in_common_does_not_count() -> None:
    q, k = torch.randn(5, H_Q, D), torch.randn(7, H_KV, D)
    stored = k + 0.1 * torch.randn(7, H_KV, D)
    shift = torch.randn(H_KV, D)
    expected = logit_error(q, k, stored)
    torch.testing.assert_close(logit_error(q, k + 10, stored + 10 + shift), expected)
    torch.testing.assert_close(logit_error(q, 3 * k, 3 * stored), expected)


def test_a_head_without_spread_has_no_error() -> None:
    same = torch.ones(3, H_KV, D)
    assert logit_error(torch.ones(2, H_Q, D), same, same).tolist() == [0, 0]


def store(guard: LogitGuard, pool: Any, index: int, *, noisy_head: int | None = None) -> None:
    """Mine, store and measure random tokens; a noisy head is hard to store at 2 bits."""
    generator = torch.Generator().manual_seed(index)
    q, k, v = (torch.randn(TOKENS, h, D, generator=generator) for h in (H_Q, H_KV, H_KV))
    for head in set(range(H_KV)) - {noisy_head}:
        k[:, head] = k[:4, head].repeat(TOKENS // 4, 1)
    config, slots = pool.geometry.config, torch.arange(1, TOKENS + 1)
    table_ids = torch.ones(TOKENS, dtype=torch.int32)
    fmt = pool.slot_formats[index]
    mined = mine_kv(q, k, v, num_patterns=config.patterns, num_sinks=0)
    pool.tables[index].write(1, *mined)
    tables = pool.tables[index]
    store_kv(fmt, pool.packed[index], slots, k, v, tables, table_ids)
    guard.measure(index, q, k, slots, table_ids)


def measured(
    k_bits: int, caplog: pytest.LogCaptureFixture, *, noisy_head: int | None, **options: Any
) -> tuple[Stats, list[str]]:
    """Stats and warnings after both layers, the second of them noisy."""
    options = {"rotate": False, "layer_bits": ()} | options
    config = PatternKVConfig(k_bits, 2, patterns=8, **options)
    pool = make_pool(config, h_kv=H_KV, num_layers=2, head_dim=D)
    stats = Stats()
    guard = LogitGuard(pool, stats)
    caplog.set_level(logging.WARNING, "patternkv_sgl.guard")
    store(guard, pool, 0)
    guard.poll()
    assert (guard.wants(0), guard.wants(1), stats.logit_error_percent) == (False, True, 0)
    store(guard, pool, 1, noisy_head=noisy_head)
    assert not guard.wants(1)
    for _ in range(3):
        guard.poll()
    own = (record for record in caplog.records if record.name == "patternkv_sgl.guard")
    return stats, [record.getMessage() for record in own]


def test_the_worst_head_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    stats, warnings = measured(2, caplog, noisy_head=1)
    assert stats.logit_error_percent > 100 * LIMIT
    (warning,) = warnings
    value = f"{stats.logit_error_percent / 100:.2f} of their spread (limit {LIMIT:.2f}; 1 of 4"
    assert f"2-bit K moves attention's logits in layer 1, KV head 1 by {value}" in warning
    assert warning.endswith("use --kv-quant-layer-bits 1=4:2 or --kv-quant-rotate on")


def test_a_rotated_cache_is_not_told_to_rotate(caplog: pytest.LogCaptureFixture) -> None:
    _, (warning,) = measured(2, caplog, noisy_head=0, rotate=True)
    assert "layer 1, KV head 0" in warning
    assert warning.endswith("use --kv-quant-layer-bits 1=4:2")


def test_exceptions_that_are_made_stay(caplog: pytest.LogCaptureFixture) -> None:
    _, (warning,) = measured(2, caplog, noisy_head=0, layer_bits=((0, (4, 4)),))
    assert "--kv-quant-layer-bits 0=4:4,1=4:2" in warning


def test_layers_with_four_bits_are_protected(caplog: pytest.LogCaptureFixture) -> None:
    stats, warnings = measured(2, caplog, noisy_head=1, layer_bits=None)
    assert stats.logit_error_percent <= 100 * LIMIT and not warnings


@pytest.mark.parametrize(("k_bits", "noisy_head"), [(2, None), (4, 1)])
def test_heads_that_are_stored_well_are_silent(
    k_bits: int, noisy_head: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    stats, warnings = measured(k_bits, caplog, noisy_head=noisy_head)
    assert stats.logit_error_percent <= 100 * LIMIT and not warnings
