"""Models that start from the demo model's weights and differ in what their KV cache holds.

``k_bias`` has bias in attention, with large constants on K in its first and last layer, as Qwen2.5
has: there, one token's K is mostly what every token's K is. ``head_dim_128`` has heads of 128. Both
nearly compute the demo model's function at once and are then trained on (``train.py --variant``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .llama import Layer, Llama, LlamaShape

DEMO = Path(__file__).parent / "model"
BIAS_PAIRS = 3
"""Rotated pairs of channels that get a bias: the slowest, whose angle at 4096 is below 0.03."""
BIAS = 64.0
"""Their bias in units of K's root mean square."""
NEW_QUERY_SHARE = 0.25
"""Size of what reads the new channels, relative to what reads the old ones."""


def load_demo(folder: Path = DEMO) -> Llama:
    """The demo model's weights in float32."""
    from safetensors.torch import load_file

    model = Llama(LlamaShape())
    weights = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


@torch.no_grad()
def with_k_bias(demo: Llama) -> Llama:
    """Zero bias everywhere but on K's slowest channels in the first and the last layer.

    RoPE hardly turns these, so every key's logit moves alike and softmax does not see it.
    """
    model = Llama(replace(demo.shape, attention_bias=True))
    model.load_state_dict(demo.state_dict(), strict=False)
    half = demo.shape.head_dim // 2
    slowest = torch.arange(half - BIAS_PAIRS, half)
    for layer in (model.model.layers[0], model.model.layers[-1]):
        assert isinstance(layer, Layer)
        attention = layer.self_attn
        # Normalised inputs have unit components before the norm's weight.
        weight = attention.k_proj.weight * layer.input_layernorm.weight
        size = weight.square().sum(1).mean().sqrt()
        bias = attention.k_proj.bias.view(-1, 2, half)
        signs = 1 - 2 * (torch.arange(bias.shape[0]) % 2)
        bias[:, 0, slowest] = BIAS * size * signs[:, None]
        bias[:, 1, slowest] = -BIAS / 2 * size * signs[:, None]
    return model


@torch.no_grad()
def with_wide_heads(demo: Llama) -> Llama:
    """Every head with twice the channels.

    The pair of channels ``j`` of ``d / 2`` turns as fast as pair ``2 j`` of twice as many, so the
    old channels go there and keep their angles. The new ones begin with random K and V, which are
    read weakly at first.
    """
    old, generator = demo.shape, torch.Generator().manual_seed(0)
    model = Llama(replace(old, head_dim=2 * old.head_dim))
    half = old.head_dim // 2
    kept = torch.cat((2 * torch.arange(half), 2 * torch.arange(half) + 2 * half))

    def widened(weight: Tensor, heads: int, share: float) -> Tensor:
        """Rows of ``[heads * d, n]`` at the places of the old channels, noise between them."""
        rows = weight.view(heads, old.head_dim, -1)
        noise = torch.randn(heads, 2 * old.head_dim, rows.shape[2], generator=generator)
        wide = noise * rows.square().mean().sqrt() * share
        wide[:, kept] = rows
        return wide.flatten(0, 1)

    state = demo.state_dict()
    q_heads, kv_heads = old.num_attention_heads, old.num_key_value_heads
    for i in range(old.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn."
        # Logits are divided by the root of head_dim, which has doubled.
        q = state[prefix + "q_proj.weight"] * 2**0.5
        state[prefix + "q_proj.weight"] = widened(q, q_heads, NEW_QUERY_SHARE)
        for name in ("k_proj", "v_proj"):
            weight = state[f"{prefix}{name}.weight"]
            state[f"{prefix}{name}.weight"] = widened(weight, kv_heads, 1.0)
        out = state[prefix + "o_proj.weight"].t().contiguous()
        state[prefix + "o_proj.weight"] = widened(out, q_heads, NEW_QUERY_SHARE).t().contiguous()
    model.load_state_dict(state)
    return model


VARIANTS: dict[str, Callable[[Llama], Llama]] = {
    "k_bias": with_k_bias,
    "head_dim_128": with_wide_heads,
}
