"""Attention over the packed cache, layer by layer, of batches that are planned once.

CPU and CUDA tensors take the same path through ``patternkv_kernels``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds

from patternkv_kernels import (
    Window,
    WindowWrite,
    dequantize,
    merge_states,
    mine_kv,
    store_kv,
    store_windows,
    tree_decode,
    tree_decode_with_lse,
)
from patternkv_sgl.batch import CurrentBatch, DecodeBatch, ExtendBatch
from patternkv_sgl.guard import LogitGuard
from patternkv_sgl.metadata import DecodeMetadata
from patternkv_sgl.planner import Planner
from patternkv_sgl.prefill import ExtendMetadata
from patternkv_sgl.requests import Extend
from patternkv_sgl.scratch import Scratch
from patternkv_sgl.warmup import dummy_decode, dummy_extend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    from patternkv_sgl.basis import KBasis
    from patternkv_sgl.pool import PatternKVPool
    from patternkv_sgl.stats import Stats


class PatternKVBackend(AttentionBackend):  # type: ignore[misc]
    """SGLang attention backend (layers/attention/base_attn_backend.py) over `PatternKVPool`.

    Args:
        pool: the packed cache.
        req_to_token: int32 [num_request_rows, max_context_len], SGLang's slot of each position.
        current: slot that holds the requests of the batch about to run.
        stats: counters that decode advances.
        scratch: device memory for kernels.
        bases: of the layers whose K is stored rotated, by layer id.
    """

    def __init__(
        self,
        pool: PatternKVPool,
        req_to_token: torch.Tensor,
        current: CurrentBatch,
        stats: Stats,
        scratch: Scratch,
        bases: Mapping[int, KBasis] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.bases = bases
        assert pool.num_windows >= len(req_to_token), (
            f"{pool.num_windows} windows for {len(req_to_token)} request rows"
        )
        self.pool, self.req_to_token = pool, req_to_token
        self.current, self.stats, self.scratch = current, stats, scratch
        self.config = pool.geometry.config
        self.guard = LogitGuard(pool, stats)
        self.planner = Planner(pool, req_to_token, scratch)
        self.forward_metadata: ExtendMetadata | DecodeMetadata | None = None
        self._windowed_layers = pool.windowed_layers()
        self._next_layer = 0  # that a decode step attends

    def support_triton(self) -> bool:
        return bool(self.req_to_token.is_cuda)

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """A captured decode graph reads its own copy of the slots."""
        return SharedReadEnds.PRE_REPLAY if fm.is_decode() else SharedReadEnds.UNKNOWN

    # CUDA graphs: a captured decode forward reads its plan, work list and states from memory that
    # every batch writes again before the replay.

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Raises ``RuntimeError`` where decode could not be captured."""
        if self.scratch.decode is None:
            raise RuntimeError(
                "--kv-quant patternkv decodes by torch operators here, which no CUDA graph can "
                f"hold: {self.scratch.decode_missing}; remedy that, or add --disable-cuda-graph"
            )
        if max_bs > (most := self.scratch.shape.max_rows):
            raise RuntimeError(
                f"CUDA graphs of {max_bs} requests, but at most {most} run: lower "
                "--cuda-graph-max-bs or raise --max-running-requests"
            )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def can_replay(self) -> bool:
        """Whether the batch about to run fits what decode graphs were captured with."""
        batch = self.current.peek()
        return not isinstance(batch, DecodeBatch) or self.planner.fits(batch)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        batch = self.current.take()
        assert batch is None or isinstance(batch, DecodeBatch), f"{batch=} in a decode forward"
        assert (batch is None) == in_capture, f"{batch=}, {in_capture=}"
        self.forward_metadata = self._plan_decode(batch, forward_batch, forward_batch.batch_size)

    # Planning, once per batch

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        batch, mode = self.current.take(), forward_batch.forward_mode
        if mode.is_idle():
            self.forward_metadata = None
        elif mode.is_decode():
            assert batch is None or isinstance(batch, DecodeBatch), f"{batch=} in a decode forward"
            num_rows = len(forward_batch.req_pool_indices)
            self.forward_metadata = self._plan_decode(batch, forward_batch, num_rows)
        else:
            assert batch is None or isinstance(batch, ExtendBatch), f"{batch=} in an extend forward"
            self.forward_metadata = self.planner.extend(
                batch or dummy_extend(forward_batch, self.pool.page_size),
                forward_batch.out_cache_loc,
            )

    def _plan_decode(
        self, batch: DecodeBatch | None, forward_batch: ForwardBatch, num_rows: int
    ) -> DecodeMetadata:
        if batch is None:
            batch = dummy_decode(forward_batch, self.pool.page_size, self.config.window)
        else:
            self._count(batch)
            self.guard.poll()
        self._next_layer = 0
        return self.planner.decode(batch, forward_batch.out_cache_loc, num_rows)

    def _count(self, batch: DecodeBatch) -> None:
        self.stats.kv_reads += int(batch.seq_lens.sum())
        self.stats.kv_reads_shared += batch.segments.shared_reads
        self.stats.max_branches = max(self.stats.max_branches, batch.segments.max_branches)

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
        assert isinstance(plan, ExtendMetadata) and save_kv_cache, f"{plan=}, {save_kv_cache=}"
        index = layer.layer_id - self.pool.start_layer
        q, k, v = self._heads(q, k, v, layer)
        turned_q, turned_k = self._turned(q, k, layer)
        mined = []
        for extend, start in zip(plan.batch.extends, plan.batch.token_indptr, strict=False):
            if extend.mine:
                mined.append(slice(start, start + extend.num_tokens))
                self._mine(index, extend, *(x[mined[-1]] for x in (turned_q, turned_k, v)))
        write = self._window_write(index, plan.window_index)
        self._store(index, forward_batch.out_cache_loc, turned_k, v, plan.token_tables, write)
        if mined and self.guard.wants(index):
            stored = turned_q, turned_k, forward_batch.out_cache_loc, plan.token_tables
            self.guard.measure(index, *(x[mined[0]] for x in stored))
        out, lse = plan.new(q, k, v, sm_scale=layer.scaling, logit_cap=layer.logit_cap)
        for tokens, other_out, other_lse in self._attend_prefixes(index, turned_q, plan, layer):
            out[tokens], lse[tokens] = merge_states(out[tokens], lse[tokens], other_out, other_lse)
        return out.to(q.dtype).reshape(len(out), -1)

    def _attend_prefixes(
        self, index: int, q: torch.Tensor, plan: ExtendMetadata, layer: RadixAttention
    ) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor]]:
        """``tokens, out, lse``: attention of some new tokens to some of their stored ones."""
        pool = self.pool
        cache = pool.slot_formats[index], pool.packed[index]
        tables = pool.tables[index]
        if plan.tree is not None:
            tokens = plan.tree.tokens
            out, lse = tree_decode_with_lse(
                q[tokens],
                *cache,
                tables,
                plan.tree.plan,
                window=None,
                workspace=plan.tree.workspace,
                sm_scale=layer.scaling,
                logit_cap=layer.logit_cap,
            )
            yield tokens, out, lse
        for piece in plan.pieces:
            memory = self.scratch.prefix_memory(len(piece.slots))
            k, v = dequantize(*cache, piece.slots, tables, piece.tables, dtype=q.dtype, out=memory)
            out, lse = piece.attention(
                q[piece.tokens], k, v, sm_scale=layer.scaling, logit_cap=layer.logit_cap
            )
            yield piece.tokens, out, lse

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
        assert isinstance(plan, DecodeMetadata) and save_kv_cache, f"{plan=}, {save_kv_cache=}"
        index = layer.layer_id - self.pool.start_layer
        q, k, v = self._heads(q, k, v, layer)
        q, k = self._turned(q, k, layer)
        window, slots = self._window(index, plan, k, v), forward_batch.out_cache_loc
        if window is None:
            self._store(index, slots, k, v, plan.token_tables)
        out = tree_decode(
            q,
            self.pool.slot_formats[index],
            self.pool.packed[index],
            self.pool.tables[index],
            plan.decode,
            window=window,
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap,
            workspace=plan.workspace,
        )
        if window is not None:
            self._attended(index)
            # All layers at once: alone, each would take as long as all of them.
            if index == self.pool.layer_num - 1:
                for layers in self._windowed_layers:
                    store_windows(layers, slots, plan.window_index, plan.token_tables)
        return out.reshape(len(out), -1)

    def _attended(self, index: int) -> None:
        """A decode step's tokens are now in the windows of layers up to ``index``.

        Raises:
            RuntimeError: the model does not go through its layers in order, each once.
        """
        if index != self._next_layer:
            raise RuntimeError(
                f"--kv-quant patternkv stores a step's tokens behind the last layer: this model "
                f"attends in layer {index} where {self._next_layer} is next; add "
                "--kv-quant-window 0, which stores layer by layer"
            )
        self._next_layer = (index + 1) % self.pool.layer_num

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

    def _turned(
        self, q: torch.Tensor, k: torch.Tensor, layer: RadixAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys in the basis that the pool and the windows have K in."""
        basis = self.bases.get(layer.layer_id)
        return (q, k) if basis is None else basis.turn(q, k)

    def _mine(
        self, index: int, extend: Extend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        config = self.config
        sinks = max(0, min(config.sinks, extend.num_tokens) - extend.prefix_len)
        mine_kv(
            q,
            k,
            v,
            num_patterns=config.patterns,
            num_sinks=sinks,
            out=self.pool.tables[index].table(extend.table),
        )

    def _store(
        self,
        index: int,
        slots: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        token_tables: torch.Tensor,
        window: WindowWrite | None = None,
    ) -> None:
        pool = self.pool
        store_kv(
            pool.slot_formats[index],
            pool.packed[index],
            slots.long(),
            k,
            v,
            pool.tables[index],
            token_tables,
            window=window,
        )

    def _window(
        self, index: int, plan: DecodeMetadata, k: torch.Tensor, v: torch.Tensor
    ) -> Window | None:
        """Where decode of the new tokens ``k``, ``v`` reads the latest ones exactly."""
        if not self.config.window:
            return None
        rings = self.pool.window_k[index], self.pool.window_v[index]
        return Window(*rings, plan.ring, plan.window_start, plan.window_end, k, v)

    def _window_write(self, index: int, entries: torch.Tensor | None) -> WindowWrite | None:
        """Where new tokens go to be read exactly later."""
        if entries is None or not self.config.window:
            return None
        return WindowWrite(self.pool.window_k[index], self.pool.window_v[index], entries)
