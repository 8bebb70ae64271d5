"""A small pool, and a stand-in for SGLang's scheduler that drives the real tree, allocators and
requests without a model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import (
    checkpoint_kv_cache,
    evict_from_tree_cache,
    release_kv_cache,
)
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams

from patternkv_sgl.batch import Batch, DecodeBatch, DecodePlanner, ExtendBatch, read_batch
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.pool import PatternKVPool, PoolGeometry
from patternkv_sgl.radix import PatternRadixCache
from patternkv_sgl.requests import Extend
from patternkv_sgl.stats import Stats
from patternkv_sgl.tables import TableRefs


def make_pool(
    config: PatternKVConfig,
    *,
    size: int = 256,
    page_size: int = 1,
    num_tables: int = 8,
    num_windows: int = 9,
    num_layers: int = 1,
    h_kv: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> PatternKVPool:
    """A real pool."""
    return PatternKVPool(
        size,
        geometry=PoolGeometry(config, num_layers, h_kv, head_dim, dtype),
        num_tables=num_tables,
        num_windows=num_windows,
        page_size=page_size,
        dtype=dtype,
        head_num=h_kv,
        head_dim=head_dim,
        layer_num=num_layers,
        device=device,
        enable_memory_saver=False,
    )


def make_allocator(pool: PatternKVPool) -> TokenToKVPoolAllocator | PagedTokenToKVPoolAllocator:
    if pool.page_size == 1:
        return TokenToKVPoolAllocator(pool.size, pool.dtype, "cpu", pool, need_sort=False)
    allocator = PagedTokenToKVPoolAllocator(
        pool.size, pool.page_size, pool.dtype, "cpu", pool, need_sort=False
    )
    allocator.use_triton_kernels = False  # chosen by SGLang for the machine, not for our tensors
    return allocator


class Scheduler:
    """Admits, extends, decodes, checkpoints and releases requests as SGLang's scheduler does.

    The caller publishes SGLang's runtime context.
    """

    def __init__(
        self,
        config: PatternKVConfig,
        *,
        size: int = 256,
        page_size: int = 1,
        num_tables: int = 8,
        num_rows: int = 8,
        disable: bool = False,
        **shape: Any,
    ) -> None:
        self.pool = make_pool(
            config,
            size=size,
            page_size=page_size,
            num_tables=num_tables,
            num_windows=num_rows + 1,
            **shape,
        )
        self.slot_table = self.pool.slot_table
        self.rows = ReqToTokenPool(num_rows, 512, "cpu", enable_memory_saver=False)
        self.allocator = make_allocator(self.pool)
        self.refs, self.stats = TableRefs(num_tables), Stats()
        params = CacheInitParams(
            disable=disable,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
        )
        self.tree = PatternRadixCache(params, config, self.refs, self.stats)
        self.planner = DecodePlanner(self.tree)
        self.running: list[Req] = []
        self._rids = 0

    def row(self, req: Req) -> torch.Tensor:
        """int64 [kv_allocated_len]: the slots of ``req``'s tokens."""
        return self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].long()

    def admit(self, tokens: Sequence[int], extra_key: str | None = None) -> Req:
        """A new request, matched against the tree and locked. Branches share an array of tokens."""
        self._rids += 1
        params = SamplingParams(max_new_tokens=64)
        prompt = tokens if isinstance(tokens, array) else array("q", tokens)
        return self.readmit(Req(f"request {self._rids}", "", prompt, params, extra_key=extra_key))

    def readmit(self, req: Req) -> Req:
        req.init_next_round_input(self.tree)
        req.lock = self.tree.lock(req.last_node)
        self.running.append(req)
        return req

    def extend(
        self,
        reqs: Sequence[Req],
        lengths: Sequence[int] | None = None,
        *,
        as_decode: bool = False,
    ) -> list[Extend]:
        """Store each request's next ``lengths`` tokens (default: all) in one batch, which becomes a
        decode step if it may and ``as_decode``.

        Returns an empty list, with nothing changed, when slots or request rows run out.
        """
        for i, req in enumerate(reqs):
            left = len(req.full_untruncated_fill_ids) - req.prefix_len
            req.extend_end = req.prefix_len + (left if lengths is None else min(left, lengths[i]))
        prefixes = [
            self.row(req)[: req.prefix_len]
            if req.kv.holds_kv
            else self.tree.prefix_device_indices(req)
            for req in reqs
        ]
        if sum(not req.kv.holds_kv for req in reqs) > self.rows.available_size():
            return []
        prefix_lens, extend_lens = [len(p) for p in prefixes], [req.extend_len for req in reqs]
        new_slots = self._allocate(prefixes, extend_lens)
        if new_slots is None:
            return []
        self.rows.alloc(reqs)
        slots = new_slots.split(extend_lens)
        for req, prefix, new in zip(reqs, prefixes, slots, strict=True):
            row = torch.cat([prefix, new])
            self.rows.write((req.kv.req_pool_idx, slice(0, len(row))), row.int())
            req.kv.kv_allocated_len = req.kv.kv_committed_len = len(row)
        stated = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            reqs=reqs,
            prefix_lens=prefix_lens,
            extend_lens=extend_lens,
            seq_lens_cpu=torch.tensor([req.kv.kv_allocated_len for req in reqs]),
        )
        batch = read_batch(self.tree, self.planner, stated, 64, as_decode=as_decode)
        assert batch is not None
        self.forward(batch, reqs, new_slots)
        if isinstance(batch, ExtendBatch):
            return batch.extends
        steps = zip(prefix_lens, batch.tables.tolist(), strict=True)
        return [Extend(prefix_len, 1, table, mine=False) for prefix_len, table in steps]

    def decode(self, reqs: Sequence[Req], tokens: Sequence[int]) -> DecodeBatch | None:
        """Store one sampled token of each request; None when slots run out."""
        new_slots = self._allocate([self.row(req) for req in reqs], [1] * len(reqs))
        if new_slots is None:
            return None
        for req, token, slot in zip(reqs, tokens, new_slots, strict=True):
            req.output_ids.append(token)
            self.rows.write((req.kv.req_pool_idx, req.kv.kv_allocated_len), slot.int())
            req.kv.kv_allocated_len += 1
            req.kv.kv_committed_len += 1
        batch = self.planner.plan(reqs, np.array([req.kv.kv_allocated_len for req in reqs]))
        self.forward(batch, reqs, new_slots)
        return batch

    def forward(self, batch: Batch, reqs: Sequence[Req], slots: torch.Tensor) -> None:
        """Store the new tokens of ``reqs`` in ``slots``; here only which table each one has."""
        if isinstance(batch, ExtendBatch):
            tables = [extend.table for extend in batch.extends for _ in range(extend.num_tokens)]
        else:
            tables = batch.tables.tolist()
        self.slot_table[slots] = torch.tensor(tables, dtype=torch.int32)

    def _allocate(self, rows: list[torch.Tensor], lengths: list[int]) -> torch.Tensor | None:
        """Slots for ``lengths`` tokens after each of ``rows``, evicting from the tree if needed."""
        page_size, total = self.pool.page_size, sum(lengths)
        evict_from_tree_cache(self.tree, total + len(rows) * page_size * (page_size > 1))
        if page_size == 1:
            return self.allocator.alloc(total)
        before = torch.tensor([len(row) for row in rows])
        after = before + torch.tensor(lengths)
        last = torch.tensor([int(row[-1]) if len(row) else -1 for row in rows])
        return self.allocator.alloc_extend(before, before, after, after, last, total)

    def checkpoint(self, req: Req) -> None:
        """What follows the forward of an extend: its tokens enter the tree."""
        checkpoint_kv_cache(req, self.tree)

    def prefill(self, *prompts: Sequence[int]) -> list[Req]:
        """Admit, extend in one batch and checkpoint, one request for each of ``prompts``."""
        reqs = [self.admit(prompt) for prompt in prompts]
        assert self.extend(reqs)
        for req in reqs:
            self.checkpoint(req)
        return reqs

    def finish(self, req: Req) -> None:
        self.running.remove(req)
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        release_kv_cache(req, self.tree, checkpoint=True)

    def retract(self, req: Req) -> None:
        self.running.remove(req)
        release_kv_cache(req, self.tree, checkpoint=False)
        req.reset_for_retract()

    def drop_waiting(self, req: Req) -> None:
        """Give up an admitted request that never got slots."""
        assert not req.kv.holds_kv
        self.running.remove(req)
        self.tree.unlock(req.lock)

    def evict(self, num_tokens: int) -> int:
        return self.tree.evict(EvictParams(num_tokens=num_tokens)).num_tokens_evicted

    def flush(self) -> None:
        assert not self.running
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()
