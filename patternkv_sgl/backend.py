"""Attention over the packed cache: plans a batch once, then runs each layer.

CPU and CUDA tensors take the same path through ``patternkv_kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from patternkv_kernels import (
    DecodePlan,
    Window,
    dequantize,
    extend_attention,
    mine_kv,
    store_kv,
    tree_decode,
)
from patternkv_sgl.batch import CurrentBatch, DecodeBatch, ExtendBatch
from patternkv_sgl.requests import Extend
from patternkv_sgl.segments import Reader, Segments, build_segments
from patternkv_sgl.tables import ZERO_TABLE, TableRuns

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from patternkv_sgl.pool import PatternKVPool
    from patternkv_sgl.stats import Stats


@dataclass(frozen=True)
class ExtendPlan:
    """Metadata of an extend batch, shared by all layers."""

    extends: list[Extend]
    qo_indptr: list[int]  # [b + 1], new tokens
    prefix_indptr: list[int]  # [b + 1], stored tokens
    prefix_slots: torch.Tensor  # int64 [prefix_indptr[-1]]
    prefix_tables: torch.Tensor  # int32 [prefix_indptr[-1]]
    token_tables: torch.Tensor  # int32 [qo_indptr[-1]]


@dataclass(frozen=True)
class TreePlan:
    """Metadata of a decode batch, shared by all layers."""

    decode: DecodePlan
    token_tables: torch.Tensor  # int32 [b]
    ring: torch.Tensor  # int64 [b], the request row
    position: torch.Tensor  # int64 [b], of the token being decoded
    window_start: torch.Tensor  # int64 [b]


class PatternKVBackend(AttentionBackend):  # type: ignore[misc]
    """SGLang attention backend (layers/attention/base_attn_backend.py) over `PatternKVPool`.

    Args:
        pool: the packed cache.
        req_to_token: int32 [num_request_rows, max_context_len], SGLang's slot of each position.
        current: slot that holds the requests of the batch about to run.
        stats: counters that decode advances.
    """

    def __init__(
        self,
        pool: PatternKVPool,
        req_to_token: torch.Tensor,
        current: CurrentBatch,
        stats: Stats,
    ) -> None:
        super().__init__()
        assert pool.num_windows >= len(req_to_token), (
            f"{pool.num_windows} windows for {len(req_to_token)} request rows"
        )
        self.pool, self.req_to_token = pool, req_to_token
        self.current, self.stats = current, stats
        self.config = pool.geometry.config
        self.forward_metadata: ExtendPlan | TreePlan | None = None

    def support_triton(self) -> bool:
        return bool(self.req_to_token.is_cuda)

    # Planning, once per batch

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        batch, mode = self.current.take(), forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
        elif mode.is_decode():
            assert batch is None or isinstance(batch, DecodeBatch), f"{batch=} in a decode forward"
            self.forward_metadata = self._plan_decode(
                batch or self._dummy_decode(forward_batch), forward_batch
            )
            if batch is not None:
                self._count(batch)
        else:
            assert batch is None or isinstance(batch, ExtendBatch), f"{batch=} in an extend forward"
            self.forward_metadata = self._plan_extend(
                batch or self._dummy_extend(forward_batch), forward_batch
            )

    def _plan_extend(self, batch: ExtendBatch, forward_batch: ForwardBatch) -> ExtendPlan:
        extends, rows = batch.extends, forward_batch.req_pool_indices.tolist()
        slots = [
            self.req_to_token[row, : extend.prefix_len]
            for row, extend in zip(rows, extends, strict=True)
        ]
        prefix_slots = torch.cat(slots).long()
        lengths = torch.tensor([extend.num_tokens for extend in extends])
        token_tables = self._int32([extend.table for extend in extends]).repeat_interleave(
            lengths.to(self.req_to_token.device)
        )
        self.pool.slot_table[forward_batch.out_cache_loc] = token_tables
        return ExtendPlan(
            extends,
            list(accumulate((extend.num_tokens for extend in extends), initial=0)),
            list(accumulate((extend.prefix_len for extend in extends), initial=0)),
            prefix_slots,
            self.pool.slot_table[prefix_slots],
            token_tables,
        )

    def _plan_decode(self, batch: DecodeBatch, forward_batch: ForwardBatch) -> TreePlan:
        token_tables = self._int32(batch.tables)
        self.pool.slot_table[forward_batch.out_cache_loc] = token_tables
        segments = batch.segments
        if self.config.check:
            self._check_segments(segments)
        decode = DecodePlan(
            self.req_to_token,
            self._int32(segments.segments),
            self._int32(segments.row_indptr),
            self._int32(segments.rows),
        )
        device = self.req_to_token.device
        return TreePlan(
            decode,
            token_tables,
            forward_batch.req_pool_indices.long(),
            torch.tensor(batch.seq_lens, device=device) - 1,
            torch.tensor(batch.window_starts, device=device),
        )

    def _count(self, batch: DecodeBatch) -> None:
        self.stats.kv_reads += int(batch.seq_lens.sum())
        self.stats.kv_reads_shared += batch.segments.shared_reads
        self.stats.max_branches = max(self.stats.max_branches, batch.segments.max_branches)

    def _int32(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.req_to_token.device)

    def _check_segments(self, segments: Segments) -> None:
        for row, start, end, table in segments.segments.tolist():
            stored = self.pool.slot_table[self.req_to_token[row, start:end].long()]
            assert bool((stored == table).all()), (
                f"request row {row} reads positions [{start}, {end}) with table {table} but their "
                f"slots were quantized with {sorted(set(stored.tolist()))}"
            )

    # A batch without requests (warm-up, graph capture) reads and writes only the padding page.

    def _dummy_extend(self, forward_batch: ForwardBatch) -> ExtendBatch:
        self._assert_dummy(forward_batch)
        lens = zip(
            forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True
        )
        return ExtendBatch([Extend(prefix, new, ZERO_TABLE, mine=False) for prefix, new in lens])

    def _dummy_decode(self, forward_batch: ForwardBatch) -> DecodeBatch:
        self._assert_dummy(forward_batch)
        seq_lens = forward_batch.seq_lens.cpu().numpy().astype(np.int64)
        runs = TableRuns([(0, ZERO_TABLE)])
        rows = forward_batch.req_pool_indices.tolist()
        starts = seq_lens - min(1, self.config.window)
        ends = zip(rows, starts.tolist(), strict=True)
        segments = build_segments([Reader(row, [], runs, end) for row, end in ends])
        return DecodeBatch(segments, np.full(len(rows), ZERO_TABLE, np.int32), starts, seq_lens)

    def _assert_dummy(self, forward_batch: ForwardBatch) -> None:
        highest = int(forward_batch.out_cache_loc.max()) if len(forward_batch.out_cache_loc) else 0
        assert highest < self.pool.page_size, (
            f"a batch without requests writes slot {highest}, beyond the padding page of "
            f"{self.pool.page_size}: the ForwardBatch.init_new hook did not see it"
        )

    # Per layer

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        plan = self.forward_metadata
        assert isinstance(plan, ExtendPlan) and save_kv_cache, f"{plan=}, {save_kv_cache=}"
        index = layer.layer_id - self.pool.start_layer
        q, k, v = self._heads(q, k, v, layer)
        tables = self.pool.tables[index]
        for extend, start in zip(plan.extends, plan.qo_indptr, strict=False):
            if extend.mine:
                self._mine(index, extend, *(x[start:][: extend.num_tokens] for x in (q, k, v)))
        self._store(index, forward_batch.out_cache_loc, k, v, plan.token_tables)
        prefix_k, prefix_v = dequantize(
            self.pool.slot_format,
            self.pool.packed[index],
            plan.prefix_slots,
            tables,
            plan.prefix_tables,
            dtype=k.dtype,
        )
        out = extend_attention(
            q,
            k,
            v,
            plan.qo_indptr,
            prefix_k,
            prefix_v,
            plan.prefix_indptr,
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap,
        )
        return out.reshape(len(out), -1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        plan = self.forward_metadata
        assert isinstance(plan, TreePlan) and save_kv_cache, f"{plan=}, {save_kv_cache=}"
        index = layer.layer_id - self.pool.start_layer
        q, k, v = self._heads(q, k, v, layer)
        self._store(index, forward_batch.out_cache_loc, k, v, plan.token_tables)
        out = tree_decode(
            q,
            self.pool.slot_format,
            self.pool.packed[index],
            self.pool.tables[index],
            plan.decode,
            window=self._write_window(index, k, v, plan),
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap,
        )
        return out.reshape(len(out), -1)

    @staticmethod
    def _heads(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert k is not None and v is not None, f"layer {layer.layer_id} passes no K and V"
        return (
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
        )

    def _mine(
        self, index: int, extend: Extend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        config = self.config
        sinks = max(0, min(config.sinks, extend.num_tokens) - extend.prefix_len)
        mined = mine_kv(
            q,
            k,
            v,
            num_patterns=config.patterns,
            num_sinks=sinks,
            bits=(config.k_bits, config.v_bits),
        )
        self.pool.tables[index].write(extend.table, *mined)

    def _store(
        self,
        index: int,
        slots: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        token_tables: torch.Tensor,
    ) -> None:
        pool = self.pool
        tables = pool.tables[index]
        store_kv(pool.slot_format, pool.packed[index], slots.long(), k, v, tables, token_tables)

    def _write_window(
        self, index: int, k: torch.Tensor, v: torch.Tensor, plan: TreePlan
    ) -> Window | None:
        size = self.config.window
        if not size:
            return None
        ring_k, ring_v = self.pool.window_k[index], self.pool.window_v[index]
        slot = plan.position % size
        ring_k[plan.ring, slot] = k.to(ring_k.dtype)
        ring_v[plan.ring, slot] = v.to(ring_v.dtype)
        return Window(ring_k, ring_v, plan.ring, plan.window_start, plan.position + 1)
