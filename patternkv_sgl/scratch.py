"""Device memory of the attention backend besides the pool, allocated once at start-up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from patternkv_kernels import (
    DecodeShape,
    DecodeWorkspace,
    RaggedWorkspace,
    SlotFormat,
    decode_unavailable,
    plans_are_alike,
    ragged_workspace,
)

ENTRIES_PER_ROW = 8
"""Segments that a row of a decode batch may read on average: the tables and branching points along
its sequence. A batch with more runs without a CUDA graph, in memory of its own."""
PREFIX_TOKENS = 32768
"""Tokens of dequantized prefix that prefill attention reads at a time."""
RAGGED_PLANS = 4
"""New tokens, and pieces of prefix of a batch; more are added when first needed."""


@dataclass(frozen=True)
class ScratchShape:
    """What the backend's memory is made for.

    Attributes:
        formats: of the layers, each once, with this rank's KV heads. Batches are planned for the
            first.
        num_patterns: patterns per table.
        h_q: query heads of this rank.
        max_rows: most requests in a decode batch.
        context_len: most tokens of a request.
        dtype: model dtype.
    """

    formats: tuple[SlotFormat, ...]
    num_patterns: int
    h_q: int
    max_rows: int
    context_len: int
    dtype: torch.dtype

    @property
    def max_entries(self) -> int:
        return ENTRIES_PER_ROW * self.max_rows

    @property
    def decode(self) -> DecodeShape:
        return DecodeShape(
            self.formats[0],
            self.num_patterns,
            self.h_q,
            self.max_rows,
            self.max_entries,
            self.max_rows * self.context_len,
        )

    @property
    def prefix(self) -> tuple[int, int, int]:
        """Shape of K and of V of the dequantized prefix."""
        fmt = self.formats[0]
        return min(PREFIX_TOKENS, self.context_len), fmt.h_kv, fmt.head_dim

    def decode_missing(self, device: torch.device) -> str | None:
        """Why decode runs torch operators on ``device``, or None.

        Raises:
            ValueError: some layers' kernels cannot follow what is planned for the others'.
        """
        first, *others = self.formats
        for fmt in self.formats:
            reason = decode_unavailable(replace(self.decode, fmt=fmt), device)
            if reason is not None:
                return reason
        for fmt in others:
            if not plans_are_alike(self.decode, fmt, device):
                raise ValueError(
                    f"--kv-quant-layer-bits: with {self.num_patterns} patterns, layers of "
                    f"{fmt.k_bits}:{fmt.v_bits} bits need other kernels than those of "
                    f"{first.k_bits}:{first.v_bits}: lower --kv-quant-patterns to 128, or use "
                    "--kv-quant-layer-bits none"
                )
        return None

    def nbytes(self, device: torch.device) -> int:
        """Bytes that :class:`Scratch` takes on ``device``; 0 on a CPU, where torch allocates."""
        if device.type != "cuda":
            return 0
        tokens, h_kv, d = self.prefix
        nbytes = 2 * tokens * h_kv * d * self.dtype.itemsize
        if self.decode_missing(device) is None:
            nbytes += DecodeWorkspace.nbytes(self.decode, device)
        return nbytes + RaggedWorkspace.nbytes(RAGGED_PLANS)


class Scratch:
    """The memory itself; on a CPU there is none and torch allocates as it goes.

    Attributes:
        decode: None where decode runs torch operators, for the reason in ``decode_missing``.
        ragged: None where prefill attention does.
    """

    def __init__(self, shape: ScratchShape, device: torch.device) -> None:
        self.shape = shape
        self._device = device
        self.ragged: RaggedWorkspace | None = ragged_workspace(device, RAGGED_PLANS)
        self.decode_missing = shape.decode_missing(device)
        self.decode: DecodeWorkspace | None = None
        if self.decode_missing is None:
            self.decode = DecodeWorkspace.allocate(shape.decode, device)
        self._prefix: list[torch.Tensor] = []
        if device.type == "cuda":
            make = partial(torch.empty, shape.prefix, dtype=shape.dtype, device=device)
            self._prefix = [make(), make()]

    def prefix_memory(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Memory for K and V of ``num_tokens`` dequantized tokens, the same at every call."""
        if not self._prefix:
            return None
        k, v = self._prefix
        return k[:num_tokens], v[:num_tokens]

    def larger_decode(self, num_rows: int, num_entries: int) -> DecodeWorkspace | None:
        """Memory of its own for a batch that ``decode`` has no room for."""
        if self.decode is None:
            return None
        max_tokens = num_rows * self.shape.context_len
        shape = replace(
            self.shape.decode, max_rows=num_rows, max_entries=num_entries, max_tokens=max_tokens
        )
        return DecodeWorkspace.allocate(shape, self._device)
