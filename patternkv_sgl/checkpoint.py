"""A radix tree in which a checkpoint costs what it adds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

MAX_PRIORITY = sys.maxsize


class IncrementalRadixCache(RadixCache):  # type: ignore[misc]
    """SGLang's ``RadixCache`` (mem_cache/radix_cache.py), whose ``checkpoint`` goes on from where
    the request stands in the tree.

    Stock's compares and copies a sequence from its first token on, three times, and each branch of
    a prompt has two checkpoints. The tree, the row and the lock that this one leaves are the same.
    """

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        if self.disable:
            return
        kv, start = req.kv, req.kv.cache_protected_len
        end = up_to // self.page_size * self.page_size
        prompt_len = len(req.origin_input_ids) // self.page_size * self.page_size
        # Behind its prompt a request marks the prompt's end, by a node of a higher priority, so
        # that its answer can be evicted alone.
        marks, priority = prompt_len < end, req.priority or 0
        mark = min(priority + 1, MAX_PRIORITY)

        node, depth = self.root_node, 0
        for _, stop, passed in self.path(req.last_node):
            if stop > prompt_len:
                break
            node, depth = passed, stop
            node.last_access_time = time.monotonic()
            node.priority = max(node.priority, mark if marks else priority)
            if depth > kv.cache_inserted_len:
                self._inc_hit_count(node)

        key = RadixKey(
            req.full_untruncated_fill_ids[depth:end], req.extra_key, cache_salt=req.cache_salt
        )
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
            theirs = self.path_device_indices(leaf)[start:found]
            self.req_to_token_pool.write((kv.req_pool_idx, slice(start, found)), theirs)
        kv.cache_protected_len = end
        self.unlock(req.lock)
        req.lock, req.last_node = self.lock(leaf), leaf

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
