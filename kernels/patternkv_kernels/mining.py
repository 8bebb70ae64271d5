"""Mining: patterns and channel scales from the exact K or V vectors of a segment."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patternkv_kernels.format import BITS, MAX_PATTERNS

FLOAT16_MAX = 65504.0
CHANNEL_SCALE_FLOOR = 2.0**-6
"""Smallest channel scale relative to the root mean square over a head's channels."""


class MinedTable(NamedTuple):
    """One table's content for K or V of one layer."""

    patterns: torch.Tensor
    """float16 ``[h, num_patterns, d]``"""
    channel_scale: torch.Tensor
    """float16 ``[h, d]``, root mean square 1 over ``d``, positive"""


def sanitize(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, NaN turned to 0 and everything else clamped to the finite float16 range."""
    return x.float().nan_to_num(nan=0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX)


def mine_table(
    x: torch.Tensor,
    *,
    num_patterns: int,
    num_sinks: int,
    bits: int,
    max_sample: int = 2048,
    iterations: int = 3,
) -> MinedTable:
    """Mine a pattern table from ``x``."""
    if bits not in BITS:
        raise ValueError(f"bits={bits}: codes have 2 or 4 bits")
    if not 1 <= num_patterns <= MAX_PATTERNS:
        raise ValueError(f"num_patterns={num_patterns}: must be in 1..{MAX_PATTERNS}")
    if not 0 <= num_sinks <= num_patterns:
        raise ValueError(f"num_sinks={num_sinks}: must be in 0..num_patterns={num_patterns}")
    n, h, d = x.shape
    if n == 0:
        raise ValueError("x has no tokens: a table is mined from at least one")
    sinks = sanitize(x[:num_sinks]).transpose(0, 1)
    rest = x[num_sinks:]
    if rest.shape[0] > max_sample:
        picks = torch.arange(max_sample, device=x.device) * rest.shape[0] // max_sample
        rest = rest[picks]
    tokens = sanitize(rest).transpose(0, 1).contiguous()
    free = num_patterns - sinks.shape[1]
    num_tokens = tokens.shape[1]
    if num_tokens <= free:
        patterns = torch.cat([sinks, tokens], dim=1)
        patterns = torch.cat(
            [patterns, patterns[:, :1].expand(h, num_patterns - patterns.shape[1], d)], dim=1
        )
        return MinedTable(
            patterns.half(), torch.ones(h, d, dtype=torch.float16, device=x.device)
        )
    if free == 0:
        centroids = sinks
    else:
        picks = torch.arange(free, device=x.device) * num_tokens // free
        centroids = tokens[:, picks]
        for _ in range(iterations):
            centroids = _lloyd_step(tokens, centroids)
        centroids = torch.cat([sinks, centroids], dim=1)
    patterns = centroids.half()
    assigned, _ = _assign(tokens, patterns.float())
    residual = tokens - _take(patterns.float(), assigned)
    rms = residual.square().mean(1).sqrt()
    return MinedTable(patterns, _channel_scale(rms))


def _channel_scale(rms: torch.Tensor) -> torch.Tensor:
    norm = rms.square().mean(-1, keepdim=True).sqrt()
    relative = torch.where(norm > 0, rms / norm.clamp_min(1e-30), torch.ones_like(rms))
    return relative.clamp_min(CHANNEL_SCALE_FLOOR).half()


def _take(patterns: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return patterns.gather(1, ids.unsqueeze(2).expand(-1, -1, patterns.shape[2]))


def _assign(tokens: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of every token and the squared distance to it, up to the token's own square."""
    half_norm = centroids.square().sum(-1).mul_(0.5).unsqueeze(1)
    score, ids = torch.baddbmm(half_norm, tokens, centroids.transpose(1, 2), alpha=-1).min(2)
    return ids, score


def _lloyd_step(tokens: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    ids, score = _assign(tokens, centroids)
    member = torch.zeros(*ids.shape, centroids.shape[1], device=ids.device)
    member.scatter_(2, ids.unsqueeze(2), 1.0)
    count = member.sum(1)
    mean = member.transpose(1, 2).bmm(tokens) / count.clamp_min(1.0).unsqueeze(2)
    distance = score.mul_(2).add_(tokens.square().sum(-1))
    empty = count == 0
    farthest = distance.topk(centroids.shape[1], dim=1).indices
    rank = empty.long().cumsum(1).sub_(1).clamp_min_(0)
    seed = _take(tokens, farthest.gather(1, rank))
    return torch.where(empty.unsqueeze(2), seed, mean)
