"""Ownership of pattern tables by the radix tree, driven through SGLang's own request life cycle."""

from __future__ import annotations

import gc
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.radix import TAIL_TOKENS
from patternkv_sgl.requests import ATTRIBUTE, RequestTables
from patternkv_sgl.tables import ZERO_TABLE, TableRuns
from tests.fakes import Scheduler

MINE = 16
CONFIG = PatternKVConfig(patterns=4, sinks=2, window=4, mine_tokens=MINE, check=True)
PAGE_SIZES = (1, 4, 16)


pytestmark = pytest.mark.usefixtures("published")


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def state_of(req: Req) -> RequestTables:
    state = getattr(req, ATTRIBUTE)
    assert isinstance(state, RequestTables)
    return state


def tables_of(runs: TableRuns, length: int) -> list[int]:
    """The table of each position."""
    return [table for lo, hi, table in runs.spans(0, length) for _ in range(lo, hi)]


def check(scheduler: Scheduler) -> None:
    """The laws that hold after every step of a scheduler."""
    scheduler.tree.check_integrity(scheduler.slot_table)
    page_size, allocator = scheduler.pool.page_size, scheduler.allocator
    owned = torch.zeros(scheduler.pool.size // page_size + 1, dtype=torch.int64)
    owned[allocator.get_all_free_pages()] += 1
    for node in scheduler.tree.nodes():
        owned[node.value[::page_size] // page_size] += 1
    for req in scheduler.running:
        if not req.kv.holds_kv:
            continue
        row = scheduler.row(req)
        owned[row[req.kv.cache_protected_len :: page_size] // page_size] += 1
        named = tables_of(state_of(req).runs, len(row))
        assert named == scheduler.slot_table[row].tolist(), (req.rid, state_of(req).runs)
    # Page 0 is padding; every other one is free, a node's, or one request's.
    assert owned[1:].eq(1).all(), f"owners of each page: {owned.tolist()}"
    assert scheduler.refs.live <= scheduler.refs.num_tables - 1
    assert len(scheduler.tree.requests) == sum(req.kv.holds_kv for req in scheduler.running)


# Random life cycles


class LifeCycles(RuleBasedStateMachine):
    """Random sequences of what a scheduler does, with few slots, rows and tables.

    ``written`` holds a fingerprint of the text up to each slot's token and the content version of
    the table it was quantized with, both at the time of writing. No later step may change either
    while somebody holds the slot.
    """

    page_size = 1

    @initialize(num_tables=st.integers(2, 6))
    def start(self, num_tables: int) -> None:
        # Room for about four of the longer prompts.
        self.scheduler = Scheduler(
            CONFIG, size=384, page_size=self.page_size, num_tables=num_tables, num_rows=6
        )
        self.text_of = np.zeros(384 + self.page_size, dtype=np.int64)
        self.version_of = np.zeros(384 + self.page_size, dtype=np.int64)
        self.table_version = np.zeros(num_tables, dtype=np.int64)
        self.mined = 0
        # Requests with tokens left to prefill, and those whose last chunk is not in the tree yet.
        self.prefilling: list[Req] = []
        self.unpublished: list[Req] = []

    @property
    def decoding(self) -> list[Req]:
        return [req for req in self.scheduler.running if req not in self.prefilling]

    @staticmethod
    def fingerprints(req: Req) -> np.ndarray:
        """int64 [seq_len]: depends on every token up to each position."""
        text, out = 7, []
        for token in [*req.origin_input_ids, *req.output_ids]:
            text = (text * 1_000_003 + token + 1) % (1 << 61)
            out.append(text)
        return np.array(out, dtype=np.int64)

    def record(self, req: Req, start: int) -> None:
        slots = self.scheduler.row(req)[start:].numpy()
        self.text_of[slots] = self.fingerprints(req)[start : start + len(slots)]
        self.version_of[slots] = self.table_version[self.scheduler.slot_table[slots].numpy()]

    def extend(self, reqs: list[Req], lengths: list[int]) -> bool:
        extends = self.scheduler.extend(reqs, lengths)
        for extend in extends:
            if extend.mine:
                self.mined += 1
                self.table_version[extend.table] = self.mined
        for req, extend in zip(reqs, extends, strict=False):
            self.record(req, extend.prefix_len)
            self.unpublished.append(req)
            done = req.extend_end == len(req.full_untruncated_fill_ids)
            if done and req in self.prefilling:
                self.prefilling.remove(req)
        return bool(extends)

    def publish(self, req: Req) -> None:
        if req in self.unpublished:
            self.unpublished.remove(req)
            self.scheduler.checkpoint(req)

    def forget(self, req: Req) -> None:
        for group in (self.prefilling, self.unpublished):
            if req in group:
                group.remove(req)

    @rule(
        base=st.integers(0, 1),
        cuts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
        tail=st.integers(1, 24),
        branch=st.integers(0, 2),
        chunk=st.sampled_from([5, 16, 40, 200]),
    )
    def admit(self, base: int, cuts: list[int], tail: int, branch: int, chunk: int) -> None:
        """One batch of prompts that share a prefix; equal cuts make equal prompts."""
        reqs = []
        for cut in cuts:
            prompt = tokens(1000 * base, cut) + tokens(5000 + 100 * branch, tail)
            reqs.append(self.scheduler.admit(prompt))
        self.prefilling += reqs
        if not self.extend(reqs, [chunk] * len(reqs)):
            for req in reqs:
                self.prefilling.remove(req)
                self.scheduler.drop_waiting(req)

    @precondition(lambda self: self.unpublished)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        self.publish(data.draw(st.sampled_from(self.unpublished)))

    @precondition(lambda self: self.prefilling)
    @rule(chunk=st.integers(1, 70))
    def next_chunks(self, chunk: int) -> None:
        for req in self.prefilling:
            self.publish(req)
        self.extend(list(self.prefilling), [chunk] * len(self.prefilling))

    @precondition(lambda self: self.decoding)
    @rule(steps=st.integers(1, 6), same=st.booleans())
    def decode(self, steps: int, same: bool) -> None:
        """Also before the prompt is in the tree, as with overlapped scheduling."""
        for step in range(steps):
            reqs = self.decoding
            sampled = [9000 + step if same else 9000 + 10 * req.kv.req_pool_idx for req in reqs]
            batch = self.scheduler.decode(reqs, sampled)
            if batch is None:
                return
            for req in reqs:
                self.record(req, req.kv.kv_allocated_len - 1)
            rows = {req.kv.req_pool_idx: row for row, req in enumerate(reqs)}
            segments, read = batch.segments, [0] * len(reqs)
            for (row, start, end, table), lo, hi in zip(
                segments.segments.tolist(),
                segments.row_indptr,
                segments.row_indptr[1:],
                strict=False,
            ):
                for reader in segments.rows[lo:hi]:
                    slots = self.scheduler.row(reqs[reader])[start:end]
                    assert torch.equal(slots, self.scheduler.row(reqs[rows[row]])[start:end])
                    assert (self.scheduler.slot_table[slots] == table).all()
                    read[reader] += end - start
            assert read == batch.window_starts.tolist()

    @precondition(lambda self: self.decoding)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        req = data.draw(st.sampled_from(self.decoding))
        self.publish(req)
        self.forget(req)
        self.scheduler.finish(req)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data(), again=st.booleans())
    def retract(self, data: st.DataObject, again: bool) -> None:
        """Retraction, or an abort when the request does not come back."""
        req = data.draw(st.sampled_from(self.scheduler.running))
        self.forget(req)
        self.scheduler.retract(req)
        if again:
            self.scheduler.readmit(req)
            self.prefilling.append(req)
            if not self.extend([req], [200]):
                self.prefilling.remove(req)
                self.scheduler.drop_waiting(req)

    @rule(num_tokens=st.integers(1, 120))
    def evict(self, num_tokens: int) -> None:
        self.scheduler.evict(num_tokens)

    @precondition(lambda self: not self.scheduler.running)
    @rule()
    def flush(self) -> None:
        self.scheduler.flush()
        assert self.scheduler.refs.live == 0
        assert self.scheduler.allocator.available_size() == 384

    @invariant()
    def laws(self) -> None:
        scheduler = self.scheduler
        check(scheduler)
        held = [(req, scheduler.row(req)) for req in scheduler.running if req.kv.holds_kv]
        for req, row in held:
            text = self.fingerprints(req)[: len(row)]
            np.testing.assert_array_equal(self.text_of[row], text, err_msg=req.rid)
        nodes = [node.value for node in scheduler.tree.nodes()]
        slots = torch.cat([torch.zeros(1, dtype=torch.int64), *nodes, *(row for _, row in held)])
        np.testing.assert_array_equal(
            self.version_of[slots],
            self.table_version[scheduler.slot_table[slots].numpy()],
            err_msg="a table was mined again while slots still used it",
        )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_life_cycles(page_size: int) -> None:
    machine = type("Machine", (LifeCycles,), {"page_size": page_size})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Single laws


@pytest.fixture(params=PAGE_SIZES)
def scheduler(request: pytest.FixtureRequest) -> Iterator[Scheduler]:
    """A scheduler whose laws are checked once more at the end of the test."""
    scheduler = Scheduler(CONFIG, size=512, page_size=request.param)
    yield scheduler
    check(scheduler)


def test_a_long_prefill_mines_and_a_short_one_inherits(scheduler: Scheduler) -> None:
    (first,) = scheduler.prefill(tokens(0, 64))
    table = state_of(first).runs.last
    assert table != ZERO_TABLE
    assert state_of(first).runs == ((0, table),)
    short = scheduler.admit(tokens(0, 64) + tokens(100, MINE - 1))
    (extend,) = scheduler.extend([short])
    assert (extend.prefix_len, extend.num_tokens) == (64, MINE - 1)
    assert (extend.table, extend.mine) == (table, False)
    long = scheduler.admit(tokens(0, 64) + tokens(200, MINE))
    (extend,) = scheduler.extend([long])
    assert extend.mine and extend.table not in (ZERO_TABLE, table)
    assert state_of(long).runs == ((0, table), (64, extend.table))
    scheduler.checkpoint(long)
    below = scheduler.admit(tokens(0, 64) + tokens(200, MINE) + [1])
    (inherited,) = scheduler.extend([below])
    assert (inherited.prefix_len, inherited.table) == (64 + MINE, extend.table)
    stats = scheduler.stats
    assert (stats.mined, stats.inherited, stats.exhausted) == (2, 2, 0)


def test_short_prompts_inherit_the_zero_table_until_one_mines(scheduler: Scheduler) -> None:
    early = scheduler.admit(tokens(0, MINE - 1))
    assert scheduler.extend([early])[0].table == ZERO_TABLE
    (first,) = scheduler.prefill(tokens(100, 40))
    late = scheduler.admit(tokens(200, MINE - 1))
    assert scheduler.extend([late])[0].table == state_of(first).runs.last
    assert state_of(early).runs == ((0, ZERO_TABLE),)


def test_a_one_token_prompt(scheduler: Scheduler) -> None:
    (req,) = scheduler.prefill([7])
    assert state_of(req).runs == ((0, ZERO_TABLE),)
    scheduler.finish(req)
    (again,) = scheduler.prefill([7])
    assert again.kv.kv_allocated_len == 1


def test_split_copies_references(scheduler: Scheduler) -> None:
    (first,) = scheduler.prefill(tokens(0, 64))
    table, version = state_of(first).runs.last, scheduler.tree.version
    scheduler.finish(first)
    assert scheduler.refs.refs[table] == 2  # the node and the root
    other = scheduler.admit([*tokens(0, 32), 999])
    assert [len(node.key) for _, _, node in scheduler.tree.path(other.last_node)] == [32]
    assert scheduler.refs.refs[table] == 3
    assert scheduler.tree.version > version
    for node in scheduler.tree.nodes():
        assert node.table_runs == ((0, table),)
        assert len(node.key) == 32
    assert scheduler.extend([other])[0].table == table
    assert scheduler.refs.refs[table] == 4


def test_split_between_two_tables_of_a_node(scheduler: Scheduler) -> None:
    req = scheduler.admit(tokens(0, 64))
    (first,) = scheduler.extend([req], [32])
    scheduler.checkpoint(req)
    (second,) = scheduler.extend([req], [32])
    scheduler.checkpoint(req)
    for token in range(32):
        scheduler.decode([req], [3000 + token])
    scheduler.finish(req)
    assert first.mine and second.mine
    assert not hasattr(req, ATTRIBUTE)
    paths = [scheduler.admit([*tokens(0, cut), 999]) for cut in (16, 48)]
    runs = [scheduler.tree.path(each.last_node)[-1][2].table_runs for each in paths]
    assert runs == [((0, first.table),), ((0, second.table),)]
    for each in paths:
        scheduler.drop_waiting(each)


def test_flush_drops_every_table_and_the_root_inherits_zero_again(scheduler: Scheduler) -> None:
    for start in (0, 100, 200):
        (req,) = scheduler.prefill(tokens(start, 48))
        scheduler.finish(req)
    assert scheduler.refs.live == 3
    assert scheduler.tree.root_table != ZERO_TABLE
    scheduler.flush()
    assert scheduler.refs.live == 0
    assert scheduler.tree.root_table == ZERO_TABLE
    assert scheduler.refs.refs == {ZERO_TABLE: 1}
    assert not list(scheduler.tree.nodes())
    assert scheduler.extend([scheduler.admit(tokens(0, MINE - 1))])[0].table == ZERO_TABLE


def test_flush_lets_go_of_the_memory_of_nodes(scheduler: Scheduler) -> None:
    prompt = tokens(0, 2 * MINE)
    for req in scheduler.prefill(prompt, prompt[:MINE] + tokens(900, MINE)):
        scheduler.finish(req)
    values = [weakref.ref(node.value) for node in scheduler.tree.nodes()]
    del req
    gc.disable()
    try:
        scheduler.flush()
        assert [value() for value in values] == [None] * 3
    finally:
        gc.enable()


def test_eviction_frees_the_tables_of_evicted_nodes_only(scheduler: Scheduler) -> None:
    (kept,) = scheduler.prefill(tokens(0, 48))
    (root,) = state_of(kept).runs.tables
    (gone,) = scheduler.prefill(tokens(100, 48))
    (table,) = state_of(gone).runs.tables
    scheduler.finish(gone)
    assert scheduler.evict(1000) == 48
    assert table not in scheduler.refs.refs
    assert scheduler.refs.refs[root] == 3  # the root, the node, the request


def test_equal_prompts_of_a_batch_mine_once(scheduler: Scheduler) -> None:
    reqs = [scheduler.admit(tokens(0, 48)) for _ in range(3)]
    extends = scheduler.extend(reqs)
    assert [extend.mine for extend in extends] == [True, False, False]
    assert len({extend.table for extend in extends}) == 1
    assert (scheduler.stats.mined, scheduler.stats.inherited) == (1, 2)
    for req in reqs:
        scheduler.checkpoint(req)
        check(scheduler)
    assert len(list(scheduler.tree.nodes())) == 1
    rows = [scheduler.row(req).tolist() for req in reqs]
    assert rows[0] == rows[1] == rows[2]


def test_prompts_that_are_not_equal_mine_each_their_own() -> None:
    scheduler = Scheduler(CONFIG, size=512)
    reqs = [scheduler.admit(tokens(0, 48) + tokens(last, 1)) for last in (100, 200)]
    first, second = scheduler.extend(reqs)
    assert first.mine and second.mine and first.table != second.table


def test_equal_prompts_of_two_namespaces_mine_each_their_own() -> None:
    scheduler = Scheduler(CONFIG, size=512)
    first, second = scheduler.extend([scheduler.admit(tokens(0, 48), key) for key in "ab"])
    assert first.mine and second.mine and first.table != second.table


def test_the_root_takes_its_first_table_from_a_short_prompt_and_a_better_one_later() -> None:
    scheduler = Scheduler(replace(CONFIG, mine_tokens=64), size=512)
    (tiny,) = scheduler.extend([scheduler.admit(tokens(0, 15))])
    assert not tiny.mine and scheduler.tree.root_table == ZERO_TABLE
    first, second = scheduler.extend([scheduler.admit(tokens(s, 20)) for s in (100, 200)])
    assert first.mine and scheduler.tree.root_table == first.table
    assert not second.mine and second.table == first.table
    (long,) = scheduler.extend([scheduler.admit(tokens(300, 64))])
    assert long.mine and scheduler.tree.root_table == long.table
    (longer,) = scheduler.extend([scheduler.admit(tokens(400, 70))])
    assert longer.mine and scheduler.tree.root_table == long.table
    check(scheduler)


def test_the_root_keeps_its_table_where_fewer_tokens_mine() -> None:
    scheduler = Scheduler(replace(CONFIG, mine_tokens=64), size=512)
    scheduler.prefill(tokens(0, 15))
    (root,) = scheduler.extend([scheduler.admit(tokens(100, 40))])
    (below,) = scheduler.extend([scheduler.admit(tokens(0, 15) + tokens(200, 20))])
    assert (below.prefix_len, below.mine) == (15, True)
    assert scheduler.tree.root_table == root.table


def test_prompts_that_differ_at_the_start_mine_each_their_own(scheduler: Scheduler) -> None:
    reqs = [scheduler.admit([start, *tokens(1, 40)]) for start in (500, 600)]
    first, second = scheduler.extend(reqs)
    assert first.mine and second.mine and first.table != second.table


def test_exhaustion_inherits_and_never_takes_a_live_table(scheduler: Scheduler) -> None:
    reqs = [scheduler.admit(tokens(100 * i, 32)) for i in range(8)]
    extends = scheduler.extend(reqs)
    assert [extend.mine for extend in extends] == [True] * 7 + [False]
    assert extends[7].table == scheduler.tree.root_table == extends[0].table
    assert len({extend.table for extend in extends}) == 7
    assert (scheduler.stats.mined, scheduler.stats.exhausted) == (7, 1)
    for req in reqs:
        scheduler.checkpoint(req)
    scheduler.finish(reqs[3])
    scheduler.evict(32)
    (extend,) = scheduler.extend([scheduler.admit(tokens(900, 32))])
    assert extend.mine and extend.table == extends[3].table


def test_a_later_prompt_is_bound_to_the_slots_and_tables_of_an_earlier_one(
    scheduler: Scheduler,
) -> None:
    first, second = scheduler.admit(tokens(0, 48)), scheduler.admit(tokens(0, 48))
    (a,), (b,) = scheduler.extend([first]), scheduler.extend([second])
    assert a.mine and b.mine and a.table != b.table
    scheduler.decode([first, second], [901, 902])
    scheduler.checkpoint(first)
    scheduler.checkpoint(second)
    assert scheduler.row(first)[:48].tolist() == scheduler.row(second)[:48].tolist()
    # The decoded token came before the re-binding, with the request's own table.
    assert state_of(second).runs == ((0, a.table), (48, b.table))
    check(scheduler)
    scheduler.finish(second)
    assert b.table in scheduler.refs.refs or scheduler.pool.page_size > 1


def test_who_is_bound_to_the_slots_of_another_reads_with_their_tables() -> None:
    scheduler = Scheduler(CONFIG, size=512)
    reqs = [scheduler.admit(tokens(0, 48)) for _ in range(2)]
    for req in reqs:
        scheduler.extend([req])
    scheduler.decode(reqs, [901, 902])
    for req in reqs:
        scheduler.checkpoint(req)
    batch = scheduler.decode(reqs, [903, 904])
    assert batch is not None
    for row, start, end, table in batch.segments.segments.tolist():
        slots = scheduler.rows.req_to_token[row, start:end].long()
        assert (scheduler.slot_table[slots] == table).all()


def test_tokens_decoded_after_an_unaligned_prompt(scheduler: Scheduler) -> None:
    """The partial page stays with the request, in slots that only the finish puts in the tree."""
    (req,) = scheduler.prefill(tokens(0, 37))
    for token in range(30):
        scheduler.decode([req], [700 + token])
    table = state_of(req).runs.last
    scheduler.finish(req)
    held = sum(len(node.key) for node in scheduler.tree.nodes())
    assert held == 67 // scheduler.pool.page_size * scheduler.pool.page_size
    assert all(node.table_runs == ((0, table),) for node in scheduler.tree.nodes())


def test_a_retracted_request_comes_back_to_its_own_prefix(scheduler: Scheduler) -> None:
    (req,) = scheduler.prefill(tokens(0, 48))
    for token in range(8):
        scheduler.decode([req], [700 + token])
    table = state_of(req).runs.last
    scheduler.retract(req)
    assert not hasattr(req, ATTRIBUTE)
    check(scheduler)
    scheduler.readmit(req)
    (extend,) = scheduler.extend([req])
    assert (extend.prefix_len, extend.num_tokens, extend.mine) == (48, 8, False)
    assert state_of(req).runs == ((0, table),)


def test_who_decodes_in_a_mixed_batch_keeps_tables_and_window(scheduler: Scheduler) -> None:
    (req,) = scheduler.prefill(tokens(0, 40))
    for step in range(3):
        scheduler.decode([req], [700 + step])
    runs = state_of(req).runs
    req.refresh_fill_ids()
    (extend,) = scheduler.tree.begin_extends([req], [42], [1])
    assert (extend.table, extend.mine) == (runs.last, False)
    assert (state_of(req).runs, state_of(req).window_start) == (runs, 40)


@pytest.mark.parametrize(
    ("chunks", "start"), [((32, 32), 64), ((32, 8), 40 - CONFIG.window), ((32, 3), 32)]
)
def test_the_window_of_a_chunked_prompt_begins_where_its_last_tokens_are_exact(
    scheduler: Scheduler, chunks: tuple[int, ...], start: int
) -> None:
    req = scheduler.admit(tokens(0, sum(chunks)))
    for length in chunks:
        (extend,) = scheduler.extend([req], [length])
        scheduler.checkpoint(req)
    assert state_of(req).window_start == start == sum(chunks) - extend.num_exact


@pytest.mark.parametrize("question", [1, 3, 4, 7])
def test_the_end_of_a_question_about_a_stored_context_is_prefilled_by_everyone(
    scheduler: Scheduler, question: int
) -> None:
    """By its first request and by those that find it in the tree, which read the same exactly."""
    scheduler.prefill(tokens(0, 48))
    prompt = tokens(0, 48) + tokens(100, question)
    exact = set()
    for _ in range(3):
        req = scheduler.admit(prompt)
        (extend,) = scheduler.extend([req])
        scheduler.checkpoint(req)
        assert not extend.mine
        assert state_of(req).window_start == len(prompt) - extend.num_exact
        exact.add(extend.num_exact)
    assert len(exact) == 1
    assert min(question, CONFIG.window) <= exact.pop() <= CONFIG.window


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_question_that_begins_like_one_stored_with_the_context_is_read_exactly(
    page_size: int,
) -> None:
    """Only the prompt that mined the table shares all of itself."""
    config = replace(CONFIG, window=2 * TAIL_TOKENS, mine_tokens=32)
    scheduler = Scheduler(config, size=512, page_size=page_size)
    context, begin = tokens(0, 44), [500, 501, 502, 503, 504]
    prompts = [context + begin + tokens(start, 7) for start in (600, 700)]
    (first,) = scheduler.prefill(prompts[0])
    for _ in range(2):
        other = scheduler.admit(prompts[1])
        (extend,) = scheduler.extend([other])
        scheduler.checkpoint(other)
        assert (extend.prefix_len, extend.num_exact, extend.mine) == (40, TAIL_TOKENS, False)
        # What both have is stored once.
        assert torch.equal(scheduler.row(other)[:48], scheduler.row(first)[:48])
    assert scheduler.admit(prompts[0]).prefix_len == 55 // page_size * page_size
    check(scheduler)


def test_a_prompt_that_mined_its_table_is_matched_but_for_its_last_token(
    scheduler: Scheduler,
) -> None:
    page = scheduler.pool.page_size
    equals = [scheduler.admit(tokens(0, 48)) for _ in range(2)]
    for extend in scheduler.extend(equals):
        assert extend.num_exact == 0
    for req in equals:
        scheduler.checkpoint(req)
        assert state_of(req).window_start == 48
    assert scheduler.admit(tokens(0, 48)).prefix_len == 47 // page * page


def test_the_last_token_of_a_stored_prompt_is_a_branchs_own_until_it_ends() -> None:
    scheduler = Scheduler(CONFIG)
    (first,) = scheduler.prefill(tokens(0, 40))
    free = scheduler.allocator.available_size()
    branches = [scheduler.admit(tokens(0, 40)) for _ in range(2)]
    assert [extend.num_tokens for extend in scheduler.extend(branches)] == [1, 1]
    for branch in branches:
        node = branch.last_node
        scheduler.checkpoint(branch)
        assert branch.last_node is node and branch.kv.cache_protected_len == 39
    check(scheduler)
    assert scheduler.tree.total_size() == 40
    assert scheduler.allocator.available_size() == free - 2
    scheduler.decode(branches, [7, 8])
    for branch in branches:
        scheduler.finish(branch)
        check(scheduler)
    # The tree has the token once, and an answer behind it for each of them.
    assert scheduler.tree.total_size() == 42
    assert scheduler.allocator.available_size() == free - 2
    scheduler.finish(first)


def test_keys_of_different_namespaces_share_no_node(scheduler: Scheduler) -> None:
    reqs = [scheduler.admit(tokens(0, 48), extra_key=key) for key in ("a", "b", "a")]
    for req in reqs:
        scheduler.extend([req])
        scheduler.checkpoint(req)
    rows = [scheduler.row(req).tolist() for req in reqs]
    assert rows[0] == rows[2] and not set(rows[0]) & set(rows[1])


def test_a_disabled_tree_still_gives_every_request_a_table() -> None:
    scheduler = Scheduler(CONFIG, size=512, disable=True)
    (req,) = scheduler.prefill(tokens(0, 40))
    (extend,) = scheduler.extend([scheduler.admit(tokens(0, 40))])
    assert extend.mine and extend.prefix_len == 0
    assert state_of(req).runs.last != extend.table
    batch = scheduler.decode([req], [5])
    assert batch is not None and batch.tables == [state_of(req).runs.last]
    scheduler.finish(req)
    assert scheduler.refs.live == 2  # the root's and the running request's
    assert not list(scheduler.tree.nodes())


# The check itself


@pytest.fixture
def busy() -> tuple[Scheduler, int]:
    """A finished prompt in the tree, a running one, and the first one's table."""
    scheduler = Scheduler(CONFIG, size=512)
    (done,) = scheduler.prefill(tokens(0, 48))
    table = state_of(done).runs.last
    scheduler.finish(done)
    scheduler.prefill(tokens(100, 48))
    scheduler.tree.check_integrity(scheduler.slot_table)
    return scheduler, table


def node_with(scheduler: Scheduler, table: int) -> TreeNode:
    return next(node for node in scheduler.tree.nodes() if table in node.table_runs.tables)


def test_check_finds_a_slot_of_another_table(busy: tuple[Scheduler, int]) -> None:
    scheduler, table = busy
    node = node_with(scheduler, table)
    scheduler.slot_table[node.value[5]] = 6
    with pytest.raises(AssertionError) as error:
        scheduler.tree.check_integrity(scheduler.slot_table)
    assert f"node {node.id} names table {table} for tokens [0, 48)" in str(error.value)
    assert f"quantized with [{table}, 6]" in str(error.value)
    scheduler.tree.check_integrity()


def test_check_finds_a_node_without_tables(busy: tuple[Scheduler, int]) -> None:
    scheduler, table = busy
    node = node_with(scheduler, table)
    node.table_runs = TableRuns()
    with pytest.raises(AssertionError, match=rf"node {node.id} of 48 tokens has tables \(\)"):
        scheduler.tree.check_integrity()


def test_check_finds_a_node_whose_runs_start_late(busy: tuple[Scheduler, int]) -> None:
    scheduler, table = busy
    node = node_with(scheduler, table)
    node.table_runs = TableRuns([(3, table)])
    with pytest.raises(AssertionError, match=rf"has tables \(\(3, {table}\),\)"):
        scheduler.tree.check_integrity()


def test_check_finds_a_node_that_names_a_table_it_does_not_own(
    busy: tuple[Scheduler, int],
) -> None:
    scheduler, table = busy
    node_with(scheduler, table).table_runs = TableRuns([(0, 5)])
    with pytest.raises(AssertionError, match=r"table references {.*} but owners {.*5: 1"):
        scheduler.tree.check_integrity()


@pytest.mark.parametrize("change", [1, -1])
def test_check_finds_a_wrong_count(busy: tuple[Scheduler, int], change: int) -> None:
    scheduler, table = busy
    count = scheduler.refs.refs[table]
    scheduler.refs.refs[table] += change
    with pytest.raises(AssertionError) as error:
        scheduler.tree.check_integrity()
    stated, owners = str(error.value).splitlines()[0].split(" but owners ")
    assert f"{table}: {count + change}" in stated
    assert f"{table}: {count}" in owners


def test_check_finds_a_lost_request(busy: tuple[Scheduler, int]) -> None:
    scheduler, _ = busy
    scheduler.tree.requests.clear()
    with pytest.raises(AssertionError, match="table references"):
        scheduler.tree.check_integrity()


def test_check_finds_a_leaked_table(busy: tuple[Scheduler, int]) -> None:
    scheduler, _ = busy
    leaked = scheduler.refs.allocate()
    with pytest.raises(AssertionError, match=rf"neither free nor owned: \[{leaked}\]"):
        scheduler.tree.check_integrity()


def test_the_check_switch_looks_at_every_release(busy: tuple[Scheduler, int]) -> None:
    scheduler, table = busy
    scheduler.slot_table[node_with(scheduler, table).value[0]] = 6
    with pytest.raises(AssertionError, match="quantized with"):
        scheduler.finish(scheduler.running[0])


def test_a_node_inserted_past_the_request_is_an_error() -> None:
    """Only checkpoint() knows the tables of what it inserts."""
    scheduler = Scheduler(CONFIG, size=64)
    key = RadixKey(array("q", [1, 2, 3]))
    with pytest.raises(AssertionError, match="a node of 3 tokens was inserted outside checkpoint"):
        scheduler.tree.insert(InsertParams(key=key, value=torch.tensor([1, 2, 3])))
