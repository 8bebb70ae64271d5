"""Extend: attention of newly prefilled tokens over themselves and a dequantized prefix."""

from __future__ import annotations

import torch

_QUERY_BLOCK = 512
"""Query rows per step, which bounds the mask and skips keys that no row of the block may see."""


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: list[int],
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    prefix_indptr: list[int],
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention among each request's new tokens, and full attention to its prefix.

    Parameters
    ----------
    q: ``[n, h_q, d]``, k, v: ``[n, h_kv, d]``, the new tokens of all requests, any float dtype.
    qo_indptr: ``b + 1`` offsets into the new tokens.
    prefix_k, prefix_v: ``[m, h_kv, d]``, the (dequantized) prefixes of all requests.
    prefix_indptr: ``b + 1`` offsets into the prefixes.
    sm_scale: factor on ``q @ k``.
    logit_cap: ``cap * tanh(logit / cap)`` when positive.

    Returns ``[n, h_q, d]`` in ``q.dtype``; the arithmetic is float32.
    """
    out = torch.empty_like(q)
    for i in range(len(qo_indptr) - 1):
        new = slice(qo_indptr[i], qo_indptr[i + 1])
        prefix = slice(prefix_indptr[i], prefix_indptr[i + 1])
        num_new, num_prefix = new.stop - new.start, prefix.stop - prefix.start
        keys = _heads_first(prefix_k[prefix], k[new])
        values = _heads_first(prefix_v[prefix], v[new])
        queries = q[new].float().transpose(0, 1)
        for first in range(0, num_new, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, num_new)
            seen = num_prefix + last
            block = _attend(
                queries[:, first:last], keys[:, :seen], values[:, :seen], sm_scale, logit_cap
            )
            out[new.start + first : new.start + last] = block.transpose(0, 1)
    return out


def _heads_first(prefix: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if prefix.shape[0] == 0:
        return new.float().transpose(0, 1)
    return torch.cat([prefix.float(), new.float()]).transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logit_cap: float
) -> torch.Tensor:
    """Attention ``[h_q, n, d]`` of the last ``n`` of ``k``'s tokens, causal."""
    n, seen = q.shape[1], k.shape[1]
    if logit_cap > 0:
        group = q.shape[0] // k.shape[0]
        rows = q.unflatten(0, (-1, group)).flatten(1, 2)
        logits = (rows @ k.transpose(1, 2)).mul_(sm_scale / logit_cap).tanh_().mul_(logit_cap)
        logits = logits.unflatten(1, (group, n))
        if n > 1:
            logits.masked_fill_(~_causal(n, seen, q.device), float("-inf"))
        return (logits.softmax(-1).flatten(1, 2) @ v).unflatten(1, (group, n)).flatten(0, 1)
    square = n == seen
    mask = None if square or n == 1 else _causal(n, seen, q.device)
    return torch.nn.functional.scaled_dot_product_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        is_causal=square and n > 1,
        scale=sm_scale,
        enable_gqa=True,
    ).squeeze(0)


def _causal(n: int, seen: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, seen, dtype=torch.bool, device=device).tril_(seen - n)
