"""Ragged attention and merged states against dense float64 attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from patternkv_kernels import RaggedAttention, merge_states, ragged_workspace
from tests.cases import DEVICES


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logit_cap: float
) -> torch.Tensor:
    """Attention of the last ``len(q)`` of ``k``'s tokens, causal, in float64."""
    group = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(group, dim=1)
    v = v.double().repeat_interleave(group, dim=1)
    logits = torch.einsum("nhd,thd->hnt", q.double(), k) * sm_scale
    if logit_cap:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    num_prefix = len(k) - len(q)
    visible = torch.arange(len(k)) <= torch.arange(len(q)).unsqueeze(1) + num_prefix
    return torch.einsum("hnt,thd->nhd", logits.masked_fill(~visible, -math.inf).softmax(2), v)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    qo_indptr: list[int],
    prefix_indptr: list[int],
    sm_scale: float,
    logit_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens among themselves, merged with their prefixes."""
    workspace = ragged_workspace(q.device, 2)
    options = {"sm_scale": sm_scale, "logit_cap": logit_cap}
    own = RaggedAttention(qo_indptr, qo_indptr, causal=True, workspace=workspace)
    prefix = RaggedAttention(qo_indptr, prefix_indptr, causal=False, workspace=workspace)
    return merge_states(*own(q, k, v, **options), *prefix(q, prefix_k, prefix_v, **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logit_cap", [0.0, 5.0])
@pytest.mark.parametrize(
    ("new", "prefix"),
    [
        ([7], [0]),
        ([1], [0]),
        ([1], [9]),
        ([20], [33]),
        ([5, 0, 1, 40], [3, 8, 0, 0]),
        ([1, 1, 1], [5, 0, 70]),
        ([1100], [40]),
        ([600], [0]),
    ],
    ids=str,
)
@pytest.mark.parametrize(("h_kv", "group", "d"), [(2, 3, 64), (1, 7, 96), (2, 1, 256)])
def test_matches_dense_attention(
    h_kv: int,
    group: int,
    d: int,
    new: list[int],
    prefix: list[int],
    logit_cap: float,
    device: str,
) -> None:
    generator = torch.Generator().manual_seed(sum(new))
    qo_indptr = [0, *itertools.accumulate(new)]
    prefix_indptr = [0, *itertools.accumulate(prefix)]
    q = torch.randn(sum(new), h_kv * group, d, generator=generator)
    k, v = torch.randn(2, sum(new), h_kv, d, generator=generator)
    prefix_k, prefix_v = torch.randn(2, sum(prefix), h_kv, d, generator=generator)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out, _ = attend(
        *(x.to(device, dtype) for x in (q, k, v, prefix_k, prefix_v)),
        qo_indptr,
        prefix_indptr,
        d**-0.5,
        logit_cap,
    )
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if device == "cuda" else {"rtol": 1e-4, "atol": 2e-5}
    for i in range(len(new)):
        mine = slice(qo_indptr[i], qo_indptr[i + 1])
        before = slice(prefix_indptr[i], prefix_indptr[i + 1])
        expected = dense(
            q[mine],
            torch.cat([prefix_k[before], k[mine]]),
            torch.cat([prefix_v[before], v[mine]]),
            d**-0.5,
            logit_cap,
        )
        torch.testing.assert_close(out[mine].cpu().double(), expected, **tolerance)


def test_bfloat16_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(50, 4, 64, generator=generator).bfloat16()
    k, v = torch.randn(2, 50, 2, 64, generator=generator).bfloat16()
    prefix_k, prefix_v = torch.randn(2, 30, 2, 64, generator=generator)
    out = attend(q, k, v, prefix_k, prefix_v, [0, 50], [0, 30], 0.125)[0]
    exact = attend(q.float(), k.float(), v.float(), prefix_k, prefix_v, [0, 50], [0, 30], 0.125)[0]
    assert torch.equal(out, exact)


def test_requests_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(12, 2, 64, generator=generator)
    k, v = torch.randn(2, 12, 2, 64, generator=generator)
    attention = RaggedAttention([0, 5, 12], [0, 5, 12], causal=True)
    together, _ = attention(q, k, v, sm_scale=0.125)
    k[5:], v[5:] = math.nan, math.nan
    poisoned, _ = attention(q, k, v, sm_scale=0.125)
    assert torch.equal(together[:5], poisoned[:5])


def test_a_query_without_keys_is_empty_and_merges_as_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, 64, generator=generator)
    out, lse = RaggedAttention([0, 2, 4], [0, 4, 4], causal=False)(q, k, v, sm_scale=0.125)
    assert (out[2:] == 0).all() and (lse[2:] == -math.inf).all()
    own = RaggedAttention([0, 4], [0, 4], causal=True)(q, k, v, sm_scale=0.125)
    merged, merged_lse = merge_states(*own, out, lse)
    assert torch.equal(merged[2:], own[0][2:]) and torch.equal(merged_lse[2:], own[1][2:])
