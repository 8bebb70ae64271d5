"""A cache variant: one way of storing KV that a run compares with others."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A dtype of SGLang's own cache, or PatternKV residual bits ``K/V``.

    Attributes:
        name: as written in tables and files, ``"bf16"``, ``"fp8"``, ``"4/4"``, ``"4/2"`` …
        bits: residual bits of K and of V; None is SGLang's own cache.
    """

    name: str
    bits: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant called ``text``.

        Raises:
            ValueError: neither a dtype nor two bit widths with a slash between them.
        """
        if text in ("bf16", "fp8"):
            return cls(text)
        match = re.fullmatch(r"(\d)/(\d)", text)
        if match is None:
            raise ValueError(f"variant {text!r}: expected bf16, fp8 or K/V bits such as 4/4, 4/2")
        return cls(text, (int(match[1]), int(match[2])))

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.]+", "-", self.name)

    @property
    def engine_args(self) -> dict[str, str]:
        """What ``sglang.Engine`` needs to store KV this way."""
        if self.bits is None:
            return {"kv_cache_dtype": "fp8_e4m3"} if self.name == "fp8" else {}
        return {"kv_quant": "patternkv", "kv_quant_bits": f"{self.bits[0]}:{self.bits[1]}"}
