"""Every method of the bench, by name."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.bf16 import Bf16
from benchmarks.quality.cache import LayerCache, LayerPrompt
from benchmarks.quality.decoding import MakeCache
from benchmarks.quality.fp8 import Fp8
from benchmarks.quality.hadamard_lloyd import HadamardLloyd
from benchmarks.quality.int_pth import IntPerTokenHead
from benchmarks.quality.kivi import KiviG32, KiviG128
from benchmarks.quality.ott import OTT
from benchmarks.quality.patternkv_paper import PatternKVPaper
from benchmarks.quality.patternkv_sgl import PatternKVSgl, PatternKVSgl64, PatternKVSglWide

METHODS: dict[str, type[LayerCache]] = {
    method.name: method
    for method in (
        Bf16,
        Fp8,
        IntPerTokenHead,
        KiviG32,
        KiviG128,
        PatternKVPaper,
        OTT,
        HadamardLloyd,
        PatternKVSgl,
        PatternKVSgl64,
        PatternKVSglWide,
    )
}


@dataclass(frozen=True)
class Setting:
    """A method at one bit width, written ``kivi_g32:4/2``."""

    method: str
    bits: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> list[Setting]:
        """The settings that ``NAME`` (all its bit widths) or ``NAME:K/V`` names.

        Raises:
            ValueError: an unknown method, or bits it has no definition at.
        """
        name, _, bits = text.partition(":")
        if name not in METHODS:
            raise ValueError(f"method {name!r}: use one of {', '.join(METHODS)}")
        settings = [cls(name, widths) for widths in METHODS[name].bit_widths]
        chosen = [setting for setting in settings if not bits or setting.bits_name == bits]
        if not chosen:
            known = ", ".join(setting.bits_name for setting in settings)
            raise ValueError(f"method {text!r}: {name} is defined at bits {known}")
        return chosen

    @property
    def bits_name(self) -> str:
        return f"{self.bits[0]}/{self.bits[1]}"

    def __str__(self) -> str:
        return f"{self.method}:{self.bits_name}"

    def maker(self, branches: int, max_new: int) -> MakeCache:
        """Makes the cache of one layer for ``branches`` continuations of ``max_new`` tokens."""
        method = METHODS[self.method]

        def make(prompt: LayerPrompt) -> LayerCache:
            return method(prompt, branches, max_new, self.bits)

        return make


SETTINGS = [setting for name in METHODS for setting in Setting.parse(name)]
EXACT = Setting("bf16", (16, 16))
