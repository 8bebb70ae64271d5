"""The cache of one scheduler process: tree, table references, counters and gauges together."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_lora

from patternkv_sgl.admission import Admission
from patternkv_sgl.batch import (
    CurrentBatch,
    DecodeBatch,
    DecodePlanner,
    ExtendBatch,
    may_decode,
    read_batch,
)
from patternkv_sgl.pool import PatternKVPool
from patternkv_sgl.radix import PatternRadixCache
from patternkv_sgl.release import ReleaseQueue
from patternkv_sgl.stats import Gauges, Stats, device_memory
from patternkv_sgl.tables import TableRefs

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Scheduler, tree and attention backend share one process and thread; the backend exists before the
# tree does, so what both need is made at import.
CURRENT = CurrentBatch()
STATS = Stats()

GAUGE_SECONDS = 1.0
"""How late gauges are at most while requests run, but for the step that is in progress."""


class PatternCache:
    """Ties the tree to the pool it shares a scheduler process with.

    Args:
        params: SGLang's tree parameters; their allocator's pool must be a `PatternKVPool`.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self._allocator = params.token_to_kv_pool_allocator
        pool = self._allocator.get_kvcache()
        assert isinstance(pool, PatternKVPool), f"the KV pool is a {type(pool).__name__}, not ours"
        self.pool = pool
        self.refs = TableRefs(pool.num_tables)
        self.tree = PatternRadixCache(params, pool.geometry.config, self.refs, STATS)
        self.planner = DecodePlanner(self.tree)
        self.admission = Admission(self.tree)
        self.releases = ReleaseQueue(self._allocator, self.update_gauges)
        self.gauges = Gauges(self.numbers(), _rank_labels()) if params.enable_metrics else None
        self._has_adapters = bool(get_lora().enable_lora)
        self._gauges_due = 0.0
        self.update_gauges()

    def begin(self, batch: ScheduleBatch, forward_batch: ForwardBatch) -> None:
        """Hand ``batch`` to the backend; called just before ``forward_batch``, its forward, which
        may become a decode step."""
        as_decode = may_decode(
            forward_batch,
            is_generation=batch.model_config.is_generation,
            has_adapters=self._has_adapters,
        )
        current = read_batch(
            self.tree,
            self.planner,
            batch,
            self.pool.num_windows - 1,
            as_decode=as_decode,
        )
        if isinstance(current, DecodeBatch):
            forward_batch.forward_mode = ForwardMode.DECODE
        CURRENT.put(current)
        if isinstance(current, ExtendBatch):
            self.update_gauges()

    def update_gauges(self) -> None:
        """Set the gauges, if metrics are on: where no request runs at once, else once a second.

        Every step of the scheduler ends here, most of them after a look at the clock.
        """
        if self.gauges is None:
            return
        now = time.monotonic()
        if now >= self._gauges_due or not self.tree.requests:
            self._gauges_due = now + GAUGE_SECONDS
            self.gauges.set(self.numbers())

    def numbers(self) -> dict[str, int]:
        """Every number that stats and gauges show."""
        geometry = self.pool.geometry
        return {
            "bytes_per_token": geometry.bytes_per_token,
            "bf16_bytes_per_token": geometry.dense_bytes_per_token,
            "bytes_allocated": self.pool.get_kv_size_bytes(),
            "table_bytes": self.pool.table_bytes,
            "window_bytes": self.pool.window_bytes,
            "kv_tokens": self.pool.size,
            "kv_tokens_free": self._allocator.available_size(),
            "table_slots": self.pool.num_tables - 1,
            "tables_live": self.refs.live,
            "table_refs": sum(self.refs.refs.values()),
            "running_requests": len(self.tree.requests),
            **STATS.snapshot(),
        }

    def snapshot(self) -> dict[str, Any]:
        """Stats for ``/server_info``: builtins only, since they travel as msgpack."""
        geometry = self.pool.geometry
        config = geometry.config
        if config.check:
            self.tree.check_integrity(self.pool.slot_table)
        return {
            "bits": config.bits,
            "patterns": config.patterns,
            "window": config.window,
            "sinks": config.sinks,
            "mine_tokens": config.mine_tokens,
            "rotate": config.rotates(config.k_bits),
            "layer_bits": {
                str(layer): f"{k_bits}/{v_bits}"
                for layer, (k_bits, v_bits) in config.exceptions(geometry.num_layers).items()
            },
            **self.numbers(),
            **device_memory(self.pool.slot_table.device),
        }


def _rank_labels() -> dict[str, str]:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return {"tp_rank": str(parallel.tp_rank), "dp_rank": str(parallel.dp_rank or 0)}
