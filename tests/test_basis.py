"""The basis of stored K: products stay, outliers spread, channels balance as the weights say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from patternkv_sgl.basis import KBasis, balance, projected_sizes

H_Q, H_KV = 4, 2


def vectors(d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(9, H_Q, d).to(dtype), torch.randn(9, H_KV, d).to(dtype)


def logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nhgd,mhd->hgnm", q.unflatten(1, (H_KV, -1)), k)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("balanced", [False, True])
def test_products_stay_what_they_were(d: int, balanced: bool) -> None:
    factors = torch.randint(-3, 4, (H_KV, d)).float().exp2() if balanced else torch.ones(H_KV, d)
    basis = KBasis(H_Q, factors, dtype=torch.float64, device="cpu")
    q, k = vectors(d, torch.float64)
    stored = basis.k(k)
    torch.testing.assert_close(logits(basis.q(q), stored), logits(q, k), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(basis.k_back(stored), k, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(stored, k, atol=0.1)


@pytest.mark.parametrize("d", [64, 128])
def test_low_precision_rounds_results_only(d: int) -> None:
    basis = KBasis(H_Q, torch.full((H_KV, d), 2.0), dtype=torch.bfloat16, device="cpu")
    whole = KBasis(H_Q, torch.full((H_KV, d), 2.0), dtype=torch.float32, device="cpu")
    q, k = vectors(d, torch.bfloat16)
    for low, high in ((basis.k(k), whole.k(k.float())), (basis.q(q), whole.q(q.float()))):
        assert torch.equal(low, high.bfloat16())


class Launches(TorchDispatchMode):
    """Counts operators that compute or copy; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name != "_unsafe_view" and all(x.alias_info is None for x in func._schema.returns):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_queries_and_keys_of_one_projection_are_turned_in_two_launches() -> None:
    factors = torch.randint(-3, 4, (H_KV, 64)).float().exp2()
    basis = KBasis(H_Q, factors, dtype=torch.bfloat16, device="cpu")
    qkv = torch.randn(9, (H_Q + 2 * H_KV) * 64).bfloat16()
    q, k, _ = qkv.split([H_Q * 64, H_KV * 64, H_KV * 64], 1)
    q, k = q.view(9, H_Q, 64), k.view(9, H_KV, 64)
    for parts, expected in (((q, k), ["mul", "mm"]), ((q, k.clone()), ["cat", "mul", "mm"])):
        with Launches() as launches:
            turned = basis.turn(*parts)
        assert launches.names == expected
        for found, alone in zip(turned, (basis.q(q), basis.k(k)), strict=True):
            assert torch.equal(found, alone)


def test_a_spike_is_spread_over_all_channels_of_its_block() -> None:
    for d, block in ((64, 64), (96, 32)):
        k = torch.zeros(1, 1, d)
        k[..., 3] = 1
        stored = KBasis(1, torch.ones(1, d), dtype=torch.float32, device="cpu").k(k).flatten()
        assert (stored != 0).sum() == block and stored.abs().unique().numel() == 2 - (d == block)


def test_balance_is_the_root_of_the_ratio_in_powers_of_two_per_rotated_pair() -> None:
    q, k = torch.ones(H_Q, 64), torch.ones(H_KV, 64)
    # The queries' size is that of the group together: 16 against 1/4 in one pair of head 0.
    q[:2, [5, 37]], k[0, [5, 37]] = 16.0, 0.25
    k[1, 7] = 8.0  # of a pair with 1: sqrt(65 / 2) = 5.7, root of the inverse 0.42
    found = balance(q, k)
    assert found[0, [5, 37]].tolist() == [8.0, 8.0] and found[1, [7, 39]].tolist() == [0.5, 0.5]
    assert (found != 1).sum() == 4


def test_balance_evens_an_outlier_out() -> None:
    q, k = vectors(64)
    k[:, :, [9, 41]] *= 64
    q[:, :, [9, 41]] /= 64
    sizes = q.square().mean(0).sqrt(), k.square().mean(0).sqrt()
    stored = KBasis(H_Q, balance(*sizes), dtype=torch.float32, device="cpu").k(k)
    plain = KBasis(H_Q, torch.ones(H_KV, 64), dtype=torch.float32, device="cpu").k(k)
    assert stored.square().mean() < 0.1 * plain.square().mean()


def attention(**modules: Any) -> nn.Module:
    module = nn.Module()
    for name, value in modules.items():
        setattr(module, name, value)
    return module


def test_sizes_come_from_projections_fused_or_not_and_from_norms_first() -> None:
    q, k, v = (nn.Linear(16, h * 64, bias=False) for h in (H_Q, H_KV, H_KV))
    fused = nn.Linear(16, (H_Q + 2 * H_KV) * 64, bias=False)
    fused.weight.data = torch.cat([q.weight, k.weight, v.weight])
    apart = projected_sizes(attention(q_proj=q, k_proj=k), H_Q, H_KV, 64)
    joint = projected_sizes(attention(qkv_proj=fused), H_Q, H_KV, 64)
    assert apart is not None and joint is not None
    for x, y, layer, h in zip(apart, joint, (q, k), (H_Q, H_KV), strict=True):
        assert torch.equal(x, y) and x.shape == (h, 64)
        torch.testing.assert_close(x.flatten(), layer.weight.norm(dim=1).detach())
    norms = attention(qkv_proj=fused, q_norm=nn.LayerNorm(64), k_norm=nn.LayerNorm(64))
    norms.k_norm.weight.data[5] = -3
    sizes = projected_sizes(norms, H_Q, H_KV, 64)
    assert sizes is not None and sizes[0].unique().tolist() == [1] and sizes[1][1, 5] == 3


@pytest.mark.parametrize(
    "weight", [torch.zeros(512, 4, dtype=torch.int8), torch.zeros(500, 4), None]
)
def test_unreadable_weights_give_no_sizes(weight: torch.Tensor | None) -> None:
    module = attention(qkv_proj=SimpleNamespace(weight=weight))
    assert projected_sizes(module, H_Q, H_KV, 64) is None
