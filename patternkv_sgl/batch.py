"""The batch about to run, as the scheduler's objects describe it.

Attributes put on a ``ForwardBatch`` do not reach the attention backend (SGLang copies it), so what
the backend needs of the requests passes through one slot per scheduler process, filled just
before the forward and emptied by the backend. An empty slot means a dummy batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from patternkv_sgl.requests import ATTRIBUTE, Extend, RequestTables
from patternkv_sgl.segments import Path, Reader, Segments, build_segments

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from patternkv_sgl.radix import PatternRadixCache


MAX_TREE_TOKENS = 16
"""Most new tokens of a request that read its prefix packed. More of them share its dequantized copy
at less cost."""


@dataclass(frozen=True)
class ExtendBatch:
    """Requests that store and attend new tokens (prefill, chunked or mixed).

    Attributes:
        extends: the requests in order.
        req_pool_indices: their rows of ``req_to_token``.
        tree_requests: indices of those whose tokens read the stored prefix as rows of a decode
            batch, without dequantizing it: best-of-N branches over one prompt read it once.
        tree_segments: what these rows read; None where there are none.
    """

    extends: list[Extend]
    req_pool_indices: list[int]
    tree_requests: frozenset[int] = frozenset()
    tree_segments: Segments | None = None

    @cached_property
    def token_indptr(self) -> list[int]:
        """``b + 1`` offsets of the requests into the batch's new tokens."""
        return list(accumulate((extend.num_tokens for extend in self.extends), initial=0))


@dataclass(frozen=True)
class DecodeBatch:
    """Requests that decode one token each.

    Attributes:
        segments: what the rows read from the pool. The next batch of the same requests changes it.
        req_pool_indices: int64 [b], rows of ``req_to_token``.
        tables: int32 [b], table that each row's new token is quantized with.
        window_starts, seq_lens: int64 [b]; row ``i`` reads positions ``[window_starts[i],
            seq_lens[i])`` from its window.
    """

    segments: Segments
    req_pool_indices: np.ndarray
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

    def peek(self) -> Batch | None:
        return self._batch

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
        self._batch = DecodeBatch(build_segments([]), *(np.zeros(0, dtype=int) for _ in range(4)))
        self._first_starts = np.zeros(0, dtype=int)

    def plan(self, reqs: Sequence[Req], seq_lens: np.ndarray) -> DecodeBatch:
        """Reading plan of ``reqs``; ``seq_lens`` int64 [b] count the token being decoded."""
        # Ids are safe: a request that is gone took the version along.
        key = (self._tree.version, *map(id, reqs))
        changed = key != self._key or not self._batch.segments.growable
        if changed:
            states: list[RequestTables] = [getattr(req, ATTRIBUTE) for req in reqs]
            self._first_starts = np.array([state.window_start for state in states], dtype=np.int64)
        starts = np.maximum(self._first_starts, seq_lens - self._tree.config.window)
        if changed:
            indices = [req.kv.req_pool_idx for req in reqs]
            runs = [state.runs for state in states]
            paths = _paths(self._tree, reqs)
            segments = build_segments([*map(Reader, indices, paths, runs, starts.tolist())])
            rows = np.array(indices, dtype=np.int64)
            tables = np.array([own.last for own in runs], dtype=np.int32)
        else:
            segments, rows = self._batch.segments, self._batch.req_pool_indices
            tables = self._batch.tables
            segments.grow(starts)
        self._key, self._batch = key, DecodeBatch(segments, rows, tables, starts, seq_lens)
        return self._batch


def _paths(tree: PatternRadixCache, reqs: Sequence[Req]) -> list[Path]:
    """The radix paths of ``reqs``, one object for those at the same node."""
    nodes = [req.last_node for req in reqs]
    ids = [*map(id, nodes)]
    path_of = {key: tree.path(node) for key, node in dict(zip(ids, nodes, strict=True)).items()}
    return [path_of[key] for key in ids]


def plan_extend(
    tree: PatternRadixCache, reqs: Sequence[Req], extends: list[Extend], max_tree_rows: int
) -> ExtendBatch:
    """Choose how the tokens of ``extends`` read their prefixes."""
    req_pool_indices = [req.kv.req_pool_idx for req in reqs]
    chosen: set[int] = set()
    readers: list[Reader] = []
    paths = _paths(tree, reqs)
    for index, (req, extend, path) in enumerate(zip(reqs, extends, paths, strict=True)):
        few = 0 < extend.num_tokens <= MAX_TREE_TOKENS and extend.prefix_len > 0
        if not few or len(readers) + extend.num_tokens > max_tree_rows:
            continue
        chosen.add(index)
        row, end = req_pool_indices[index], extend.prefix_len
        depth = path[-1][1] if path else 0
        if depth < end:
            # Stored by this request alone, for all of its tokens.
            path = [*path, (depth, end, ("request", row))]
        runs = getattr(req, ATTRIBUTE).runs
        readers += [Reader(row, path, runs, end)] * extend.num_tokens
    segments = build_segments(readers) if readers else None
    return ExtendBatch(extends, req_pool_indices, frozenset(chosen), segments)


def may_decode(forward_batch: ForwardBatch, *, is_generation: bool, has_adapters: bool) -> bool:
    """Whether an extend forward of one token per request may run as a decode step.

    A prompt that is stored already is prefilled again for its last token alone, by every branch of
    a best-of-n. SGLang pads such a forward to no prefill graph; as a decode step it replays one.
    Hidden states, logprobs of the prompt and what only prefill prepares keep it a prefill, and so
    does a server with LoRA adapters: SGLang has prepared them for a prefill by now, and a graph
    would read those of the last decode step.
    """
    prepared = (
        forward_batch.input_embeds,
        forward_batch.replace_embeds,
        forward_batch.token_indices_to_pool,
        forward_batch.mrope_positions,
        forward_batch.spec_info,
        forward_batch.global_num_tokens_cpu,
    )
    return (
        forward_batch.forward_mode.is_extend_without_speculative()
        and not forward_batch.forward_mode.is_mixed()
        and is_generation
        and not has_adapters
        and not forward_batch.return_logprob
        and not forward_batch.capture_hidden_mode.need_capture()
        and not forward_batch.contains_mm_inputs()
        and all(value is None for value in prepared)
    )


def read_batch(
    tree: PatternRadixCache,
    planner: DecodePlanner,
    batch: ScheduleBatch,
    max_tree_rows: int,
    *,
    as_decode: bool = False,
) -> Batch | None:
    """What the backend must know of ``batch``; advances the tree's requests for an extend.

    ``as_decode`` makes a decode step of an extend batch whose requests have one new token each and
    a stored prefix.

    Raises:
        RuntimeError: a batch kind that start-up refuses, such as speculative verification.
    """
    mode = batch.forward_mode
    if mode.is_idle():
        return None
    if mode.is_decode():
        return planner.plan(batch.reqs, batch.seq_lens_cpu.numpy())
    if mode.is_extend_without_speculative():
        extends = tree.begin_extends(batch.reqs, batch.prefix_lens, batch.extend_lens)
        if as_decode and all(
            extend.num_tokens == 1 and extend.prefix_len > 0 for extend in extends
        ):
            return planner.plan(batch.reqs, batch.seq_lens_cpu.numpy())
        return plan_extend(tree, batch.reqs, extends, max_tree_rows)
    raise RuntimeError(f"forward mode {mode.name} is not available with --kv-quant patternkv")
