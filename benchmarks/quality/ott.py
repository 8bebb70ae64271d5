"""Outlier token tracing (arXiv 2505.10938): KIVI's axes, with the tokens of small keys kept exact.

Tokens are quantized in groups of 128 once 32 more have gathered behind them. Of the pool's tokens
and the group's, per KV head, the 3 of the smallest key magnitude (L2 here) stay or come into the
pool; K and V of those that come are replaced by the group's mean before it is rounded, and
attention reads them exactly. Whom they push out stays exact in a second pool of 32; the group
that would overflow it, and all later ones, are quantized as they are. The first layer has no pool.
"""

from __future__ import annotations

import torch

from benchmarks.quality.cache import EXACT_BITS, LayerCache, LayerPrompt
from benchmarks.quality.min_max import PARAMETER_BITS, round_min_max

GROUP = 128
RESIDUAL = 32
OUTLIERS = 3
EXTRA = 32
_PLAIN_LAYERS = 1
_POSITION_BITS = 32


class Pool:
    """Key magnitudes of the outliers of each row, and how many the second pool has taken."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.magnitude = torch.full((rows, OUTLIERS), torch.inf, device=device)
        self.evicted = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tracking = torch.ones(rows, dtype=torch.bool, device=device)

    def choose(self, k: torch.Tensor) -> torch.Tensor:
        """Take the outliers of a group ``k [rows, n, d]``; bool ``[rows, n]``."""
        magnitude = torch.cat([self.magnitude, k.norm(dim=-1)], 1)
        smallest, ids = magnitude.topk(OUTLIERS, largest=False)
        kept = (ids < OUTLIERS).sum(1)
        evicted = self.magnitude.isfinite().sum(1) - kept
        self.tracking &= self.evicted + evicted <= EXTRA
        self.evicted += evicted * self.tracking
        self.magnitude = torch.where(self.tracking[:, None], smallest, self.magnitude)
        chosen = torch.zeros(magnitude.shape, dtype=torch.bool, device=k.device)
        chosen.scatter_(1, ids, self.tracking[:, None].expand_as(ids))
        return chosen[:, OUTLIERS:]

    def branched(self, p: int, n: int, h: int) -> Pool:
        """A copy for each of ``n`` branches: rows (p, h) become (p, n, h)."""
        pool = Pool(0, self.magnitude.device)
        for name in ("magnitude", "evicted", "tracking"):
            rows = getattr(self, name).unflatten(0, (p, 1, h))
            shape = (p, n, h, *rows.shape[3:])
            setattr(pool, name, rows.expand(shape).flatten(0, 2).clone())
        return pool

    @property
    def exact(self) -> float:
        """Tokens kept exact, mean over rows."""
        return (self.magnitude.isfinite().sum(1) + self.evicted).float().mean().item()


class OTT(LayerCache):
    """Outlier token tracing with groups of 128, a residual of 32 and 3 outliers per head."""

    name = "ott"
    bit_widths = ((4, 4), (4, 2), (2, 2))

    def _open(self, prompt: LayerPrompt) -> None:
        k, v = (x.float().flatten(0, 1) for x in (prompt.k, prompt.v))
        self._pool = Pool(len(k), k.device)
        self.packed = 0
        parts = []
        while self.prompt_len - self.packed >= GROUP + RESIDUAL:
            group = slice(self.packed, self.packed + GROUP)
            parts.append(self._round(k[:, group], v[:, group]))
            self.packed += GROUP
        parts.append((k[:, self.packed :], v[:, self.packed :]))
        k, v = (torch.cat(x, 1).view(self.p, self.h, -1, self.d) for x in zip(*parts, strict=True))
        self._hold(k, v, self.packed)
        self._pool = self._pool.branched(self.p, self.n, self.h)

    def _compress(self) -> None:
        if self.length - self.packed < GROUP + RESIDUAL:
            return
        start = self.packed - self.shared_k.shape[2]
        group = slice(start, start + GROUP)
        pair = (x[..., group, :].flatten(0, 2) for x in (self.own_k, self.own_v))
        shape = (self.p, self.n, self.h, GROUP, self.d)
        k, v = (x.view(shape) for x in self._round(*pair))
        self.own_k[..., group, :], self.own_v[..., group, :] = k, v
        self.packed += GROUP

    def _round(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One group ``[rows, 128, d]`` as attention reads it from now on."""
        chosen = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
        if self.layer >= _PLAIN_LAYERS:
            chosen = self._pool.choose(k)
        chosen = chosen.unsqueeze(-1)
        filled_k, filled_v = (torch.where(chosen, x.mean(1, keepdim=True), x) for x in (k, v))
        rounded_k = round_min_max(filled_k, self.bits[0], -2, GROUP)
        rounded_v = round_min_max(filled_v, self.bits[1], -1, min(GROUP, self.d))
        return torch.where(chosen, k, rounded_k), torch.where(chosen, v, rounded_v)

    def stored_bits(self) -> float:
        groups = self.d / GROUP + self.d / min(GROUP, self.d)
        token = sum(self.bits) * self.d + PARAMETER_BITS * groups
        exact = 2 * EXACT_BITS * self.d
        outliers = self._pool.exact * (exact + _POSITION_BITS)
        return token * self.packed + exact * (self.length - self.packed) + outliers
