"""The model's own cache."""

from __future__ import annotations

from benchmarks.quality.cache import EXACT_BITS, LayerCache, LayerPrompt


class Bf16(LayerCache):
    """Everything exact: the reference all others are compared with."""

    name = "bf16"
    bit_widths = ((16, 16),)

    def _open(self, prompt: LayerPrompt) -> None:
        self._hold(prompt.k.float(), prompt.v.float(), self.prompt_len)

    def stored_bits(self) -> float:
        return 2 * EXACT_BITS * self.d * self.length
