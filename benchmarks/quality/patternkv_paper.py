"""PatternKV as its authors' code has it (arXiv 2510.05176, github.com/HCOOOH/PatternKV).

Patterns are mined per KV head by k-means over the whole prompt; each block of 128 decoded tokens
adds one more, the centre of the block's range. Residuals are rounded as in KIVI with groups of 128:
K per channel over tokens, V per token over channels. A token of V subtracts its pattern only where
that narrows its range enough (the gate). Nothing protects sinks.

Two defects of that code are left out: patterns live per request, not per module, and a prompt of
exactly 128 tokens is quantized like any other.
"""

from __future__ import annotations

import math

import torch

from benchmarks.quality.cache import EXACT_BITS, LayerCache, LayerPrompt
from benchmarks.quality.flatness import Flatness
from benchmarks.quality.min_max import PARAMETER_BITS, round_min_max

BLOCK = 128
"""Group of K, exact window, and period of new patterns, in tokens."""
PATTERNS = 32
_ITERATIONS = 30
_TOLERANCE = 1e-4
_Z = 1.6448536269514722  # one-sided 95 %
_ID_BITS = 8
_GATE_BITS = 1


def value_range(x: torch.Tensor) -> torch.Tensor:
    """Largest minus smallest over the last dim."""
    return x.amax(-1) - x.amin(-1)


def gate(v: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Whether ``v [..., d]`` subtracts ``pattern``: a z-test that the error's variance falls."""
    ratio = value_range(v - pattern).clamp_min(1e-12) / value_range(v).clamp_min(1e-12)
    square = ratio.square()
    return 1 - square >= 2 * _Z / math.sqrt(5 * v.shape[-1]) * (1 + square.square()).sqrt()


def nearest(x: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Ids ``[r, n]`` of the patterns ``[r, m, d]`` nearest to ``x [r, n, d]`` by L2 distance."""
    distance = patterns.square().sum(-1)[:, None] - 2 * x @ patterns.mT
    return distance.argmin(-1)


def narrowest(x: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Ids ``[r, n]`` of the patterns whose residual of ``x`` has the least range."""
    ranges = [value_range(x - patterns[:, m : m + 1]) for m in range(patterns.shape[1])]
    return torch.stack(ranges, -1).argmin(-1)


def k_means(x: torch.Tensor, count: int) -> torch.Tensor:
    """Lloyd's centres ``[r, count, d]`` of each row of ``x [r, n, d]``.

    Starts at the tokens with the highest of seeded uniform scores, the same in all rows; a centre
    without tokens moves to a random one. Rows stop once no coordinate moves by more than 1e-4, from
    the second iteration on.

    Raises:
        ValueError: fewer tokens than centres.
    """
    rows, n, d = x.shape
    if n < count:
        raise ValueError(f"a prompt of {n} tokens: PatternKV mines {count} patterns from a prompt")
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(n, generator=generator).topk(count).indices.to(x.device)
    centres = x[:, start]
    moving = torch.ones(rows, dtype=torch.bool, device=x.device)
    for iteration in range(_ITERATIONS):
        ids = nearest(x, centres)
        member = torch.nn.functional.one_hot(ids, count).float()
        size = member.sum(1)
        mean = member.mT @ x / size.clamp_min(1).unsqueeze(-1)
        pick = torch.randint(n, (rows, count), generator=generator).to(x.device)
        random = x.gather(1, pick.unsqueeze(-1).expand(-1, -1, d))
        moved = torch.where(size.unsqueeze(-1) > 0, mean, random)
        moved = torch.where(moving[:, None, None], moved, centres)
        shift = (moved - centres).abs().amax((1, 2))
        centres = moved
        if iteration > 0:
            moving = moving & (shift > _TOLERANCE)
        if not moving.any():
            break
    return centres


def take(patterns: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``patterns[r, ids[r, i]]``."""
    return patterns.gather(1, ids.unsqueeze(-1).expand(-1, -1, patterns.shape[-1]))


class PatternKVPaper(LayerCache):
    """PatternKV with 32 patterns, groups and window of 128."""

    name = "patternkv_paper"
    bit_widths = ((4, 4), (4, 2), (2, 2))

    def _open(self, prompt: LayerPrompt) -> None:
        # Rows are (prompt, head), later (prompt, branch, head).
        k, v = (x.float().flatten(0, 1) for x in (prompt.k, prompt.v))
        k_patterns, v_patterns = (k_means(x, PATTERNS).half().float() for x in (k, v))
        self.packed = self.prompt_len - self.prompt_len % BLOCK
        old_k, old_v = k[:, : self.packed], v[:, : self.packed]
        k_base = take(k_patterns, nearest(old_k, k_patterns))
        v_base = take(v_patterns, nearest(old_v, v_patterns))
        v_gated = v_base * gate(old_v, v_base).unsqueeze(-1)
        self.flatness = Flatness.of(old_k, old_k - k_base, old_v, old_v - v_gated)
        old_k, old_v = self._round_k(old_k, k_base), self._round_v(old_v, v_base)
        k, v = (
            torch.cat([old, x[:, self.packed :]], 1).view(self.p, self.h, -1, self.d)
            for old, x in ((old_k, k), (old_v, v))
        )
        self._hold(k, v, self.packed)
        self._k_patterns, self._v_patterns = (
            x.view(self.p, 1, self.h, PATTERNS, self.d)
            .expand(-1, self.n, -1, -1, -1)
            .reshape(-1, PATTERNS, self.d)
            for x in (k_patterns, v_patterns)
        )

    def _compress(self) -> None:
        if self.length - self.packed < BLOCK:
            return
        block = slice(self.held - BLOCK, self.held)
        k, v = (x[..., block, :].flatten(0, 2) for x in (self.own_k, self.own_v))
        self._k_patterns = torch.cat([self._k_patterns, _centre(k)], 1)
        self._v_patterns = torch.cat([self._v_patterns, _centre(v)], 1)
        k = self._round_k(k, take(self._k_patterns, narrowest(k, self._k_patterns)))
        v = self._round_v(v, take(self._v_patterns, narrowest(v, self._v_patterns)))
        shape = (self.p, self.n, self.h, BLOCK, self.d)
        self.own_k[..., block, :], self.own_v[..., block, :] = k.view(shape), v.view(shape)
        self.packed = self.length

    def _round_k(self, k: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        return round_min_max(k - pattern, self.bits[0], -2, BLOCK) + pattern

    def _round_v(self, v: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        base = pattern * gate(v, pattern).unsqueeze(-1)
        return round_min_max(v - base, self.bits[1], -1, min(BLOCK, self.d)) + base

    def stored_bits(self) -> float:
        groups = self.d / BLOCK + self.d / min(BLOCK, self.d)
        token = sum(self.bits) * self.d + PARAMETER_BITS * groups + 2 * _ID_BITS + _GATE_BITS
        exact = 2 * EXACT_BITS * self.d
        patterns = self._k_patterns.shape[1]
        return token * self.packed + exact * (self.length - self.packed + patterns)


def _centre(x: torch.Tensor) -> torch.Tensor:
    """The centre ``[r, 1, d]`` of the range of each row's tokens ``[r, n, d]``, as stored."""
    return ((x.amin(1, keepdim=True) + x.amax(1, keepdim=True)) / 2).half().float()
