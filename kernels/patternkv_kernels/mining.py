"""Mining: patterns, channel scales and weights from the exact K or V vectors of a segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.dispatch import Impl, use_cuda
from patternkv_kernels.format import MAX_PATTERNS
from patternkv_kernels.mined import MinedTable
from patternkv_kernels.mining_cuda import mine_cuda, unsupported
from patternkv_kernels.mining_reference import mine_reference, query_weight, sample

_MAX_SAMPLE, _ITERATIONS = 2048, 3


def mine_table(
    x: torch.Tensor,
    *,
    num_patterns: int,
    num_sinks: int,
    channel_weight: torch.Tensor | None = None,
    max_sample: int = _MAX_SAMPLE,
    iterations: int = _ITERATIONS,
    impl: Impl = "auto",
) -> MinedTable:
    """Mine the table of one layer's K or V from the tokens of a segment.

    The first ``num_sinks`` tokens become patterns of their own. The rest of the patterns are
    cluster centres (a few Lloyd steps from evenly spaced tokens), an eighth of them started at the
    tokens farthest from all others' centres. ``channel_scale`` follows the root mean square of the
    residuals of each channel.

    Nothing is random and nothing depends on the order of concurrent additions, so equal ``x`` give
    equal bits on the same machine. The two implementations round differently, which may tip a token
    to another cluster.

    Parameters
    ----------
    x: ``[n, h, d]``, any float dtype, ``n >= 1``. NaN counts as 0, and values are clamped to the
        float16 range, inside which bfloat16 sinks down to 2**-17 are reproduced exactly, smaller
        ones within 2**-25.
    num_patterns: 1..256, patterns of the result. With fewer tokens, every token is a pattern and
        pattern 0 fills up.
    num_sinks: 0..num_patterns, how many of ``x``'s first tokens are sinks; 0 when ``x`` does not
        start a sequence.
    channel_weight: float16 ``[h, d]``, positive: how much an error in each channel counts, for the
        clusters here and for the store later (:func:`query_weight`); None counts all alike.
    max_sample: at most this many tokens besides the sinks are looked at, evenly spaced but for the
        last 64, which are among them.
    iterations: Lloyd steps before the outliers join; one more follows.
    """
    _check(x, num_patterns, num_sinks)
    if max_sample < 1 or iterations < 0:
        raise ValueError(f"max_sample={max_sample}, iterations={iterations}: need >= 1 and >= 0")
    if channel_weight is not None:
        if channel_weight.shape != x.shape[1:] or channel_weight.device != x.device:
            raise ValueError(
                f"channel_weight is {list(channel_weight.shape)} on {channel_weight.device}: x "
                f"{list(x.shape)} on {x.device} needs {list(x.shape[1:])} there"
            )
        channel_weight = channel_weight.half()
    out = MinedTable(*_allocate(x, x.shape[1], num_patterns))
    _mine([x], None, channel_weight, [out], num_sinks, max_sample, iterations, impl)
    return out._replace(channel_weight=channel_weight)


def mine_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    num_patterns: int,
    num_sinks: int,
    out: tuple[MinedTable, MinedTable] | None = None,
    impl: Impl = "auto",
) -> tuple[MinedTable, MinedTable]:
    """Mine K's and V's tables of one layer from a segment's ``q [n, h_q, d]`` and ``k``, ``v [n,
    h_kv, d]``: K's channels weighted by queries, which are sampled as tokens are, V's alike.
    The rest is as in :func:`mine_table`, and so are the tables, but mined together.

    ``out`` is memory for the result, such as :meth:`LayerTables.table`; None allocates it."""
    _check(k, num_patterns, num_sinks)
    if v.shape != k.shape:
        raise ValueError(f"k is {list(k.shape)} and v {list(v.shape)}: must be alike")
    h_kv, d = k.shape[1:]
    if q.shape[0] != k.shape[0] or q.shape[1] % h_kv or q.shape[2] != d:
        raise ValueError(f"q is {list(q.shape)}: k {list(k.shape)} needs [n, group * h_kv, d]")
    if out is None:
        patterns, scale = _allocate(k, 2 * h_kv, num_patterns)
        weight = scale.new_empty(h_kv, d)
        out = (
            MinedTable(patterns[:h_kv], scale[:h_kv], weight),
            MinedTable(patterns[h_kv:], scale[h_kv:], None),
        )
    for mined in out:
        if mined.patterns.shape != (h_kv, num_patterns, d):
            raise ValueError(
                f"out has patterns {list(mined.patterns.shape)}: needs {[h_kv, num_patterns, d]}"
            )
    _mine([k, v], q, None, list(out), num_sinks, _MAX_SAMPLE, _ITERATIONS, impl)
    return out


def _allocate(x: torch.Tensor, h: int, num_patterns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the patterns and channel scales of ``h`` heads."""
    d = x.shape[2]
    return (
        x.new_empty(h, num_patterns, d, dtype=torch.float16),
        x.new_empty(h, d, dtype=torch.float16),
    )


def _mine(
    sides: Sequence[torch.Tensor],
    q: torch.Tensor | None,
    channel_weight: torch.Tensor | None,
    out: Sequence[MinedTable],
    num_sinks: int,
    max_sample: int,
    iterations: int,
    impl: Impl,
) -> None:
    """Mine K (of ``q`` or ``channel_weight``), or K and V, into ``out``."""
    x = sides[0]
    vectors = [*sides, q] if q is not None else sides
    reason = unsupported(vectors, out, min(len(x) - num_sinks, max_sample))
    fmt = None if reason else jit.format_of_all_bits(x.shape[2])
    if use_cuda(impl, "mining", fmt, x.device, reason):
        mine_cuda(sides, q, channel_weight, out, num_sinks, max_sample, iterations)
        return
    if q is not None:
        channel_weight = query_weight(q[sample(q, 0, max_sample)], x.shape[1])
    weights = [channel_weight, None][: len(sides)]
    num_patterns, h = out[0].patterns.shape[1], x.shape[1]
    patterns, channel_scale = mine_reference(
        sides, weights, num_patterns, num_sinks, max_sample, iterations
    )
    for side, (mined, weight) in enumerate(zip(out, weights, strict=True)):
        heads = slice(side * h, (side + 1) * h)
        mined.fill(MinedTable(patterns[heads], channel_scale[heads], weight))


def _check(x: torch.Tensor, num_patterns: int, num_sinks: int) -> None:
    if not 1 <= num_patterns <= MAX_PATTERNS:
        raise ValueError(
            f"num_patterns={num_patterns}: must be in 1..{MAX_PATTERNS} (a pattern id is one byte)"
        )
    if not 0 <= num_sinks <= num_patterns:
        raise ValueError(f"num_sinks={num_sinks}: must be in 0..num_patterns={num_patterns}")
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x is {list(x.shape)}: needs [n, h, d] with at least one token")
