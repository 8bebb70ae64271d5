"""Ownership of pattern tables by the radix tree, driven through SGLang's own request life cycle."""

from __future__ import annotations

from collections.abc import Iterator

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
from sglang.srt.runtime_context import get_context

from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.requests import ATTRIBUTE, RequestTables
from patternkv_sgl.segments import build_segments
from patternkv_sgl.tables import ZERO_TABLE, TableRuns
from tests.fakes import Scheduler

MINE = 16
CONFIG = PatternKVConfig(patterns=4, sinks=2, window=4, mine_tokens=MINE, check=True)
PAGE_SIZES = (1, 4, 16)


@pytest.fixture(scope="module", autouse=True)
def published() -> Iterator[None]:
    """SGLang's runtime context, which releasing a request reads."""
    with get_context().override_server_args():
        yield


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
        # Requests that still prefill, whose last chunk is not in the tree yet, and that decode.
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
            rows = {reader.req_pool_idx: row for row, reader in enumerate(batch.readers)}
            segments = build_segments(batch.readers)
            for (row, start, end, table), lo, hi in zip(
                segments.segments, segments.row_indptr, segments.row_indptr[1:], strict=False
            ):
                for reader in segments.rows[lo:hi]:
                    slots = self.scheduler.row(reqs[reader])[start:end]
                    assert torch.equal(slots, self.scheduler.row(reqs[rows[row]])[start:end])
                    assert (self.scheduler.slot_table[slots] == table).all()

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
