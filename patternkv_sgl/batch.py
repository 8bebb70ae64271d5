"""The batch about to run, as the scheduler's objects describe it.

Attributes put on a ``ForwardBatch`` do not reach the attention backend (SGLang copies it), so what
the backend needs of the requests passes through one slot per scheduler process, filled just
before the forward and emptied by the backend. An empty slot means a dummy batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patternkv_sgl.requests import ATTRIBUTE, Extend, RequestTables
from patternkv_sgl.segments import Reader

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
        readers: what each row reads from the pool.
        tables: table that each row's new token is quantized with.
        window_starts, seq_lens: row ``i`` reads positions ``[window_starts[i], seq_lens[i])`` from
            its window.
    """

    readers: list[Reader]
    tables: list[int]
    window_starts: list[int]
    seq_lens: list[int]


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


def read_batch(tree: PatternRadixCache, batch: ScheduleBatch) -> Batch | None:
    """What the backend must know of ``batch``; advances the tree's requests for an extend.

    Raises:
        RuntimeError: a batch kind that start-up refuses, such as speculative verification.
    """
    mode = batch.forward_mode
    if mode.is_idle():
        return None
    if mode.is_decode():
        return decode_batch(tree, batch.reqs, batch.seq_lens_cpu.tolist())
    if mode.is_extend_without_speculative():
        return ExtendBatch(tree.begin_extends(batch.reqs, batch.prefix_lens, batch.extend_lens))
    raise RuntimeError(f"forward mode {mode.name} is not available with --kv-quant patternkv")


def decode_batch(
    tree: PatternRadixCache, reqs: Sequence[Req], seq_lens: Sequence[int]
) -> DecodeBatch:
    """Reading plan of a decode batch; ``seq_lens`` count the token being decoded."""
    readers, tables, window_starts = [], [], []
    for req, seq_len in zip(reqs, seq_lens, strict=True):
        state: RequestTables = getattr(req, ATTRIBUTE)
        window_start = max(state.window_start, seq_len - tree.config.window)
        path: list[tuple[int, int, Any]] = tree.path(req.last_node)
        readers.append(Reader(req.kv.req_pool_idx, path, state.runs, window_start))
        tables.append(state.runs.last)
        window_starts.append(window_start)
    return DecodeBatch(readers, tables, window_starts, list(seq_lens))
