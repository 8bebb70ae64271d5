"""Mining in torch: the specification of what the CUDA kernel computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT16_MAX = 65504.0
_CHANNEL_SCALE_FLOOR = 2.0**-6
"""Smallest channel scale, relative to the root mean square over a head's channels."""
_OUTLIER_SHARE = 8
"""One in this many of the free patterns starts as an outlier token."""
_PRIOR_TOKENS = 16
"""Weight, in tokens, of the plain spread of the channels next to that of the residuals."""
_SAMPLED_TAIL = 64
"""Most of a segment's last tokens that are looked at however long it is: a prompt ends in its
question, which answers begin by reading."""
_NO_SPREAD = 2.0**-20
"""Added to relative spreads: negligible beside any but zeros."""
_WEIGHT_FLOOR = 2.0**-4
"""Smallest channel weight, relative to the mean over a head's channels."""


def sanitize(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32, NaN turned to 0 and everything else clamped to the finite float16 range."""
    return x.float().nan_to_num(nan=0.0).clamp(-FLOAT16_MAX, FLOAT16_MAX)


def query_weight(q: torch.Tensor, h_kv: int) -> torch.Tensor:
    """Weights of K's channels, float16 ``[h_kv, d]``, by a segment's queries ``q [n, h_q, d]``.

    An error in channel ``j`` of K moves a logit by ``q[j]`` times itself, so errors count by the
    root mean square that the KV head's queries have there (relative to the mean over channels).
    Weights are finite and positive whatever ``q`` holds, but mean nothing if that is not finite.
    """
    grouped = q.unflatten(1, (h_kv, -1))
    norm = torch.linalg.vector_norm(grouped, dim=(0, 2), dtype=torch.float32)
    weight = (norm / norm.mean(1, keepdim=True)).nan_to_num_(nan=1.0)
    return weight.clamp_(_WEIGHT_FLOOR, FLOAT16_MAX).half()


def sample(x: torch.Tensor, num_sinks: int, max_sample: int) -> slice | torch.Tensor:
    """Which rows of ``x`` are looked at besides the sinks: all, or evenly spaced ones and the last
    ``_SAMPLED_TAIL``, or half of ``max_sample`` if that is less."""
    n = len(x) - num_sinks
    if n <= max_sample:
        return slice(num_sinks, None)
    tail = min(_SAMPLED_TAIL, max_sample // 2)
    count = max_sample - tail
    rows = torch.arange(max_sample, device=x.device)
    spread = (rows * (n - tail)).div_(count, rounding_mode="floor")
    return num_sinks + torch.where(rows < count, spread, rows + (n - max_sample))


def mine_reference(
    sides: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    num_patterns: int,
    num_sinks: int,
    max_sample: int,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns ``[h, num_patterns, d]`` and channel scales ``[h, d]``, both float16, of all heads
    of ``sides``, each ``[n, h_side, d]``, in one pass.

    On a GPU small segments cost what their launches cost, hence the few operations.
    """
    rows, weight = _extended(sides, weights, num_sinks, max_sample)
    num_sinks = min(num_sinks, rows.shape[1])
    sinks, tokens = rows[:, :num_sinks], rows[:, num_sinks:]
    h, n, d = *tokens.shape[:2], weight.shape[2]
    num_centres = min(num_patterns - num_sinks, n)
    centres = _cluster(tokens, num_centres, iterations) if 0 < num_centres < n else tokens
    found = torch.cat([sinks, centres[:, :num_centres]], dim=1)
    used = found.shape[1]
    patterns = weight.new_empty(h, num_patterns, d, dtype=torch.float16)
    torch.div(found[..., :d], weight, out=patterns[:, :used])
    patterns[:, used:] = patterns[:, :1]
    return patterns, _channel_scale(tokens, found, weight)


def _extended(
    sides: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    num_sinks: int,
    max_sample: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and sampled tokens of all heads, weighted, float32 ``[h, rows, d + 4]``, and the
    weights ``[h, 1, d]``.

    Column ``d`` is -1/2 and the others are 1, so that a product with centres, whose column ``d`` is
    their squared norm, scores them (:func:`_scores`), and a product with memberships also counts.
    (Four of them keep rows at multiples of 16 bytes.)
    """
    n, _, d = sides[0].shape
    chosen = sample(sides[0], num_sinks, max_sample)
    num_rows = min(n, num_sinks + max_sample)
    h = sum(x.shape[1] for x in sides)
    rows = torch.ones(num_rows, h, d + 4, device=sides[0].device)
    weight = torch.ones(h, 1, d, device=sides[0].device)
    rows[..., d] = -0.5
    head = 0
    for x, of_side in zip(sides, weights, strict=True):
        heads = slice(head, head + x.shape[1])
        if num_sinks:
            rows[:num_sinks, heads, :d] = x[:num_sinks]
        rows[num_sinks:, heads, :d] = x[chosen]
        if of_side is not None:
            weight[heads, 0] = of_side
        head = heads.stop
    rows.nan_to_num_(nan=0.0).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    rows[..., :d].mul_(weight.squeeze(1))
    return rows.transpose(0, 1), weight


def _cluster(tokens: torch.Tensor, num_centres: int, iterations: int) -> torch.Tensor:
    """``num_centres`` centres ``[h, num_centres, d + 4]`` of more tokens ``[h, n, d + 4]``."""
    n, d = tokens.shape[1], tokens.shape[2] - 4
    num_outliers = num_centres // _OUTLIER_SHARE
    num_starts = num_centres - num_outliers
    starts = torch.arange(0, num_starts * n, n, device=tokens.device)
    centres = tokens.index_select(1, starts.div_(num_starts, rounding_mode="floor"))
    norm = torch.linalg.vector_norm(tokens[..., :d], dim=2)
    number = torch.arange(num_centres, device=tokens.device)
    for _ in range(iterations):
        centres = _lloyd_step(tokens, norm, centres, number[:num_starts])
    if num_outliers:
        nearness = _nearest(tokens, norm, centres)[0]
        outliers = nearness.topk(num_outliers, dim=1, largest=False).indices
        centres = torch.cat([centres, _take(tokens, outliers)], dim=1)
    return _lloyd_step(tokens, norm, centres, number)


def _lloyd_step(
    tokens: torch.Tensor, norm: torch.Tensor, centres: torch.Tensor, number: torch.Tensor
) -> torch.Tensor:
    """Means of the tokens nearest to each of the ``m`` centres; a centre without tokens moves to
    the farthest of every ``m``-th token, each such centre to one of others. ``number`` counts
    the centres."""
    nearness, ids = _nearest(tokens, norm, centres)
    h, m, width = centres.shape
    member = torch.eq(ids.unsqueeze(2), number, out=tokens.new_empty(*ids.shape, m))
    # A product sums in a fixed order; scattered atomic additions on CUDA do not.
    sums = member.transpose(1, 2).bmm(tokens)
    count = sums[..., -1:]
    rounds = tokens.shape[1] // m
    farthest = nearness[:, : rounds * m].view(h, rounds, m).argmin(1)
    moved = tokens[:, : rounds * m].unflatten(1, (rounds, m))
    moved = moved.gather(1, farthest.view(h, 1, m, 1).expand(-1, -1, -1, width)).squeeze(1)
    return torch.where(count > 0, sums / count, moved)


def _nearest(
    tokens: torch.Tensor, norm: torch.Tensor, centres: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared distance of each token to the nearest centre, negative, and its id, both
    ``[h, n]``; ``norm`` is the tokens' own."""
    score, ids = _scores(tokens, centres).max(2)
    return score.addcmul_(norm, norm, value=-0.5), ids


def _scores(tokens: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """``x . c - |c|^2 / 2`` of all tokens and centres, ``[h, n, m]``: largest of the nearest.

    Puts the squared norms into ``centres``.
    """
    d = tokens.shape[2] - 4
    torch.linalg.vector_norm(centres[..., :d], dim=2, out=centres[..., d]).square_()
    return tokens[..., : d + 1].bmm(centres[..., : d + 1].transpose(1, 2))


def _take(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``rows[h, ids[h, i]]`` for ``rows [h, n, d]`` and ``ids [h, m]``."""
    return rows.gather(1, ids.unsqueeze(2).expand(-1, -1, rows.shape[2]))


def _channel_scale(
    tokens: torch.Tensor, patterns: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Relative spread of the channels, float16 ``[h, d]``, of ``tokens [h, n, d + 4]`` with
    ``patterns [h, m, d + 4]``.

    Mostly that of the residuals. Where these are few (nearly every token is its own pattern) the
    spread of the tokens themselves counts too, since later tokens may be quantized with the same
    table.
    """
    h, n, d = *tokens.shape[:2], weight.shape[2]
    spread = tokens.new_zeros(2, h, d)
    free = n - patterns.shape[1]
    if free > 0:
        ids = _scores(tokens, patterns).argmax(2)
        residual = tokens[..., :d] - _take(patterns[..., :d], ids)
        torch.linalg.vector_norm(residual, dim=1, out=spread[0])
    if n > 0:
        torch.std(tokens[..., :d], 1, correction=0, out=spread[1])
    of_residuals, of_tokens = _relative(spread.div_(weight.squeeze(1)))
    share = max(free, 0) / _PRIOR_TOKENS
    relative = torch.hypot(of_residuals.mul_(share**0.5), of_tokens)
    # All alike where nothing is spread.
    return _relative(relative.add_(_NO_SPREAD)).clamp_min_(_CHANNEL_SCALE_FLOOR).half()


def _relative(x: torch.Tensor) -> torch.Tensor:
    """``x`` over its root mean square along the last dim; 0 where all is 0."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-30)
