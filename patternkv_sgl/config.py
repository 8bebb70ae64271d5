"""What the user chose, checked once: bits, patterns, window, sinks, mining threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patternkv_kernels import SlotFormat

BITS = (2, 4)


def parse_bits(text: str) -> tuple[int, int]:
    """Bits of K and V from ``"4"``, ``"2"`` or ``"K:V"`` such as ``"4:2"``.

    Raises:
        ValueError: ``text`` is malformed or names a bit width outside {2, 4}.
    """
    parts = str(text).split(":")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or any(part not in map(str, BITS) for part in parts):
        raise ValueError(
            f"--kv-quant-bits {text!r}: expected 4, 2 or K:V with each of K and V in {{2, 4}}, "
            "for example 4:2 (quoted in YAML, which reads a bare 4:2 as a number)"
        )
    return int(parts[0]), int(parts[1])


def default_rotate(k_bits: int) -> bool:
    """Whether K is rotated where the user does not say: at 4 bits there is nothing to gain."""
    return k_bits == 2


@dataclass(frozen=True)
class PatternKVConfig:
    """Options of the PatternKV cache; every field is one ``--kv-quant-*`` flag.

    Attributes:
        k_bits, v_bits: residual bits of K and V, 2 or 4.
        patterns: patterns per table, KV head and layer, for K and for V each.
        window: latest tokens of a running request kept in the model dtype: generated ones, and
            those that end a prompt whose table was mined from other tokens.
        sinks: first tokens of a sequence that become patterns of their own (stored exactly).
        mine_tokens: a prefill of at least this many new tokens gets its own table.
        rotate: K is stored in a balanced, rotated basis (``basis.py``).
        tables: table slots; None derives them from the memory budget.
        check: verify the conservation laws and the per-slot table ids while serving.

    Raises:
        ValueError: a value outside its range; the message names value, range and flag.
    """

    k_bits: int = 4
    v_bits: int = 4
    patterns: int = 64
    window: int = 32
    sinks: int = 4
    mine_tokens: int = 256
    rotate: bool = False
    tables: int | None = None
    check: bool = False

    RANGES: ClassVar[dict[str, tuple[int, int]]] = {
        "patterns": (1, 256),
        "window": (0, 1024),
        "sinks": (0, 64),
        "mine_tokens": (16, 1 << 20),
        "tables": (2, 1 << 15),
    }

    def __post_init__(self) -> None:
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if value is None and name == "tables":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                flag = "--kv-quant-" + name.replace("_", "-")
                raise ValueError(f"{flag} {value!r}: expected an integer from {low} to {high}")
        if self.sinks > self.patterns:
            raise ValueError(
                f"--kv-quant-sinks {self.sinks} does not fit into --kv-quant-patterns "
                f"{self.patterns}: each sink takes one pattern; lower the first or raise the second"
            )

    @property
    def bits(self) -> str:
        """``"K/V"`` bits, as printed in tables and stats."""
        return f"{self.k_bits}/{self.v_bits}"

    def slot_format(self, h_kv: int, head_dim: int, page_size: int) -> SlotFormat:
        """The slot format of ``h_kv`` KV heads of ``head_dim`` in pages of ``page_size`` slots."""
        return SlotFormat(self.k_bits, self.v_bits, head_dim, page_size, h_kv=h_kv)
