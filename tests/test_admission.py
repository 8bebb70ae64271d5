"""Which waiting requests sit out a prefill batch, over SGLang's own request and tree."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams

import patternkv_sgl.plugin as plugin
from patternkv_sgl.admission import Admission, branches_first
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.radix import AWAITED_TOKENS
from tests.fakes import Scheduler

CONFIG = PatternKVConfig(patterns=4, sinks=2, window=4, mine_tokens=16, check=True)
LONG = AWAITED_TOKENS + 20


pytestmark = pytest.mark.usefixtures("published")


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(CONFIG, size=4096)


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


class Batch:
    """What the hook sees of a batch that SGLang puts together."""

    def __init__(self, admission: Admission, *chunked: Req) -> None:
        self.can_run_list = list(chunked)
        self.preempt_list: list[Req] = []
        self._admission = admission

    def add(self, req: Req) -> bool:
        """Whether ``req`` gets in."""
        adder: Any = self
        if self._admission.holds(adder, req):
            return False
        self.can_run_list.append(req)
        return True


def test_one_of_several_equal_prompts_gets_in(scheduler: Scheduler) -> None:
    admission = Admission(scheduler.tree)
    first, second, third = (scheduler.admit(tokens(0, LONG)) for _ in range(3))
    batch = Batch(admission)
    assert [batch.add(req) for req in (first, second, third)] == [True, False, False]
    # While the forward runs the tokens are not in the tree.
    assert scheduler.extend([first])
    assert not Batch(admission).add(second)
    scheduler.checkpoint(first)
    batch = Batch(admission)
    for req in (second, third):
        scheduler.drop_waiting(req)
        scheduler.readmit(req)
        assert req.prefix_len == LONG - 1
        assert batch.add(req)
    assert all(state.prefilling is None for state in scheduler.tree.requests)


def test_prompts_that_differ_early_are_prefilled_together(scheduler: Scheduler) -> None:
    batch = Batch(Admission(scheduler.tree))
    for start in (0, 1):
        assert batch.add(scheduler.admit(tokens(start, LONG)))
    early = tokens(0, AWAITED_TOKENS - 1) + tokens(5000, 21)
    assert batch.add(scheduler.admit(early))
    late = tokens(0, AWAITED_TOKENS) + tokens(5000, 20)
    assert not batch.add(scheduler.admit(late))


def test_short_prompts_and_short_ends_are_not_worth_waiting_for(scheduler: Scheduler) -> None:
    batch = Batch(Admission(scheduler.tree))
    for _ in range(2):
        assert batch.add(scheduler.admit(tokens(0, AWAITED_TOKENS - 1)))
    scheduler.prefill(tokens(0, LONG))
    batch = Batch(Admission(scheduler.tree))
    for _ in range(2):
        assert batch.add(scheduler.admit(tokens(0, LONG) + tokens(7000, AWAITED_TOKENS - 1)))


def test_namespaces_wait_for_themselves_only(scheduler: Scheduler) -> None:
    batch = Batch(Admission(scheduler.tree))
    for key in ("a", "b"):
        assert batch.add(scheduler.admit(tokens(0, LONG), extra_key=key))
    assert not batch.add(scheduler.admit(tokens(0, LONG), extra_key="a"))


def test_who_waits_has_the_adapter_of_whom_it_waits_for(scheduler: Scheduler) -> None:
    batch, prompt = Batch(Admission(scheduler.tree)), array("q", tokens(0, LONG))
    params = SamplingParams(max_new_tokens=8)

    def gets_in(adapter: str | None) -> bool:
        return batch.add(scheduler.readmit(Req("r", "", prompt, params, lora_id=adapter)))

    assert [gets_in(adapter) for adapter in (None, "a", "b")] == [True] * 3
    assert [gets_in(adapter) for adapter in (None, "a", "b")] == [False] * 3


def test_a_chunked_prompt_is_waited_for_chunk_by_chunk(scheduler: Scheduler) -> None:
    admission = Admission(scheduler.tree)
    prompt = tokens(0, 100) + tokens(9000, LONG)
    first, second = (scheduler.admit(prompt) for _ in range(2))
    assert scheduler.extend([first], [100])
    assert not Batch(admission).add(second)
    scheduler.checkpoint(first)
    first.init_next_round_input()
    # The second now goes on from the first chunk, as the next chunk in this batch does.
    scheduler.drop_waiting(second)
    scheduler.readmit(second)
    assert second.prefix_len == 100
    assert not Batch(admission, first).add(second)


def test_nobody_waits_for_a_request_that_is_gone(scheduler: Scheduler) -> None:
    admission = Admission(scheduler.tree)
    first, second = (scheduler.admit(tokens(0, LONG)) for _ in range(2))
    assert scheduler.extend([first])
    scheduler.retract(first)
    assert Batch(admission).add(second)


def test_nobody_waits_for_a_request_of_an_earlier_batch_that_never_ran(
    scheduler: Scheduler,
) -> None:
    admission = Admission(scheduler.tree)
    first, second = (scheduler.admit(tokens(0, LONG)) for _ in range(2))
    batch = Batch(admission)
    assert [batch.add(req) for req in (first, second)] == [True, False]
    scheduler.drop_waiting(first)
    assert Batch(admission).add(second)


def test_a_disabled_tree_has_nothing_to_wait_for() -> None:
    scheduler = Scheduler(CONFIG, size=4096, disable=True)
    batch = Batch(Admission(scheduler.tree))
    for _ in range(2):
        assert batch.add(scheduler.admit(tokens(0, LONG)))


@pytest.mark.parametrize(("start", "gets_in"), [(-1, False), (0, True), (AWAITED_TOKENS, False)])
def test_who_wants_logprobs_of_the_prompt_waits_for_nobody(
    scheduler: Scheduler, start: int, gets_in: bool
) -> None:
    batch = Batch(Admission(scheduler.tree))
    first, second = (scheduler.admit(tokens(0, LONG)) for _ in range(2))
    assert batch.add(first)
    second.return_logprob, second.logprob_start_len = True, start
    assert batch.add(second) == gets_in


def test_who_brings_embeddings_waits_for_nobody(scheduler: Scheduler) -> None:
    batch = Batch(Admission(scheduler.tree))
    first, second = (scheduler.admit(tokens(0, LONG)) for _ in range(2))
    assert batch.add(first)
    second.positional_embed_overrides = object()
    assert batch.add(second)


def test_nobody_waits_for_tokens_that_stay_out_of_the_tree(scheduler: Scheduler) -> None:
    admission = Admission(scheduler.tree)
    first, second = (scheduler.admit(tokens(0, LONG)) for _ in range(2))
    first.skip_radix_cache_insert = True
    assert scheduler.extend([first])
    scheduler.checkpoint(first)
    assert Batch(admission).add(second)


def test_who_has_taken_the_rows_of_others_waits_for_nobody(scheduler: Scheduler) -> None:
    batch = Batch(Admission(scheduler.tree))
    first, second = (scheduler.admit(tokens(0, LONG)) for _ in range(2))
    assert batch.add(first)
    batch.preempt_list.append(scheduler.admit(tokens(7, 9)))
    assert batch.add(second)


def waiting(name: str, n: int, max_new_tokens: int, prompt: list[int] | None = None) -> Req:
    params = SamplingParams(n=n, max_new_tokens=max_new_tokens)
    return Req(name, "", array("q", prompt or [1]), params)


def test_branches_come_before_prompts_that_came_before_them() -> None:
    queue = [
        waiting("prompt 2", 8, 0),
        waiting("single 1", 1, 16),
        waiting("prompt 3", 2, 0),
        waiting("branch 1a", 4, 16),
        waiting("single 2", 1, 0),
        waiting("branch 1b", 4, 1),
    ]
    branches_first(queue)
    order = "branch 1a, branch 1b, prompt 2, single 1, prompt 3, single 2"
    assert ", ".join(req.rid for req in queue) == order


@pytest.mark.parametrize(
    ("policy", "priorities", "disable", "replicas", "ordered"),
    [
        ("fcfs", False, False, 1, True),
        ("fcfs", True, False, 1, False),
        ("lof", False, False, 1, False),
        ("fcfs", False, True, 1, False),
        ("fcfs", False, False, 2, False),
    ],
)
def test_only_first_come_first_served_is_reordered(
    policy: str,
    priorities: bool,
    disable: bool,
    replicas: int,
    ordered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = Scheduler(CONFIG, disable=disable).tree
    monkeypatch.setattr(plugin, "_cache", SimpleNamespace(tree=tree))
    queue = [waiting("prompt", 2, 0), waiting("branch", 2, 8)]
    before = list(queue)
    chosen = SimpleNamespace(
        policy=CacheAgnosticPolicy(policy), enable_priority_scheduling=priorities
    )
    with get_context().override_server_args(dp_size=replicas):
        plugin._order_queue(chosen, queue, None, processed_tokens=0)
    assert queue == (before[::-1] if ordered else before)


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_prefill_ahead_of_branches_is_done_where_the_tree_has_its_prompt(
    page_size: int,
) -> None:
    scheduler = Scheduler(CONFIG, size=4096, page_size=page_size)
    admission = Admission(scheduler.tree)
    prompt = tokens(0, LONG)
    req = waiting("prompt", 8, 0, prompt)
    assert not admission.is_done(req)
    (first,) = scheduler.prefill(prompt)
    assert admission.is_done(req)
    scheduler.finish(first)
    assert admission.is_done(req)
    assert admission.is_done(waiting("its beginning", 2, 0, prompt[: 2 * page_size + 1]))
    assert admission.is_done(waiting("few tokens", 8, 0, prompt[:15])) == (page_size == 1)
    assert not admission.is_done(waiting("longer", 8, 0, prompt + [7] * page_size))
    assert not admission.is_done(waiting("other", 8, 0, tokens(1, LONG)))
    assert not admission.is_done(waiting("nobody waits for it", 1, 0, prompt))
    assert not admission.is_done(waiting("a branch", 8, 1, prompt))
    scheduler.evict(LONG)
    assert not admission.is_done(req)


def test_the_prefill_of_a_prompt_is_done_where_another_ones_table_holds_its_end(
    scheduler: Scheduler,
) -> None:
    context, question = tokens(0, LONG), tokens(5000, 7)
    scheduler.prefill(context)
    req = waiting("prompt", 8, 0, context + question)
    assert not Admission(scheduler.tree).is_done(req)
    scheduler.prefill(context + question)
    assert Admission(scheduler.tree).is_done(req)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("to_finish", FINISH_ABORT("no")),
        ("return_logprob", True),
        ("return_hidden_states", "last"),
        ("return_sampling_mask", True),
        ("session", object()),
        ("input_embeds", []),
        ("positional_embed_overrides", object()),
        ("multimodal_inputs", object()),
    ],
)
def test_what_more_is_asked_of_a_prefill_takes_a_forward(
    scheduler: Scheduler, name: str, value: object
) -> None:
    prompt = tokens(0, LONG)
    scheduler.prefill(prompt)
    req = waiting("prompt", 8, 0, prompt)
    assert Admission(scheduler.tree).is_done(req)
    setattr(req, name, value)
    assert not Admission(scheduler.tree).is_done(req)


@pytest.mark.parametrize("others", [0, 1])
def test_a_done_prefill_is_answered_unless_others_wait(
    scheduler: Scheduler, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokens(0, LONG)
    scheduler.prefill(prompt)
    monkeypatch.setattr(plugin, "_cache", SimpleNamespace(admission=Admission(scheduler.tree)))
    answered: list[Req] = []
    host: Any = SimpleNamespace(
        waiting_queue=[waiting("other", 1, 8)] * others,
        output_streamer=SimpleNamespace(stream_output=lambda reqs, _: answered.extend(reqs)),
    )
    queued: list[Req] = []
    req = waiting("prompt", 8, 0, prompt)
    plugin._enqueue(lambda self, req, is_retracted: queued.append(req), host, req)
    assert (answered, queued) == (([], [req]) if others else ([req], []))
    assert req.finished() == (not others)
    if not others:
        assert (req.finished_len, req.cached_tokens, list(req.output_ids)) == (0, LONG, [])
