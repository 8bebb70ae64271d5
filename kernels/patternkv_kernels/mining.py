"""Mining: patterns, channel scales and weights from the exact K or V vectors of a segment."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patternkv_kernels.format import BITS, MAX_PATTERNS

FLOAT16_MAX = 65504.0
_CHANNEL_SCALE_FLOOR = 2.0**-6
"""Smallest channel scale, relative to the root mean square over a head's channels."""
_OUTLIER_SHARE = 8
"""One in this many of the free patterns starts as an outlier token."""
_PRIOR_TOKENS = 16
"""Weight, in tokens, of the plain spread of the channels next to that of the residuals."""
_WEIGHT_FLOOR = 2.0**-4
"""Smallest channel weight, relative to the mean over a head's channels."""


class MinedTable(NamedTuple):
    """One table's content for K or V of one layer."""

    patterns: torch.Tensor
    """float16 ``[h, num_patterns, d]``"""
    channel_scale: torch.Tensor
    """float16 ``[h, d]``, root mean square 1 over ``d``, positive"""
    channel_weight: torch.Tensor | None = None
    """float16 ``[h, d]``, positive: how much an error in each channel counts; None: all alike"""


def sanitize(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, NaN turned to 0 and everything else clamped to the finite float16 range."""
    return x.float().nan_to_num(nan=0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX)


def query_weight(q: torch.Tensor, h_kv: int) -> torch.Tensor:
    """Weights of K's channels, float16 ``[h_kv, d]``, by a segment's queries ``q [n, h_q, d]``.

    An error in channel ``j`` of K moves a logit by ``q[j]`` times itself, so errors count by the
    root mean square that the KV head's queries have there (relative to the mean over channels).
    """
    grouped = sanitize(q).unflatten(1, (h_kv, -1))
    rms = grouped.square().mean((0, 2)).sqrt()
    mean = rms.mean(1, keepdim=True)
    weight = torch.where(mean > 0, rms / mean.clamp_min(2.0**-100), 1.0)
    return weight.clamp_min(_WEIGHT_FLOOR).half()


def mine_table(
    x: torch.Tensor,
    *,
    num_patterns: int,
    num_sinks: int,
    bits: int,
    channel_weight: torch.Tensor | None = None,
    max_sample: int = 2048,
    iterations: int = 3,
) -> MinedTable:
    """Mine the table of one layer's K or V from the tokens of a segment.

    The first ``num_sinks`` tokens become patterns of their own. The rest of the patterns are
    cluster centres (a few Lloyd steps from evenly spaced tokens), an eighth of them started at the
    tokens farthest from all others' centres. ``channel_scale`` follows the root mean square of the
    residuals of each channel.

    Nothing is random and nothing depends on the order of concurrent additions, so equal ``x`` give
    equal bits on the same machine.

    Parameters
    ----------
    x: ``[n, h, d]``, any float dtype, ``n >= 1``. NaN counts as 0, and values are clamped to the
        float16 range, inside which bfloat16 sinks down to 2**-17 are reproduced exactly, smaller
        ones within 2**-25.
    num_patterns: 1..256, patterns of the result. With fewer tokens, every token is a pattern and
        pattern 0 fills up.
    num_sinks: 0..num_patterns, how many of ``x``'s first tokens are sinks; 0 when ``x`` does not
        start a sequence.
    bits: 2 or 4, of the codes this table will be used with. Only validated: measurements gave no
        reason to mine differently.
    channel_weight: float16 ``[h, d]``, positive: how much an error in each channel counts, for the
        clusters here and for the store later (:func:`query_weight`); None counts all alike.
    max_sample: at most this many tokens besides the sinks, evenly spaced, are looked at.
    iterations: Lloyd steps before the outliers join; one more follows.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: codes have 2 or 4 bits; choose one of {BITS}")
    if not 1 <= num_patterns <= MAX_PATTERNS:
        raise ValueError(
            f"num_patterns={num_patterns}: must be in 1..{MAX_PATTERNS} (a pattern id is one byte)"
        )
    if not 0 <= num_sinks <= num_patterns:
        raise ValueError(f"num_sinks={num_sinks}: must be in 0..num_patterns={num_patterns}")
    if max_sample < 1 or iterations < 0:
        raise ValueError(f"max_sample={max_sample}, iterations={iterations}: need >= 1 and >= 0")
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x is {list(x.shape)}: needs [n, h, d] with at least one token")
    sinks = sanitize(x[:num_sinks]).transpose(0, 1)
    tokens = x[num_sinks:]
    if tokens.shape[0] > max_sample:
        picks = torch.arange(max_sample, device=x.device) * tokens.shape[0] // max_sample
        tokens = tokens[picks]
    tokens = sanitize(tokens).transpose(0, 1).contiguous()
    weight = 1.0 if channel_weight is None else channel_weight.float().unsqueeze(1)
    centres = _cluster(tokens * weight, num_patterns - sinks.shape[1], iterations) / weight
    patterns = torch.cat([sinks, centres], dim=1).half()
    channel_scale = _channel_scale(tokens, patterns.float(), weight)
    padding = patterns[:, :1].expand(-1, num_patterns - patterns.shape[1], -1)
    return MinedTable(torch.cat([patterns, padding], dim=1), channel_scale, channel_weight)


def mine_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_patterns: int,
    num_sinks: int,
    bits: tuple[int, int],
) -> tuple[MinedTable, MinedTable]:
    """Mine K's and V's tables of one layer from a segment's ``q [n, h_q, d]`` and ``k``, ``v [n,
    h_kv, d]``: K's channels weighted by the queries, V's alike. ``bits`` are those of K and V; the
    rest is as in :func:`mine_table`."""

    def mine(x: torch.Tensor, bits: int, weight: torch.Tensor | None) -> MinedTable:
        return mine_table(
            x,
            num_patterns=num_patterns,
            num_sinks=num_sinks,
            bits=bits,
            channel_weight=weight,
        )

    return mine(k, bits[0], query_weight(q, k.shape[1])), mine(v, bits[1], None)


