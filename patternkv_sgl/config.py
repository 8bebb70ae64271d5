"""What the user chose, checked once: bits, patterns, window, sinks, mining threshold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from patternkv_kernels import SlotFormat

BITS = (2, 4)
Bits = tuple[int, int]
LayerBits = tuple[tuple[int, Bits], ...]
"""Layers, -1 for the last, and the bits of their K and V."""


def parse_bits(text: str) -> Bits:
    """Bits of K and V from ``"4"``, ``"2"`` or ``"K:V"`` such as ``"4:2"``.

    Raises:
        ValueError: ``text`` is malformed or names a bit width outside {2, 4}.
    """
    bits = _bits(str(text))
    if bits is None:
        raise ValueError(
            f"--kv-quant-bits {text!r}: expected 4, 2 or K:V with each of K and V in {{2, 4}}, "
            "for example 4:2 (quoted in YAML, which reads a bare 4:2 as a number)"
        )
    return bits


def _bits(text: str) -> Bits | None:
    """`parse_bits`, None where it raises."""
    parts = text.split(":")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or any(part not in map(str, BITS) for part in parts):
        return None
    return int(parts[0]), int(parts[1])


def parse_layer_bits(text: str) -> LayerBits:
    """Layers with bits of their own from ``"LAYER=K:V,…"`` such as ``"0=4:4,last=4:2"``, or
    ``"none"``.

    Raises:
        ValueError: ``text`` is malformed or names a bit width outside {2, 4}.
    """
    if text == "none":
        return ()
    chosen = []
    for part in str(text).split(","):
        match = re.fullmatch(r"(\d+|last)=(.+)", part, re.ASCII)
        bits = match and _bits(match[2])
        if match is None or bits is None:
            raise ValueError(
                f"--kv-quant-layer-bits {text!r}: expected LAYER=K:V, found {part!r}: a number or "
                "'last' for LAYER, each of K and V in {2, 4}, several entries with commas between, "
                "for example 0=4:4,last=4:2; or none"
            )
        layer = -1 if match[1] == "last" else int(match[1])
        chosen.append((layer, bits))
    return tuple(chosen)


def _as_typed(layer: int, bits: Bits) -> str:
    return f"{'last' if layer == -1 else layer}={bits[0]}:{bits[1]}"


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
        rotate: K is stored in a balanced, rotated basis (``basis.py``); None is where K has 2 bits:
            at 4 there is nothing to gain.
        layer_bits: layers whose bits are others; None is K of the last layer at 4 bits if it has 2
            elsewhere. It is what a 2-bit cache loses answers by (docs/quality.md).
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
    rotate: bool | None = None
    layer_bits: LayerBits | None = None
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
        others = (bits for _, bits in self.layer_bits or ())
        for k_bits, v_bits in ((self.k_bits, self.v_bits), *others):
            if k_bits not in BITS or v_bits not in BITS:
                raise ValueError(
                    f"bits {k_bits!r} of K and {v_bits!r} of V in --kv-quant-bits or "
                    f"--kv-quant-layer-bits: choose of {BITS} for each"
                )
        if self.rotate not in (None, True, False):
            raise ValueError(f"--kv-quant-rotate {self.rotate!r}: expected True, False or None")
        if self.sinks > self.patterns:
            raise ValueError(
                f"--kv-quant-sinks {self.sinks} does not fit into --kv-quant-patterns "
                f"{self.patterns}: each sink takes one pattern; lower the first or raise the second"
            )

    @property
    def bits(self) -> str:
        """``"K/V"`` bits, as printed in tables and stats."""
        return f"{self.k_bits}/{self.v_bits}"

    def rotates(self, k_bits: int) -> bool:
        """Whether K is rotated in layers that store it with ``k_bits``."""
        return k_bits == 2 if self.rotate is None else self.rotate

    def exceptions(self, num_layers: int) -> dict[int, Bits]:
        """Bits of K and V of the layers that have not `k_bits` and `v_bits`.

        Raises:
            ValueError: the model has no such layer, or two entries are of one.
        """
        chosen = self.layer_bits
        if chosen is None:
            chosen = ((-1, (4, self.v_bits)),) if self.k_bits == 2 else ()
        entries: dict[int, tuple[int, Bits]] = {}
        for layer, bits in chosen:
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"--kv-quant-layer-bits: no layer {layer}, the model has 0 to {num_layers - 1}"
                )
            index = layer % num_layers
            if index in entries:
                raise ValueError(
                    f"--kv-quant-layer-bits names layer {index} of {num_layers} twice, by "
                    f"{_as_typed(*entries[index])} and {_as_typed(layer, bits)}: keep one of them"
                )
            entries[index] = layer, bits
        own = self.k_bits, self.v_bits
        return {index: bits for index, (_, bits) in sorted(entries.items()) if bits != own}

    def slot_formats(
        self, num_layers: int, h_kv: int, head_dim: int, page_size: int
    ) -> list[SlotFormat]:
        """The slot format of every layer: ``h_kv`` KV heads of ``head_dim`` in pages of
        ``page_size`` slots."""
        bits = [(self.k_bits, self.v_bits)] * num_layers
        for layer, own in self.exceptions(num_layers).items():
            bits[layer] = own
        return [SlotFormat(*own, head_dim, page_size, h_kv=h_kv) for own in bits]
