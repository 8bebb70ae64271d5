"""Bits per element at a length and head_dim, without a model."""

from __future__ import annotations

import torch

from benchmarks.quality.cache import LayerPrompt
from benchmarks.quality.methods import Setting

_HEADS = 4
_LAYERS = 32


def bits_at(setting: Setting, context: int, head_dim: int) -> float:
    """All a prompt of ``context`` tokens takes, for one branch, per element of its K and V.

    Four KV heads (slots of ours then need no padding) and 32 layers. Only the pools of OTT depend
    on the vectors, which are random here.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, _HEADS, context, head_dim)
    x = torch.randn(shape, generator=generator)
    prompt = LayerPrompt(x, x, x, layer=_LAYERS - 1, num_layers=_LAYERS)
    return setting.maker(1, 1)(prompt).bits_per_element
