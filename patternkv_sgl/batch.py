"""The batch about to run, as the scheduler's objects describe it.

Attributes put on a ``ForwardBatch`` do not reach the attention backend (SGLang copies it), so what
the backend needs of the requests passes through one slot per scheduler process, filled just
before the forward and emptied by the backend. An empty slot means a dummy batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patternkv_sgl.requests import ATTRIBUTE, Extend, RequestTables
from patternkv_sgl.segments import Reader, Segments, build_segments

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from patternkv_sgl.radix import PatternRadixCache


@dataclass(frozen=True)
class ExtendBatch:
    """Requests that store and attend new tokens (prefill, chunked or mixed)."""

    extends: list[Extend]


@dataclass(frozen=True)
class DecodeBatch:
    """Requests that decode one token each.

    Attributes:
        segments: what the rows read from the pool. The next batch of the same requests changes it.
        tables: int32 [b], table that each row's new token is quantized with.
        window_starts, seq_lens: int64 [b]; row ``i`` reads positions ``[window_starts[i],
            seq_lens[i])`` from its window.
    """

    segments: Segments
    tables: np.ndarray
    window_starts: np.ndarray
    seq_lens: np.ndarray


Batch = ExtendBatch | DecodeBatch


class CurrentBatch:
    """The process-level slot; see the module docstring."""

    def __init__(self) -> None:
        self._batch: Batch | None = None

    def put(self, batch: Batch | None) -> None:
        self._batch = batch

    def take(self) -> Batch | None:
        batch, self._batch = self._batch, None
        return batch


class DecodePlanner:
    """Works out decode batches; while the same requests decode on, only ends of segments move.

    Args:
        tree: whose version tells when a path or a request's tables changed.
    """

    def __init__(self, tree: PatternRadixCache) -> None:
        self._tree = tree
        self._key: tuple[int, ...] | None = None
        self._batch = DecodeBatch(build_segments([]), *(np.zeros(0, dtype=int) for _ in range(3)))
        self._first_starts = np.zeros(0, dtype=int)

    def plan(self, reqs: Sequence[Req], seq_lens: np.ndarray) -> DecodeBatch:
        """Reading plan of ``reqs``; ``seq_lens`` int64 [b] count the token being decoded."""
        # Ids are safe: a request that is gone took the version along.
        key = (self._tree.version, *map(id, reqs))
        changed = key != self._key
        if changed:
            states: list[RequestTables] = [getattr(req, ATTRIBUTE) for req in reqs]
            self._first_starts = np.array([state.window_start for state in states], dtype=np.int64)
        starts = np.maximum(self._first_starts, seq_lens - self._tree.config.window)
        if changed:
            readers = [
                Reader(req.kv.req_pool_idx, self._tree.path(req.last_node), state.runs, int(end))
                for req, state, end in zip(reqs, states, starts, strict=True)
            ]
            segments = build_segments(readers)
            tables = np.array([state.runs.last for state in states], dtype=np.int32)
        else:
            segments, tables = self._batch.segments, self._batch.tables
            segments.grow(starts)
        self._key, self._batch = key, DecodeBatch(segments, tables, starts, seq_lens)
        return self._batch


def read_batch(
    tree: PatternRadixCache, planner: DecodePlanner, batch: ScheduleBatch
) -> Batch | None:
    """What the backend must know of ``batch``; advances the tree's requests for an extend.

    Raises:
        RuntimeError: a batch kind that start-up refuses, such as speculative verification.
    """
    mode = batch.forward_mode
    if mode.is_idle():
        return None
    if mode.is_decode():
        return planner.plan(batch.reqs, batch.seq_lens_cpu.numpy())
    if mode.is_extend_without_speculative():
        return ExtendBatch(tree.begin_extends(batch.reqs, batch.prefix_lens, batch.extend_lens))
    raise RuntimeError(f"forward mode {mode.name} is not available with --kv-quant patternkv")
