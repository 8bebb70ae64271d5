"""fp8 e4m3 without scales, as SGLang's ``--kv-cache-dtype fp8_e4m3`` stores it by default."""

from __future__ import annotations

import torch

from benchmarks.quality.cache import TokenCache

_MAX = torch.finfo(torch.float8_e4m3fn).max


class Fp8(TokenCache):
    """Every element rounded to e4m3, values beyond ±448 clamped."""

    name = "fp8"
    bit_widths = ((8, 8),)

    def _round(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        return x.clamp(-_MAX, _MAX).to(torch.float8_e4m3fn).float()

    def _token_bits(self) -> float:
        return 2 * 8 * self.d
