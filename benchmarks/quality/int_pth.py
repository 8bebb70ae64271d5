"""Plain asymmetric integers with a scale per token and head."""

from __future__ import annotations

import torch

from benchmarks.quality.cache import TokenCache
from benchmarks.quality.min_max import PARAMETER_BITS, round_min_max


class IntPerTokenHead(TokenCache):
    """Min-max over the channels of one token and head; float16 scale and minimum."""

    name = "int_pth"
    bit_widths = ((4, 4), (4, 2), (2, 2))

    def _round(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        return round_min_max(x, bits, -1, self.d)

    def _token_bits(self) -> float:
        return sum(self.bits) * self.d + 2 * PARAMETER_BITS
