"""Bits per element at a length and head_dim, without a model."""

from __future__ import annotations

import torch

from benchmarks.quality.cache import LayerPrompt
from benchmarks.quality.methods import Setting

_HEADS = 4
_LAYERS = 32
GENERATED = 128
"""Tokens after the prompt: they fill every method's window."""


def bits_at(setting: Setting, context: int, head_dim: int) -> float:
    """All that a branch of ``context`` tokens, the last `GENERATED` of them its own, takes by
    itself, per element of its K and V.

    Four KV heads (slots of ours then need no padding) and 32 layers. Only the pools of OTT depend
    on the vectors, which are random here.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, head_dim, generator=generator)

    x = random(_HEADS, context - GENERATED)
    tokens = [random(1, _HEADS) for _ in range(GENERATED)]

    def of_layer(layer: int) -> float:
        prompt = LayerPrompt(x, x, x, layer=layer, num_layers=_LAYERS)
        cache = setting.maker(1, GENERATED)(prompt)
        for token in tokens:
            cache.step(token, token, token, 1.0)
        return cache.bits_per_element

    # The last layer may have bits of its own.
    return ((_LAYERS - 1) * of_layer(_LAYERS - 2) + of_layer(_LAYERS - 1)) / _LAYERS