def _cluster(tokens: torch.Tensor, num_centres: int, iterations: int) -> torch.Tensor:
    """At most ``num_centres`` centres ``[h, m, d]`` of ``tokens [h, n, d]``; the tokens themselves
    if they are few."""
    n = tokens.shape[1]
    if n <= num_centres or num_centres == 0:
        return tokens[:, :num_centres]
    num_outliers = num_centres // _OUTLIER_SHARE
    num_starts = num_centres - num_outliers
    starts = torch.arange(num_starts, device=tokens.device) * n // num_starts
    centres = tokens[:, starts]
    square = tokens.square().sum(-1)
    for _ in range(iterations):
        centres = _lloyd_step(tokens, square, centres)
    if num_outliers:
        distance = _nearest(tokens, square, centres)[0]
        outliers = distance.topk(num_outliers, dim=1).indices
        centres = torch.cat([centres, _take(tokens, outliers)], dim=1)
    return _lloyd_step(tokens, square, centres)


def _lloyd_step(tokens: torch.Tensor, square: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Means of the tokens nearest to each centre; a centre without tokens moves to one of the
    farthest tokens."""
    distance, ids = _nearest(tokens, square, centres)
    num_centres = centres.shape[1]
    # A product with the one-hot membership sums in a fixed order; scattered atomic additions on
    # CUDA do not.
    member = torch.zeros(*ids.shape, num_centres, device=ids.device)
    member.scatter_(2, ids.unsqueeze(2), 1.0)
    count = member.sum(1)
    mean = member.transpose(1, 2).bmm(tokens) / count.clamp_min(1.0).unsqueeze(2)
    empty = count == 0
    farthest = distance.topk(num_centres, dim=1).indices
    replacement = farthest.gather(1, empty.long().cumsum(1).sub_(1).clamp_min_(0))
    return torch.where(empty.unsqueeze(2), _take(tokens, replacement), mean)


def _nearest(
    tokens: torch.Tensor, square: torch.Tensor, centres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance to the nearest centre, and its id, both ``[h, n]``; ``square`` is the
    tokens' own."""
    half_norm = centres.square().sum(-1).mul_(0.5).unsqueeze(1)
    score, ids = torch.baddbmm(half_norm, tokens, centres.transpose(1, 2), alpha=-1).min(2)
    return score.mul_(2).add_(square), ids


def _take(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``rows[h, ids[h, i]]`` for ``rows [h, n, d]`` and ``ids [h, m]``."""
    return rows.gather(1, ids.unsqueeze(2).expand(-1, -1, rows.shape[2]))


def _channel_scale(
    tokens: torch.Tensor, patterns: torch.Tensor, weight: torch.Tensor | float
) -> torch.Tensor:
    """Relative spread of the channels, float16 ``[h, d]``.

    Mostly that of the residuals. Where these are few (nearly every token is its own pattern) the
    spread of the tokens themselves counts too, since later tokens may be quantized with the same
    table.
    """
    h, n, d = tokens.shape
    if n == 0:
        return torch.ones(h, d, dtype=torch.float16, device=tokens.device)
    weighted = tokens * weight
    ids = _nearest(weighted, weighted.square().sum(-1), patterns * weight)[1]
    residual = tokens - _take(patterns, ids)
    count = max(n - patterns.shape[1], 0)
    spread = count * _relative_variance(residual)
    spread += _PRIOR_TOKENS * _relative_variance(tokens - tokens.mean(1, keepdim=True))
    relative = (spread / (count + _PRIOR_TOKENS)).sqrt()
    return relative.clamp_min(_CHANNEL_SCALE_FLOOR).half()


def _relative_variance(x: torch.Tensor) -> torch.Tensor:
    """Mean square of each channel over that of all channels, ``[h, d]`` of ``[h, n, d]``; 1 where
    all is 0."""
    variance = x.square().mean(1)
    mean = variance.mean(1, keepdim=True)
    return torch.where(mean > 0, variance / mean.clamp_min(2.0**-100), 1.0)
