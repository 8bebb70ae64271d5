"""The radix tree that owns pattern tables, beside the KV slots that stock's tree owns.

Ownership along one request's sequence, half-open ranges of positions:

    [0, cache_protected_len)   tree nodes of the path to ``req.last_node``; slots and tables
    [.., seq_len)              the request itself; its ``RequestTables.runs`` cover all of it

A node's ``table_runs`` name the tables of its tokens and hold one reference to each; a request's
runs do the same for the whole sequence. Splitting a node copies references, deleting drops them. A
node ``inherits`` if the table of its last token was not mined from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from patternkv_sgl.checkpoint import IncrementalRadixCache, Span
from patternkv_sgl.requests import ATTRIBUTE, Extend, RequestTables
from patternkv_sgl.tables import ZERO_TABLE, TableRefs, TableRuns

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from patternkv_sgl.config import PatternKVConfig
    from patternkv_sgl.stats import Stats


MIN_ROOT_TOKENS = 16  # fewest tokens that give the root its first table
TAIL_TOKENS = 16
"""Most tokens at the end of a prompt that are read exactly. A question about a stored context has
the context's table, which may fit it badly at 2 bits, or begins with words that another question
stored, and the answer begins by reading it. So few tokens read a stored prefix packed when every
branch of a prompt prefills them again."""
AWAITED_TOKENS = 256
"""Fewest tokens that a request waits for another one to prefill, see ``Admission``: fewer cost less
than the wait."""


class PatternRadixCache(IncrementalRadixCache):
    """A radix tree whose nodes own pattern tables.

    Args:
        params: SGLang's tree parameters.
        config: mining threshold and check switch.
        refs: reference counts over the pool's table slots; the tree is their only user.
        stats: counters that mining and inheriting advance.
    """

    def __init__(
        self, params: CacheInitParams, config: PatternKVConfig, refs: TableRefs, stats: Stats
    ) -> None:
        self.config, self.refs, self.stats = config, refs, stats
        self.requests: set[RequestTables] = set()
        # Advances when the path of a node or the tables of a request change: plans expire.
        self.version = 0
        self._inserting: RequestTables | None = None
        super().__init__(params)

    def reset(self) -> None:
        # Stock flushes only when no request runs, so nobody is left to own a table.
        self.requests.clear()
        self.refs.clear()
        self.root_table, self.root_tokens = ZERO_TABLE, 0
        self.refs.acquire([ZERO_TABLE])
        self.version += 1
        if hasattr(self, "root_node"):
            # Parents and children refer to each other: what stock drops keeps its slots, which are
            # device memory, until Python looks for cycles.
            for node in [self.root_node, *self.nodes()]:
                node.children.clear()
        super().reset()
        self.root_node.table_runs = TableRuns()

    # Requests

    def begin_extends(
        self, reqs: Sequence[Req], prefix_lens: Sequence[int], extend_lens: Sequence[int]
    ) -> list[Extend]:
        """Decide the table of each request's new tokens, and give the request its runs.

        Called once per extend batch, just before its forward. A prefill of at least
        ``mine_tokens`` new tokens mines a table; its equals in the batch (best of N sent as N equal
        prompts) share it; the rest, and all when no slot is free, inherit the table of the prefix.
        What has no prefix inherits the root's table: the first one mined, from a short prompt if
        need be, since the zero table costs accuracy at 2 bits.
        """
        mined: dict[Hashable, int] = {}
        return [
            self._begin_extend(req, prefix_len, num_tokens, mined)
            for req, prefix_len, num_tokens in zip(reqs, prefix_lens, extend_lens, strict=True)
        ]

    def _begin_extend(
        self,
        req: Req,
        prefix_len: int,
        num_tokens: int,
        mined: dict[Hashable, int],
    ) -> Extend:
        state = self._state(req)
        continues = bool(state.runs)
        state.prefilling = self.upcoming(req, prefix_len)
        runs = self._path_runs(req.last_node, state.runs).slice(0, prefix_len)
        assert bool(runs) == (prefix_len > 0), f"no tables for a prefix of {prefix_len}: {runs}"
        inherited = runs.last if runs else self.root_table
        table, mine, own = inherited, False, False
        if num_tokens >= self.config.mine_tokens or (
            inherited == ZERO_TABLE and num_tokens >= MIN_ROOT_TOKENS
        ):
            equals = _tokens_at_node(req, prefix_len, prefix_len + num_tokens)
            if equals in mined:
                table, own = mined[equals], True
            elif (free := self.refs.allocate()) is not None:
                table, mine, own = free, True, True
                mined[equals] = table
            else:
                self.stats.exhausted += 1
        if mine:
            self.stats.mined += 1
        else:
            self.stats.inherited += 1
        self._own(state, runs.extended(prefix_len, table))
        if mine and self.root_tokens < min(num_tokens, self.config.mine_tokens):
            self.refs.acquire([table])
            self.refs.release([self.root_table])
            self.root_table, self.root_tokens = table, num_tokens
        end = prefix_len + num_tokens
        if own:
            state.mined_end = end
        num_exact = 0 if own else min(num_tokens, self._tail_tokens)
        # The next token of a request that decodes, in a mixed batch, adds to its window.
        if not continues or num_exact < num_tokens:
            state.window_start = end - num_exact
        return Extend(prefix_len, num_tokens, table, mine, num_exact)

    def upcoming(self, req: Req, prefix_len: int) -> Hashable | None:
        """What ``req`` prefills next: equal for requests at one node whose next `AWAITED_TOKENS`
        tokens are alike, None for fewer tokens and where they will not get into the tree."""
        end = prefix_len + AWAITED_TOKENS
        if self.disable or req.skip_radix_cache_insert or len(req.full_untruncated_fill_ids) < end:
            return None
        return _tokens_at_node(req, prefix_len, end)

    @property
    def _tail_tokens(self) -> int:
        return min(TAIL_TOKENS, self.config.window)

    def _state(self, req: Req) -> RequestTables:
        state: RequestTables | None = getattr(req, ATTRIBUTE, None)
        if state is None:
            state = RequestTables()
            setattr(req, ATTRIBUTE, state)
            self.requests.add(state)
        return state

    def _own(self, state: RequestTables, runs: TableRuns) -> None:
        self.version += 1
        if runs == state.runs:
            return
        self.refs.acquire(runs.tables)
        self.refs.release(state.runs.tables)
        state.runs = runs

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """Stock's; but one token of a request that runs, such as the last one of a stored prompt,
        which every branch prefills again, stays its own until the request ends."""
        state: RequestTables = getattr(req, ATTRIBUTE)
        state.prefilling = None
        if up_to - req.kv.cache_protected_len == 1 and not req.finished():
            return
        self._inserting = state
        try:
            super().checkpoint(req, up_to=up_to)
        finally:
            self._inserting = None
        if not self.disable:
            # Where the tree already held these tokens, the request's row now points at slots that
            # another request quantized: follow them to their tables.
            self._own(state, self._path_runs(req.last_node, state.runs))

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        state: RequestTables | None = getattr(req, ATTRIBUTE, None)
        if state is not None:
            self.refs.release(state.runs.tables)
            self.requests.discard(state)
            delattr(req, ATTRIBUTE)
            self.version += 1
        super().on_release(req, checkpointed=checkpointed)
        if self.config.check:
            self.check_integrity(self.token_to_kv_pool_allocator.get_kvcache().slot_table)

    # Nodes

    def find_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Stock's, but the last tokens of a request's prompt are left for it to prefill, unless
        all of it is stored with a table that was mined from it: see ``TAIL_TOKENS``."""
        found = super().find_prefix(params)
        if params.req is None:
            return found
        keep = max(0, len(params.key.token_ids) - self._tail_tokens)
        if found.device_prefix_len <= keep:
            return found
        whole = found.device_prefix_len == len(params.key.page_aligned(self.page_size))
        if whole and not found.last_device_node.inherits:
            return found
        return super().find_prefix(replace(params, key=params.key[:keep]))

    def _path_runs(self, node: TreeNode | None, own: TableRuns) -> TableRuns:
        """Tables from the tree as far as its path reaches, then ``own``."""
        path = self.path(node)
        return self._runs_along(path).followed_by(path[-1][1], own) if path else own

    def _runs_along(self, path: list[Span]) -> TableRuns:
        """Tables of a path's tokens, which its last node keeps: nodes below begin with them."""
        count = len(path)
        known: TableRuns | None = None
        while count > 0 and (known := self.recall(path[count - 1][2], "path_runs")) is None:
            count -= 1
        if known is not None and count == len(path):
            return known
        below = (
            (start + offset, table)
            for offset, _, node in path[count:]
            for start, table in node.table_runs
        )
        runs = TableRuns([*(known or ()), *below])
        self.remember(path[-1][2], "path_runs", runs)
        return runs

    def _insert_helper(
        self,
        node: TreeNode,
        key: RadixKey,
        value: torch.Tensor,
        priority: int = 0,
        inserted_len: int = 0,
    ) -> tuple[int, TreeNode]:
        prefix_len, leaf = super()._insert_helper(node, key, value, priority, inserted_len)
        if not hasattr(leaf, "table_runs"):
            assert self._inserting is not None, (
                f"a node of {len(leaf.key)} tokens was inserted outside checkpoint(): its tables "
                "are unknown"
            )
            start, end, _ = self.path(leaf)[-1]
            leaf.table_runs = self._inserting.runs.slice(start, end)
            leaf.inherits = self._inserting.mined_end < end
            self.refs.acquire(leaf.table_runs.tables)
        return prefix_len, leaf

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        runs, length = child.table_runs, len(child.key)
        prefix = super()._split_node(key, child, split_len)
        prefix.inherits = child.inherits
        prefix.table_runs = runs.slice(0, split_len)
        child.table_runs = runs.slice(split_len, length)
        self.refs.acquire(prefix.table_runs.tables)
        self.refs.acquire(child.table_runs.tables)
        self.refs.release(runs.tables)
        self.version += 1
        return prefix

    def _delete_leaf(self, node: TreeNode) -> None:
        super()._delete_leaf(node)
        self.refs.release(node.table_runs.tables)

    def nodes(self) -> Iterator[TreeNode]:
        """Every node but the root."""
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check_integrity(self, slot_table: torch.Tensor | None = None) -> None:
        """Assert the conservation laws of table ownership.

        Args:
            slot_table: int32 [num_slots]; when given, every slot that a node holds must have been
                quantized with the table that the node's runs name.
        """
        owners: Counter[int] = Counter([self.root_table])
        for node in self.nodes():
            owners.update(node.table_runs.tables)
            assert node.table_runs and node.table_runs[0][0] == 0, (
                f"node {node.id} of {len(node.key)} tokens has tables {node.table_runs}"
            )
            if slot_table is not None:
                for start, stop, table in node.table_runs.spans(0, len(node.key)):
                    stored = slot_table[node.value[start:stop]]
                    assert bool((stored == table).all()), (
                        f"node {node.id} names table {table} for tokens [{start}, {stop}) but "
                        f"their slots were quantized with {sorted(set(stored.tolist()))}"
                    )
        for state in self.requests:
            owners.update(state.runs.tables)
        self.refs.check(owners)


def _tokens_at_node(req: Req, start: int, end: int) -> Hashable:
    """Equal for requests at one node whose tokens ``[start, end)`` are alike."""
    token_ids = req.full_untruncated_fill_ids[start:end]
    return id(req.last_node), start, req.extra_key, req.cache_salt, token_ids.tobytes()
