"""Which waiting requests are next: branches keep the place of the request that they are of, and sit
out while their prompt is being prefilled; a prompt that is stored has nothing to wait for."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import ref

from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from patternkv_sgl.radix import AWAITED_TOKENS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

    from patternkv_sgl.radix import PatternRadixCache


def branches_first(waiting: list[Req]) -> None:
    """Put branches ahead of other waiting requests, in place and otherwise in order.

    SGLang prefills the prompt of a request with ``n`` > 1 before it makes branches, which queue
    behind all requests that have come meanwhile: under load prompt after prompt is prefilled while
    no branch runs, and evicted again once branches do. As their own request was here first, nobody
    waits longer for branches than it would have waited for a request with one answer.
    """
    waiting.sort(key=lambda req: not _is_branch(req))


class Admission:
    """Lets one request prefill what several are about to.

    Tokens reach the tree once their forward is through. Until then stock's scheduler finds nothing
    of a prompt there and prefills it for every request that brings it: equal prompts sent together,
    or branches whose prompt was evicted while they waited. A request that sits out finds the tokens
    in the tree a round or two later.

    Args:
        tree: knows what is being prefilled.
    """

    def __init__(self, tree: PatternRadixCache) -> None:
        self._tree = tree
        self._adder: ref[PrefillAdder] | None = None
        self._num_seen = 0  # requests of that adder's batch
        self._taken: set[Hashable | None] = set()  # what they and running requests prefill

    def is_done(self, req: Req) -> bool:
        """Whether ``req`` is the prefill ahead of branches and all that it would leave is in the
        tree: the last answers to a prompt, or the search that expands it, have left it there.

        It would take a forward of its own for one token that nobody reads.
        """
        if self._tree.disable or not _is_prefetch(req):
            return False
        asks = (
            req.return_logprob,
            req.return_hidden_states,
            req.return_routed_experts,
            req.return_indexer_topk,
            req.return_sampling_mask,
        )
        # An error that must be told, and what ids alone do not tell.
        has = (
            req.to_finish,
            req.session,
            req.input_embeds,
            req.positional_embed_overrides,
            req.multimodal_inputs,
        )
        if any(asks) or any(part is not None for part in has):
            return False
        key = RadixKey(req.origin_input_ids, req.extra_key, cache_salt=req.cache_salt)
        length = len(key.page_aligned(self._tree.page_size))
        found = self._tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
        return found == length > 0

    def holds(self, adder: PrefillAdder, req: Req) -> bool:
        """Whether ``req``, whose prefix was just matched, sits out the batch of ``adder``.

        SGLang counts the LoRA adapter of ``req`` as one of the batch either way
        (managers/scheduler.py, ``running_loras``). It has been counted: requests at one node have
        one adapter, whose id ends their ``extra_key``.
        """
        if adder.preempt_list:
            return False  # running requests may have given up their rows for this one
        upcoming = self._tree.upcoming
        if self._adder is None or self._adder() is not adder:
            self._adder, self._num_seen = ref(adder), 0
            self._taken = {state.prefilling for state in self._tree.requests}
        batch = adder.can_run_list  # which may begin with the next chunk of a long prompt
        self._taken.update(upcoming(r, r.prefix_len) for r in batch[self._num_seen :])
        self._num_seen = len(batch)
        tokens = upcoming(req, req.prefix_len)
        if tokens is None or tokens not in self._taken:
            return False
        return _may_reuse(req, req.prefix_len + AWAITED_TOKENS)


def finish_prefetch(req: Req) -> None:
    """Make of ``req``, which `Admission.is_done` says is done, an answer without tokens."""
    req.finished_reason, req.finished_len = FINISH_LENGTH(length=0), 0
    req.cached_tokens = len(req.origin_input_ids)
    req.time_stats.set_wait_queue_entry_time()
    req.time_stats.set_quick_finish_time()


def _is_branch(req: Req) -> bool:
    """One of ``n`` answers."""
    params = req.sampling_params
    return bool(params.n > 1 and params.max_new_tokens > 0)


def _is_prefetch(req: Req) -> bool:
    """The prefill ahead of ``n`` branches, which generates nothing
    (managers/tokenizer_manager.py, ``_handle_batch_request``)."""
    params = req.sampling_params
    return bool(params.n > 1 and params.max_new_tokens == 0)


def _may_reuse(req: Req, end: int) -> bool:
    """Whether ``req`` takes its tokens up to ``end`` from the tree once they are there: not those
    whose logprobs it wants, and none with embeddings of its own (managers/schedule_batch.py,
    ``Req.init_next_round_input``)."""
    if req.positional_embed_overrides is not None:
        return False
    return not req.return_logprob or not 0 <= req.logprob_start_len < end
