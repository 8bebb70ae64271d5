"""A Hugging Face model whose attention is a function of ours for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "kv_bench"
Attend = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Attention module, q ``[b, h_q, n, d]``, k and v ``[b, h_kv, n, d]`` of the new tokens, logit
scale; gives q's shape."""

_attend: Attend | None = None


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface; only the new tokens arrive here."""
    assert _attend is not None, "a model prepared for the bench runs inside attending()"
    out = _attend(module, query, key, value, scaling)
    return out.transpose(1, 2).to(query.dtype), None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Let prepared models attend through ``attend``."""
    global _attend
    previous, _attend = _attend, attend
    try:
        yield
    finally:
        _attend = previous


def prepare(model: PreTrainedModel) -> None:
    """Make ``model`` attend through this module."""
    AttentionInterface.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)
