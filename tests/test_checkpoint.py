"""The cheaper tree does what stock's does."""

from __future__ import annotations

from array import array
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from patternkv_sgl.checkpoint import MAX_PRIORITY, IncrementalRadixCache, Span
from patternkv_sgl.config import PatternKVConfig
from tests.fakes import Scheduler

CONFIG = PatternKVConfig(mine_tokens=16, window=4)
SIZE = 384
Step = tuple[Any, ...]


pytestmark = pytest.mark.usefixtures("published")


def tokens_to(node: TreeNode | None) -> tuple[int, ...]:
    """What stands for a node: all tokens from the root to its end."""
    found: list[int] = []
    while node is not None:
        found = [*node.key.raw_token_ids(), *found]
        node = node.parent
    return tuple(found)


def plain_path(node: TreeNode | None) -> list[Span]:
    """`IncrementalRadixCache.path` that remembers nothing."""
    spans: list[Span] = []
    while node is not None and node.parent is not None:
        end = len(tokens_to(node))
        spans.insert(0, (end - len(node.key), end, node))
        node = node.parent
    return spans


class Life:
    """Plays steps on a scheduler and tells what they leave.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        self.scheduler = Scheduler(CONFIG, size=SIZE, page_size=page_size, num_tables=4)
        self.chunked: list[Req] = []

    def play(self, step: Step) -> None:
        scheduler = self.scheduler
        kind, *numbers = step
        if kind == "admit":
            base, cut, tail, branch, chunk, priority, branches = numbers
            prompt = array("q", [*range(1000 * base, 1000 * base + cut), *[5000 + branch] * tail])
            for req in [scheduler.admit(prompt) for _ in range(branches)]:
                req.priority = priority
                self._extend(req, chunk)
        elif kind == "chunk":
            for req in list(self.chunked):
                self.chunked.remove(req)
                self._extend(req, numbers[0])
        elif kind == "evict":
            scheduler.evict(numbers[0])
        else:
            index, count = numbers
            reqs = [req for req in scheduler.running if req not in self.chunked]
            if not reqs:
                return
            req = reqs[index % len(reqs)]
            for number in range(count):
                scheduler.decode([req], [9000 + number])
            if kind == "finish":
                scheduler.finish(req)
            elif kind == "retract":
                scheduler.retract(req)
                self._extend(scheduler.readmit(req), 200)

    def _extend(self, req: Req, chunk: int) -> None:
        if not self.scheduler.extend([req], [chunk]):
            if req.kv.holds_kv:
                self.scheduler.retract(req)
            else:
                self.scheduler.drop_waiting(req)
            return
        self.scheduler.checkpoint(req)
        if req.extend_end < len(req.full_untruncated_fill_ids):
            self.chunked.append(req)

    def state(self) -> dict[str, Any]:
        tree, scheduler = self.scheduler.tree, self.scheduler
        tree.check_integrity(scheduler.slot_table)
        return {
            "nodes": {
                tokens_to(node): (
                    node.value.tolist(),
                    (node.priority, node.hit_count, node.lock_ref),
                    (node.table_runs, node.inherits),
                )
                for node in tree.nodes()
            },
            "requests": [
                (
                    scheduler.row(req).tolist(),
                    (req.kv.cache_protected_len, req.kv.cache_inserted_len),
                    (tokens_to(req.last_node), tokens_to(req.lock.node)),
                )
                for req in scheduler.running
            ],
            "sizes": (tree.evictable_size(), tree.protected_size()),
            "free": sorted(scheduler.allocator.get_all_free_pages().tolist()),
        }


STEPS = st.one_of(
    st.tuples(
        st.just("admit"),
        st.integers(0, 1),
        st.integers(0, 60),
        st.integers(1, 24),
        st.integers(0, 2),
        st.sampled_from([16, 40, 200]),
        st.sampled_from([None, 3, MAX_PRIORITY]),
        st.integers(1, 3),
    ),
    st.tuples(st.just("chunk"), st.sampled_from([16, 200])),
    st.tuples(
        st.sampled_from(["decode", "finish", "retract"]),
        st.integers(0, 7),
        st.sampled_from([0, 1, 3, 40]),
    ),
    st.tuples(st.just("evict"), st.integers(1, 120)),
)


@pytest.mark.parametrize("page_size", [1, 16])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(steps=st.lists(STEPS, min_size=4, max_size=24))
def test_the_tree_is_stocks(page_size: int, steps: list[Step]) -> None:
    ours, stocks = Life(page_size), Life(page_size)
    cheaper = (
        "checkpoint",
        "_match_prefix_helper",
        "path_device_indices",
        "inc_lock_ref",
        "dec_lock_ref",
    )
    stock = {name: getattr(RadixCache, name) for name in cheaper}
    stock["match_prefix"] = lambda tree, params: tree.find_prefix(params)
    stock["path"] = lambda _, node: plain_path(node)
    for step in steps:
        ours.play(step)
        with patch.multiple(IncrementalRadixCache, **stock):
            stocks.play(step)
        assert ours.state() == stocks.state(), step


def test_branches_of_a_prompt_are_matched_once() -> None:
    scheduler = Scheduler(CONFIG, size=SIZE)
    prompt = array("q", range(40))
    scheduler.finish(scheduler.prefill(prompt)[0])
    tree = scheduler.tree
    with patch.object(tree, "find_prefix", wraps=tree.find_prefix) as find:
        first, second = scheduler.admit(prompt), scheduler.admit(prompt)
        assert find.call_count == 1
        assert second.last_node is first.last_node and second.prefix_len == first.prefix_len == 39
        first.last_node.last_access_time = 0.0
        scheduler.admit(prompt)
        assert first.last_node.last_access_time > 0.0, "as recently used as stock's"
        # Equal tokens of somebody else, fewer of them, and all after the tree has changed.
        scheduler.admit(array("q", prompt))
        assert find.call_count == 2
        fewer = MatchPrefixParams(key=RadixKey(prompt, limit=20), req=scheduler.admit(prompt))
        assert tree.match_prefix(fewer).device_prefix_len == 20
        scheduler.prefill(range(100, 140))
        scheduler.admit(prompt)
        assert find.call_count == 6


def test_a_retracted_branch_is_matched_by_its_own_answer() -> None:
    scheduler = Scheduler(CONFIG, size=SIZE)
    prompt = array("q", range(40))
    first, second, done = scheduler.prefill(prompt, prompt, prompt)
    for token in range(1000, 1020):
        scheduler.decode([first, second, done], [token, token + 1000, token])
    scheduler.finish(done)
    for req in (first, second):
        scheduler.retract(req)
    found = [scheduler.readmit(req).prefix_len for req in (first, second)]
    assert found == [60 - CONFIG.window, 40]


def test_evicted_tokens_are_not_matched() -> None:
    scheduler = Scheduler(CONFIG, size=SIZE)
    prompt = array("q", range(40))
    scheduler.finish(scheduler.prefill(prompt)[0])
    scheduler.drop_waiting(scheduler.admit(prompt))
    scheduler.evict(SIZE)
    assert scheduler.admit(prompt).prefix_len == 0


def test_flushed_tokens_are_not_matched() -> None:
    scheduler = Scheduler(CONFIG, size=SIZE)
    prompt = array("q", range(40))
    scheduler.finish(scheduler.prefill(prompt)[0])
    scheduler.drop_waiting(scheduler.admit(prompt))
    scheduler.flush()
    assert scheduler.admit(prompt).prefix_len == 0


def test_what_is_matched_is_evicted_last() -> None:
    scheduler = Scheduler(CONFIG, size=SIZE)
    for start in (0, 100):
        scheduler.finish(scheduler.prefill(range(start, start + 40))[0])
    longer = [[*range(start, start + 40), *[999] * CONFIG.window] for start in (0, 100)]
    scheduler.drop_waiting(scheduler.admit(longer[0]))
    assert scheduler.evict(1) == 40
    assert [scheduler.admit(prompt).prefix_len for prompt in longer] == [40, 0]


def test_an_answer_is_evicted_without_its_prompt() -> None:
    """Also that of a request which ends before its prompt is in the tree."""
    scheduler = Scheduler(CONFIG, size=SIZE)
    req = scheduler.admit(range(40))
    scheduler.extend([req])
    for token in range(8):
        scheduler.decode([req], [9000 + token])
    scheduler.finish(req)
    assert scheduler.evict(1) == 8
    assert scheduler.admit([*range(40), *[999] * CONFIG.window]).prefix_len == 40
