"""A radix tree that goes over long prompts and paths of nodes as seldom as it can."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    DecLockRefResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.common import page_align_floor
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_PRIORITY = sys.maxsize
Span = tuple[int, int, TreeNode]
"""``start, end, node``: the positions of a node's tokens."""


class Known(NamedTuple):
    """The last answer to a request that brought a prompt."""

    prompt: object  # the ids, which branches of a request share
    key: tuple[Hashable, ...]  # what else was asked
    result: MatchResult


class IncrementalRadixCache(RadixCache):  # type: ignore[misc]
    """SGLang's ``RadixCache`` (mem_cache/radix_cache.py) at less cost for branches of long prompts.

    Tree, request row and lock counts end as with stock's.
    """

    _known: Known | None = None
    _indices: tuple[TreeNode, torch.Tensor] | None = None  # of the path to a node
    # Advances when paths change.
    _num_splits = 0

    def reset(self) -> None:
        self._known = self._indices = None
        super().reset()

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """`find_prefix`, but for branches of one request, which come one after the other, once."""
        req, key = params.req, params.key
        if req is None or req.output_ids:
            return self.find_prefix(params)
        prompt = req.origin_input_ids
        asked = len(key), key.extra_key, key.cache_salt
        known = self._known
        if known is not None and known.prompt is prompt and known.key == asked:
            now, node = time.monotonic(), known.result.last_device_node
            while node is not None:
                node.last_access_time = now
                node = node.parent
            return known.result
        result = self.find_prefix(params)
        self._known = Known(prompt, asked, result)
        return result

    def find_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Stock's ``match_prefix``."""
        return super().match_prefix(params)

    def path_device_indices(self, node: TreeNode) -> torch.Tensor:
        """Stock's, put together once for requests at one node."""
        if self._indices is None or self._indices[0] is not node:
            self._indices = node, super().path_device_indices(node)
        return self._indices[1]

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        self._known = None
        self._num_splits += 1
        return super()._split_node(key, child, split_len)

    def _delete_leaf(self, node: TreeNode) -> None:
        self._known = self._indices = None
        super()._delete_leaf(node)

    def inc_lock_ref(self, node: TreeNode) -> IncLockRefResult:
        """Stock's, but what depends on whether a node is locked is looked at when that changes."""
        delta = 0
        while not self.disable and node is not self.root_node:
            node.lock_ref += 1
            if node.lock_ref == 1:
                delta -= len(node.key)
                self._update_leaf_status(node)
            node = node.parent
        self.evictable_size_ += delta
        self.protected_size_ -= delta
        return IncLockRefResult(delta=delta)

    def dec_lock_ref(
        self, node: TreeNode, params: DecLockRefParams | None = None
    ) -> DecLockRefResult:
        """As `inc_lock_ref`."""
        delta = 0
        while not self.disable and node is not self.root_node:
            node.lock_ref -= 1
            if node.lock_ref == 0:
                delta += len(node.key)
                self._update_leaf_status(node)
            assert node.parent is not None, f"node {node.id} is of another tree"
            node = node.parent
        self.evictable_size_ += delta
        self.protected_size_ -= delta
        return DecLockRefResult(delta=delta)

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """Stock's, from where the request stands in the tree. Stock's own compares and copies the
        sequence from its first token on, three times, and each branch of a prompt has two
        checkpoints."""
        if self.disable:
            return
        self._known = None  # nothing else adds nodes
        kv, start = req.kv, req.kv.cache_protected_len
        token_ids = req.full_untruncated_fill_ids
        end = page_align_floor(min(up_to, len(token_ids)), self.page_size)
        prompt_len = page_align_floor(len(req.origin_input_ids), self.page_size)
        # Behind its prompt a request marks the prompt's end, by a node of a higher priority, so
        # that its answer can be evicted alone.
        marks, priority = prompt_len < end, req.priority or 0
        mark = min(priority + 1, MAX_PRIORITY)

        node, depth, now = self.root_node, 0, time.monotonic()
        for _, stop, passed in self.path(req.last_node):
            if stop > prompt_len:
                break
            node, depth = passed, stop
            node.last_access_time = now
            node.priority = max(node.priority, mark if marks else priority)
            if depth > kv.cache_inserted_len:
                self._inc_hit_count(node)

        key = RadixKey(token_ids[depth:end], req.extra_key, cache_salt=req.cache_salt)
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx]
        slots = row[depth:end].to(torch.int64, copy=True)
        inserted = kv.cache_inserted_len - depth
        num_found, leaf = self._insert_helper(node, key, slots, priority, inserted)
        kv.cache_inserted_len = max(kv.cache_inserted_len, end)
        if marks and (left := prompt_len - depth):
            self._insert_helper(node, key[:left], slots[:left], mark, left)
        if (found := depth + num_found) > start:
            # The tree has these tokens of somebody else.
            self.token_to_kv_pool_allocator.free_segment(row[start:found], start_pos=start)
            values = [below.value for begin, _, below in self.path(leaf) if begin >= start]
            theirs = torch.cat(values)[: found - start]
            self.req_to_token_pool.write((kv.req_pool_idx, slice(start, found)), theirs)
        kv.cache_protected_len = end
        self.unlock(req.lock)
        req.lock, req.last_node = self.lock(leaf), leaf

    def _match_prefix_helper(
        self, node: TreeNode, key: RadixKey
    ) -> tuple[list[torch.Tensor], TreeNode]:
        """Stock's, which copies the rest of ``key`` at every node (of a chunked prompt, at every
        chunk) and looks for where nodes differ before it knows that they do."""
        now = time.monotonic()
        node.last_access_time = now
        values: list[torch.Tensor] = []
        depth = 0
        while depth < len(key):
            child = node.children.get(key.child_key_at(depth, self.page_size))
            if child is None:
                break
            child.last_access_time = now
            node, length = child, len(child.key)
            if not _holds(key, depth, child.key):
                length = child.key.match_at(key, depth, self.page_size)
            if length < len(child.key):
                node = self._split_node(child.key, child, length)
            values.append(node.value)
            depth += length
        return values, node

    def path(self, node: TreeNode | None) -> list[Span]:
        """Each node from the root, which is none of them, down to ``node``."""
        nodes: list[TreeNode] = []
        spans: list[Span] = []
        while node is not None and node.parent is not None:
            nodes.append(node)
            above: list[Span] | None = self.recall(node, "above")
            if above is not None:
                spans = [*above]
                break
            node = node.parent
        for passed in reversed(nodes):
            start = spans[-1][1] if spans else 0
            spans.append((start, start + len(passed.key), passed))
        if nodes:
            # Without the node itself, which could not be freed if it referred to itself.
            self.remember(nodes[0], "above", spans[:-1])
        return spans

    def remember(self, node: TreeNode, name: str, value: object) -> None:
        """Keep at ``node`` what its path says, for `recall`."""
        setattr(node, name, (self._num_splits, value))

    def recall(self, node: TreeNode, name: str) -> Any:
        """What `remember` has kept, None if paths have changed since."""
        num_splits, value = getattr(node, name, (-1, None))
        return value if num_splits == self._num_splits else None


def _holds(key: RadixKey, start: int, part: RadixKey) -> bool:
    """Whether all of ``part`` is in ``key`` from ``start`` on."""
    end = start + len(part)
    return end <= len(key) and bool(key.token_ids[start:end] == part.token_ids)
