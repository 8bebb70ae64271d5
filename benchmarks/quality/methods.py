"""Every method of the bench, by name."""

from __future__ import annotations

import re
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
from benchmarks.quality.patternkv_sgl import PatternKVSgl

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
    )
}


@dataclass(frozen=True)
class Setting:
    """A method at one bit width, written ``kivi_g32:4/2`` or ``patternkv_sgl[window=64]:2/2``.

    ``method`` has its options, if any, in brackets.
    """

    method: str
    bits: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> list[Setting]:
        """The settings that ``NAME`` (all its bit widths) or ``NAME:K/V`` names, either with
        ``[OPTION=INTEGER,…]`` behind NAME.

        Raises:
            ValueError: an unknown method or option, or bits it has no definition at.
        """
        method, _, bits = text.partition(":")
        name, options = split_method(method)
        if name not in METHODS:
            raise ValueError(f"method {name!r}: use one of {', '.join(METHODS)}")
        known_options = METHODS[name].known_options
        for option in options.keys() - known_options:
            known = ", ".join(sorted(known_options)) or "no options"
            raise ValueError(f"method {method!r}: {name} has {known}, not {option!r}")
        settings = [cls(method, widths) for widths in METHODS[name].bit_widths]
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
        name, options = split_method(self.method)
        method = METHODS[name]

        def make(prompt: LayerPrompt) -> LayerCache:
            return method(prompt, branches, max_new, self.bits, options)

        return make


def split_method(method: str) -> tuple[str, dict[str, int]]:
    """Name and options of ``NAME`` or ``NAME[OPTION=INTEGER,…]``.

    Raises:
        ValueError: it is written otherwise.
    """
    found = re.fullmatch(r"(\w+)(?:\[((?:\w+=\d+,)*\w+=\d+)\])?", method)
    if found is None:
        raise ValueError(f"method {method!r}: write NAME or NAME[OPTION=INTEGER,OPTION=INTEGER]")
    pairs = (pair.split("=") for pair in (found[2] or "").split(",") if pair)
    return found[1], {key: int(value) for key, value in pairs}


SETTINGS = [setting for name in METHODS for setting in Setting.parse(name)]
EXACT = Setting("bf16", (16, 16))
