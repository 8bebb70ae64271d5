"""KIVI (arXiv 2402.02750): K per channel over groups of tokens, V per token, a float16 residual.

K is quantized in blocks of R tokens when R exact ones have gathered; V one token per step, so that
its latest R stay exact. Both after the attention of the step. The prompt likewise: K's last
``length mod R`` tokens and V's last R stay exact.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from benchmarks.quality.cache import EXACT_BITS, LayerCache, LayerPrompt
from benchmarks.quality.min_max import PARAMETER_BITS, round_min_max


class Kivi(LayerCache):
    """KIVI with ``group`` tokens or channels per scale and ``residual`` exact tokens.

    A group of V's cannot exceed a head: it has min(group, head_dim) channels.
    """

    bit_widths = ((4, 4), (4, 2), (2, 2))
    group: ClassVar[int]
    residual: ClassVar[int] = 128

    def _open(self, prompt: LayerPrompt) -> None:
        k, v = prompt.k.float(), prompt.v.float()
        self.packed_k = self.prompt_len - self.prompt_len % self.residual
        self.packed_v = max(0, self.prompt_len - self.residual)
        packed_k = self._round_k(k[:, :, : self.packed_k])
        packed_v = self._round_v(v[:, :, : self.packed_v])
        k = torch.cat([packed_k, k[:, :, self.packed_k :]], 2)
        v = torch.cat([packed_v, v[:, :, self.packed_v :]], 2)
        self._hold(k, v, min(self.packed_k, self.packed_v))

    def _compress(self) -> None:
        start = self.shared_k.shape[2]
        if self.length - self.packed_k == self.residual:
            block = slice(self.packed_k - start, self.length - start)
            self.own_k[..., block, :] = self._round_k(self.own_k[..., block, :])
            self.packed_k = self.length
        if self.length - self.packed_v > self.residual:
            oldest = self.packed_v - start
            self.own_v[..., oldest, :] = self._round_v(self.own_v[..., oldest, :])
            self.packed_v += 1

    def _round_k(self, k: torch.Tensor) -> torch.Tensor:
        return round_min_max(k, self.bits[0], -2, self.group)

    def _round_v(self, v: torch.Tensor) -> torch.Tensor:
        return round_min_max(v, self.bits[1], -1, min(self.group, self.d))

    def stored_bits(self) -> float:
        k_bits = self.bits[0] + PARAMETER_BITS / self.group
        v_bits = self.bits[1] + PARAMETER_BITS / min(self.group, self.d)
        exact = 2 * self.length - self.packed_k - self.packed_v
        return self.d * (k_bits * self.packed_k + v_bits * self.packed_v + EXACT_BITS * exact)


class KiviG32(Kivi):
    """The authors' own setting."""

    name = "kivi_g32"
    group = 32


class KiviG128(Kivi):
    """The setting PatternKV compares itself with."""

    name = "kivi_g128"
    group = 128
