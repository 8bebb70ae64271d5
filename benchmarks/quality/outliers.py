"""The demo model with the K outliers of large models, computing the same function."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

PAIRS = 2
"""Rotated pairs of channels per KV head that become outliers."""


@torch.no_grad()
def add_k_outliers(model: PreTrainedModel, strength: float, seed: int = 0) -> None:
    """Multiply some K channels by ``strength`` and divide the queries' by it, in place.

    RoPE mixes channels ``j`` and ``j + d/2``, so both get one factor. With a power of two no bit of
    a logit changes. Each KV head of each layer has its own pairs.

    Raises:
        ValueError: a strength that is no power of two.
    """
    if strength <= 0 or torch.frexp(torch.tensor(float(strength))).mantissa != 0.5:
        raise ValueError(f"strength {strength}: use a power of two, which changes no logit")
    config = model.config
    h_kv, group = (
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
    )
    half = config.head_dim // 2
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention = layer.self_attn
        for head in range(h_kv):
            first = torch.randperm(half, generator=generator)[:PAIRS]
            channels = torch.cat([first, first + half])
            _scale_rows(attention.k_proj, head * 2 * half + channels, strength)
            for q_head in range(head * group, (head + 1) * group):
                _scale_rows(attention.q_proj, q_head * 2 * half + channels, 1 / strength)


def _scale_rows(linear: torch.nn.Linear, rows: torch.Tensor, factor: float) -> None:
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor
