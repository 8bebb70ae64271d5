"""Tokens drawn straight from logits have the distribution of SGLang's own sampler."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from sglang.srt.layers.sampler import Sampler
from sglang.srt.runtime_context import get_parallel
from torch import nn

import patternkv_sgl.plugin as plugin
from patternkv_sgl import hooks
from patternkv_sgl.sampler import BranchSampler

pytestmark = pytest.mark.usefixtures("published")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STOCK = torch.tensor([-1])


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[BranchSampler]:
    """Ours outside an engine, above a stock sampler that answers `STOCK`."""
    monkeypatch.setattr(Sampler, "__init__", nn.Module.__init__)
    monkeypatch.setattr(Sampler, "forward", lambda self, *args, **kwargs: STOCK)
    torch.manual_seed(0)
    with get_parallel().override(dp_rank=None):
        yield BranchSampler()


def sample(
    sampler: BranchSampler,
    logits: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    return_logprob: bool = False,
    **info: Any,
) -> torch.Tensor:
    plain = {
        "temperatures": torch.full((len(logits), 1), 1.0, device=logits.device) * temperature,
        "is_all_greedy": False,
        "need_top_p_sampling": False,
        "need_top_k_sampling": False,
        "need_min_p_sampling": False,
        "has_custom_logit_processor": False,
        "sampling_seed": None,
        "sampling_mask_batch_indices": None,
        "grammars": None,
        "logit_bias": None,
        "has_watermark_candidates": False,
    }
    output = SimpleNamespace(next_token_logits=logits)
    return sampler(output, SimpleNamespace(**plain | info), return_logprob, [], [], None)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_have_the_softmax_distribution(sampler: BranchSampler, device: str) -> None:
    vocab, temperatures = 50, torch.tensor([[0.5], [1.0], [1.7]])
    torch.manual_seed(1)
    logits = torch.randn(1, vocab) * 2
    counts = torch.zeros(3, vocab, dtype=torch.long)
    for _ in range(80):
        batch = logits.expand(300, vocab).contiguous().to(device)
        row_temperatures = temperatures.repeat_interleave(100, 0).to(device)
        tokens = sample(sampler, batch, row_temperatures).view(3, 100).cpu()
        for row, drawn in zip(counts, tokens, strict=True):
            row += torch.bincount(drawn, minlength=vocab)
    expected = torch.softmax(logits.double() / temperatures, -1) * 8000
    for observed, wanted in zip(counts, expected, strict=True):
        assert chisquare(*(pool_seldom(x, wanted > 5) for x in (observed, wanted))).pvalue > 1e-3


def pool_seldom(counts: torch.Tensor, often: torch.Tensor) -> list[float]:
    """Counts of what comes often, and of all the rest together."""
    return [*counts[often].tolist(), counts[~often].sum().item()]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_gpu_draws_what_torch_draws(sampler: BranchSampler, rows: int) -> None:
    logits = torch.randn(rows, 128256) * 3
    on_gpu = BranchSampler()
    for _ in range(3):
        expected = sample(sampler, logits.clone())
        assert torch.equal(sample(on_gpu, logits.cuda()).cpu(), expected)


def test_rows_and_steps_draw_on_their_own(sampler: BranchSampler) -> None:
    logits = torch.zeros(2, 1 << 16)
    first, second = sample(sampler, logits), sample(sampler, logits)
    assert len({*first.tolist(), *second.tolist()}) == 4


def test_a_seed_repeats_an_engine_and_not_its_replica(sampler: BranchSampler) -> None:
    logits = torch.zeros(4, 1 << 16)
    first, second = sample(sampler, logits), sample(sampler, logits)
    again = BranchSampler()
    again.warm_up(1 << 16, torch.device("cpu"))
    assert torch.equal(sample(again, logits), first)
    assert torch.equal(sample(again, logits), second)
    torch.manual_seed(1)
    assert not torch.equal(sample(BranchSampler(), logits), first)
    torch.manual_seed(0)
    with get_parallel().override(dp_rank=1):
        assert not torch.equal(sample(BranchSampler(), logits), first)


def test_a_model_of_another_vocabulary_has_noise_of_its_own(sampler: BranchSampler) -> None:
    sampler.warm_up(16, torch.device("cpu"))
    assert sample(sampler, torch.tensor([[0.0] * 31 + [100.0]])).tolist() == [31]


@pytest.mark.parametrize(
    "asked",
    [
        {"return_logprob": True},
        {"is_all_greedy": True},
        {"need_top_p_sampling": True},
        {"need_top_k_sampling": True},
        {"need_min_p_sampling": True},
        {"sampling_seed": torch.tensor([3])},
        {"sampling_mask_batch_indices": torch.tensor([0])},
        {"grammars": [None, object()]},
        {"logit_bias": torch.zeros(1, 8)},
        {"has_custom_logit_processor": True},
        {"has_watermark_candidates": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_else_is_asked_is_left_to_stock(sampler: BranchSampler, asked: dict[str, Any]) -> None:
    assert sample(sampler, torch.zeros(1, 8), **asked) is STOCK


def test_an_empty_batch_is_left_to_stock(sampler: BranchSampler) -> None:
    assert sample(sampler, torch.zeros(0, 8)) is STOCK


@pytest.mark.parametrize(
    ("enabled", "backend", "ours"),
    [(True, "flashinfer", True), (True, "pytorch", False), (False, "flashinfer", False)],
)
def test_only_sglangs_default_on_gpus_is_replaced(
    sampler: BranchSampler,
    monkeypatch: pytest.MonkeyPatch,
    enabled: bool,
    backend: str,
    ours: bool,
) -> None:
    monkeypatch.setattr(hooks, "enabled", lambda: enabled)
    created = plugin._create_sampler(lambda backend: Sampler(), backend)
    assert isinstance(created, BranchSampler) == ours
