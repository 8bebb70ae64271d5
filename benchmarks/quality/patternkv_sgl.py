"""This package's cache: its own mining, store and dequantization, its defaults and its window."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from benchmarks.quality.cache import EXACT_BITS, LayerCache, LayerPrompt
from benchmarks.quality.flatness import Flatness
from patternkv_kernels import LayerTables, SlotFormat, dequantize, mine_kv, store_kv
from patternkv_kernels.format import read_slots
from patternkv_sgl.config import PatternKVConfig, default_patterns

_TABLE_ID_BITS = 32  # per token, for all layers and heads together


class PatternKVSgl(LayerCache):
    """What a server does for a request whose prompt is prefilled whole: a table is mined from the
    prompt, every token is stored with it, and the latest generated tokens are read exactly."""

    name = "patternkv_sgl"
    bit_widths: ClassVar[tuple[tuple[int, int], ...]] = ((4, 4), (4, 2), (2, 2))
    options: ClassVar[dict[str, Any]] = {}
    """Of ``PatternKVConfig``, where they are not the defaults."""

    def _open(self, prompt: LayerPrompt) -> None:
        k_bits, v_bits = self.bits
        options = {"patterns": default_patterns(k_bits)} | self.options
        self.config = PatternKVConfig(k_bits, v_bits, **options)
        device = prompt.k.device
        self._format = SlotFormat(k_bits, v_bits, self.d, h_kv=self.h)
        # One table of each prompt, and a last one that stays the zero table.
        self._tables = LayerTables.allocate(
            self.p + 1, self.h, self.config.patterns, self.d, device
        )
        self._mined = self.prompt_len >= self.config.mine_tokens
        for i in range(self.p if self._mined else 0):
            q, k, v = (x[i].transpose(0, 1) for x in (prompt.q, prompt.k, prompt.v))
            mined = mine_kv(
                q,
                k,
                v,
                num_patterns=self.config.patterns,
                num_sinks=self.config.sinks,
                bits=self.bits,
            )
            self._tables.write(i, *mined)
        k, v = (x.permute(0, 2, 1, 3) for x in (prompt.k, prompt.v))
        k, v = (x.permute(0, 2, 1, 3) for x in self._stored(k, v))
        self._hold(k, v, self.prompt_len)

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super()._append(k, v)
        leaving = self.held - 1 - self.config.window
        if leaving >= 0:
            pair = self._stored(self.own_k[..., leaving, :], self.own_v[..., leaving, :])
            self.own_k[..., leaving, :], self.own_v[..., leaving, :] = pair

    def _stored(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``k``, ``v`` ``[p, tokens, h_kv, d]`` through the packed slots of their prompt's
        table."""
        tokens = self.p * k.shape[1]
        owner = torch.arange(self.p, dtype=torch.int32, device=k.device)
        table_ids = owner.repeat_interleave(k.shape[1])
        if not self._mined:
            table_ids = torch.full_like(table_ids, self.p)
        buffer = self._format.allocate(tokens, k.device)
        slots = torch.arange(tokens, device=k.device)
        flat_k, flat_v = (x.reshape(tokens, self.h, self.d) for x in (k, v))
        store_kv(self._format, buffer, slots, flat_k, flat_v, self._tables, table_ids)
        stored = dequantize(self._format, buffer, slots, self._tables, table_ids)
        if self.flatness is None:  # the prompt comes first
            rows = read_slots(self._format, buffer, slots.unsqueeze(1)).squeeze(2)
            self.flatness = self._flatness(k, v, rows, table_ids)
        return stored[0].float().view(k.shape), stored[1].float().view(v.shape)

    def _flatness(
        self, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, table_ids: torch.Tensor
    ) -> Flatness:
        """Of ``k``, ``v`` ``[p, tokens, h_kv, d]`` whose packed rows are ``[n, h_kv, bytes]``."""
        ids = rows[..., self._format.code_bytes :][..., :2].long()
        head = torch.arange(self.h, device=k.device)
        residuals = [
            x - self._tables.patterns[table_ids.long()[:, None], i, head, ids[..., i]].view(x.shape)
            for i, x in enumerate((k.float(), v.float()))
        ]
        return Flatness.of(k.float(), residuals[0], v.float(), residuals[1])

    def stored_bits(self) -> float:
        """A window is in use as far as generated tokens fill it; their slots exist as well."""
        window = min(self.config.window, self.held)
        slots = 8 * self._format.bytes_per_token / self.h * self.length
        # Patterns, channel scales and channel weights of K and V, float16.
        table = 2 * 16 * self.d * (self.config.patterns + 2) if self._mined else 0
        ids = _TABLE_ID_BITS * self.length / (self.num_layers * self.h)
        return slots + ids + table + 2 * EXACT_BITS * self.d * window


class PatternKVSgl64(PatternKVSgl):
    """2/2 bits with the number of patterns that the other bits have by default."""

    name = "patternkv_sgl_p64"
    bit_widths = ((2, 2),)
    options: ClassVar[dict[str, Any]] = {"patterns": 64}


class PatternKVSglWide(PatternKVSgl):
    """2/2 bits with as long a window as the published methods have."""

    name = "patternkv_sgl_w128"
    bit_widths = ((2, 2),)
    options: ClassVar[dict[str, Any]] = {"window": 128}
