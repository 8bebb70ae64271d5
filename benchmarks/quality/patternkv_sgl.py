"""This package's cache: its own mining, store and dequantization, its defaults and its window."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from benchmarks.quality.cache import EXACT_BITS, LayerCache, LayerPrompt
from benchmarks.quality.flatness import Flatness
from patternkv_kernels import LayerTables, SlotFormat, dequantize, mine_kv, store_kv
from patternkv_kernels.format import read_slots
from patternkv_sgl.basis import KBasis
from patternkv_sgl.config import PatternKVConfig

_TABLE_ID_BITS = 32  # per token, for all layers and heads together
_CONFIGURED = frozenset({"patterns", "window", "sinks", "mine_tokens", "rotate"})
_MINED_ELEMENTS = 2**25
"""Distances of tokens to patterns that are in memory at a time while prompts are mined."""


class PatternKVSgl(LayerCache):
    """What a server does for a request whose prompt is prefilled whole: a table is mined from the
    prompt, every token is stored with it, and the latest generated tokens are read exactly.

    Options are those of ``PatternKVConfig`` (``rotate`` 0 or 1), how many of the last layers have K
    at 4 bits (``protect``, for its ``layer_bits``), and three ideas that a server does not have:
    ``tokens_per_pattern`` lets tables grow with their prompts, up to ``patterns``;
    ``balance=0`` rotates without balancing; ``generated=N`` adds one pattern for every N generated
    tokens, their mean, before the first of them leaves the window.

    Raises:
        ValueError: ``generated`` exceeds the window, so the mean would not be known in time.
    """

    name = "patternkv_sgl"
    bit_widths: ClassVar[tuple[tuple[int, int], ...]] = ((4, 4), (4, 2), (2, 2))
    known_options = _CONFIGURED | {"protect", "tokens_per_pattern", "balance", "generated"}

    def _open(self, prompt: LayerPrompt) -> None:
        chosen: dict[str, Any] = {k: v for k, v in self.options.items() if k in _CONFIGURED}
        if (protect := self.options.get("protect")) is not None:
            chosen["layer_bits"] = tuple((-i, (4, self.bits[1])) for i in range(1, protect + 1))
        self.config = PatternKVConfig(*self.bits, **chosen)
        formats = self.config.slot_formats(self.num_layers, self.h, self.d, page_size=1)
        self._format: SlotFormat = formats[self.layer]
        self._dtype = prompt.k.dtype
        self._basis: KBasis | None = None
        if self.config.rotates(self._format.k_bits):
            balance = prompt.balance if self.options.get("balance", 1) else None
            if balance is None:
                balance = torch.ones(self.h, self.d)
            h_q, device = prompt.q.shape[1], prompt.k.device
            self._basis = KBasis(h_q, balance.to(device), dtype=self._dtype, device=device)
        self._generated = self.options.get("generated", 0)
        if self._generated > self.config.window:
            raise ValueError(
                f"generated={self._generated}: at most the window, {self.config.window} tokens"
            )
        self._patterns = self.config.patterns
        if per_pattern := self.options.get("tokens_per_pattern"):
            wanted = max(self.config.sinks, self.prompt_len // per_pattern, 1)
            self._patterns = min(wanted, self._patterns)
        self._mined = self.prompt_len >= self.config.mine_tokens
        q, k, v = (x.permute(0, 2, 1, 3) for x in (prompt.q, prompt.k, prompt.v))
        self._tables = self._mine(
            q if self._basis is None else self._basis.q(q), self._turned(k), v
        )
        of_prompts = torch.arange(self.p, device=k.device) * self._tables_per_prompt
        k, v = self._stored(k, v, of_prompts.repeat_interleave(self.prompt_len))
        self._hold(k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3), self.prompt_len)
        # Rows are (prompt, branch).
        self._table_ids = torch.arange(self.p * self.n, device=k.device)
        if not self._generated:
            self._table_ids //= self.n

    @property
    def _tables_per_prompt(self) -> int:
        """Branches that add patterns of their own need copies."""
        return self.n if self._generated else 1

    def _mine(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> LayerTables:
        """Tables of ``q``, ``k``, ``v`` ``[p, tokens, heads, d]``.

        Heads are mined independently, so the heads of many prompts are mined together. Short
        prompts all have the first one's, as the first prompt's table is the root's on a server.
        """
        count, added = self._tables_per_prompt, 0
        if self._generated:
            added = self._max_new // self._generated
        tables = LayerTables.allocate(
            self.p * count, self.h, self._patterns + added, self.d, k.device
        )
        mined = self.p if self._mined else 1
        together = max(1, _MINED_ELEMENTS // (2 * self.h * self.prompt_len * self._patterns))
        for first in range(0, mined, together):
            prompts = range(first, min(first + together, mined))
            k_table, v_table = mine_kv(
                *(x[first : prompts.stop].transpose(0, 1).flatten(1, 2) for x in (q, k, v)),
                num_patterns=self._patterns,
                num_sinks=self.config.sinks,
            )
            for i in prompts:
                heads = slice((i - first) * self.h, (i - first + 1) * self.h)
                k_own, v_own = (
                    table._replace(
                        patterns=table.patterns[heads],
                        channel_scale=table.channel_scale[heads],
                        channel_weight=None
                        if table.channel_weight is None
                        else table.channel_weight[heads],
                    )
                    for table in (k_table, v_table)
                )
                owners = range(i * count, (i + 1) * count) if self._mined else range(self.p * count)
                for table_id in owners:
                    tables.write(table_id, k_own, v_own)
        return tables

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super()._append(k, v)
        leaving = self.held - 1 - self.config.window
        if leaving < 0:
            return
        if self._generated and leaving % self._generated == 0:
            self._add_pattern(leaving // self._generated)
        pair = self._stored(
            self.own_k[..., leaving, :], self.own_v[..., leaving, :], self._table_ids
        )
        self.own_k[..., leaving, :], self.own_v[..., leaving, :] = pair

    def _add_pattern(self, block: int) -> None:
        """The mean of a block of generated tokens, all still exact, as a pattern of its branch."""
        at = self._patterns + block
        if at >= self._tables.num_patterns:
            return  # the block is cut off by the length limit
        tokens = slice(block * self._generated, (block + 1) * self._generated)
        k, v = (own[..., tokens, :].mean(-2) for own in (self.own_k, self.own_v))
        for i, mean in enumerate((self._turned(k), v)):
            self._tables.patterns[:, i, :, at] = mean.flatten(0, 1).half()

    def _turned(self, k: torch.Tensor) -> torch.Tensor:
        """``k [..., h_kv, d]`` as a server would store it."""
        return k if self._basis is None else self._basis.k(k.to(self._dtype))

    def _stored(
        self, k: torch.Tensor, v: torch.Tensor, table_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``k``, ``v`` ``[..., h_kv, d]`` through packed slots, float32; ``table_ids [tokens]``."""
        tokens = len(table_ids)
        buffer = self._format.allocate(tokens, k.device)
        slots = torch.arange(tokens, device=k.device)
        flat_k, flat_v = (
            x.reshape(tokens, self.h, self.d).to(self._dtype) for x in (self._turned(k), v)
        )
        store_kv(self._format, buffer, slots, flat_k, flat_v, self._tables, table_ids)
        new_k, new_v = dequantize(self._format, buffer, slots, self._tables, table_ids)
        if self.flatness is None:  # the prompt comes first
            rows = read_slots(self._format, buffer, slots.unsqueeze(1)).squeeze(2)
            self.flatness = self._flatness(flat_k.float(), flat_v.float(), rows, table_ids)
        new_k = new_k.float() if self._basis is None else self._basis.k_back(new_k.float())
        return new_k.view(k.shape), new_v.float().view(v.shape)

    def _flatness(
        self, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, table_ids: torch.Tensor
    ) -> Flatness:
        """Of ``k``, ``v`` ``[tokens, h_kv, d]`` whose packed rows are ``[tokens, h_kv, bytes]``."""
        ids = rows[..., self._format.code_bytes :][..., :2].long()
        head = torch.arange(self.h, device=k.device)
        residuals = [
            x - self._tables.patterns[table_ids[:, None], i, head, ids[..., i]]
            for i, x in enumerate((k, v))
        ]
        return Flatness.of(k, residuals[0], v, residuals[1])

    def stored_bits(self) -> float:
        """A window is in use as far as generated tokens fill it; their slots exist as well. The
        table of short prompts is everyone's and not counted."""
        window = min(self.config.window, self.held)
        slots = 8 * self._format.bytes_per_token / self.h * self.length
        patterns = self._patterns
        if self._generated:
            patterns += -(-max(0, self.held - self.config.window) // self._generated)
        # Patterns, channel scales and channel weights of K and V, float16.
        table = 2 * 16 * self.d * (patterns + 2) if self._mined else 0
        ids = _TABLE_ID_BITS * self.length / (self.num_layers * self.h)
        return slots + ids + table + 2 * EXACT_BITS * self.d * window
