"""A radix tree that goes over a long prompt as seldom as it can."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.common import page_align_floor
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_PRIORITY = sys.maxsize


class IncrementalRadixCache(RadixCache):  # type: ignore[misc]
    """SGLang's ``RadixCache`` (mem_cache/radix_cache.py) at less cost for branches of long prompts.

    What it leaves in the tree, in the row and of locks is what stock's leaves.
    """

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """Stock's, from where the request stands in the tree. Stock's own compares and copies the
        sequence from its first token on, three times, and each branch of a prompt has two
        checkpoints."""
        if self.disable:
            return
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
        """Stock's, which copies the rest of ``key`` at every node: of a chunked prompt, at every
        chunk."""
        now = time.monotonic()
        node.last_access_time = now
        values: list[torch.Tensor] = []
        depth = 0
        while depth < len(key):
            child = node.children.get(key.child_key_at(depth, self.page_size))
            if child is None:
                break
            child.last_access_time = now
            length = child.key.match_at(key, depth, self.page_size)
            node = child
            if length < len(child.key):
                node = self._split_node(child.key, child, length)
            values.append(node.value)
            depth += length
        return values, node

    def path(self, node: TreeNode | None) -> list[tuple[int, int, TreeNode]]:
        """``(start, end, node)`` of each node from the root down to ``node``, by position."""
        nodes = []
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        spans, end = [], 0
        for node in reversed(nodes):
            start, end = end, end + len(node.key)
            spans.append((start, end, node))
        return spans
