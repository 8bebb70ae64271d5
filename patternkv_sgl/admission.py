"""Which waiting requests sit out a prefill batch: branches of a prompt that is being prefilled."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import ref

from patternkv_sgl.radix import SHARED_TOKENS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

    from patternkv_sgl.radix import PatternRadixCache


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
        self._chosen: set[Hashable] = set()  # what requests of that adder's batch prefill

    def holds(self, adder: PrefillAdder, req: Req) -> bool:
        """Whether ``req``, whose prefix was just matched, sits out the batch of ``adder``."""
        if self._adder is None or self._adder() is not adder:
            self._adder = ref(adder)
            # The next chunk of a long prompt is there before any waiting request.
            self._chosen = {self._tree.upcoming(r, r.prefix_len) for r in adder.can_run_list}
        key = self._tree.upcoming(req, req.prefix_len)
        if key is None or not _may_reuse(req, req.prefix_len + SHARED_TOKENS):
            return False
        return key in self._chosen or key in self._tree.prefilling

    def added(self, req: Req) -> None:
        """``req`` is in the batch."""
        self._chosen.add(self._tree.upcoming(req, req.prefix_len))


def _may_reuse(req: Req, end: int) -> bool:
    """Whether ``req`` takes its tokens up to ``end`` from the tree once they are there: not those
    whose logprobs it wants, and none with embeddings of its own (managers/schedule_batch.py,
    ``Req.init_next_round_input``)."""
    if req.positional_embed_overrides is not None:
        return False
    return not req.return_logprob or not 0 <= req.logprob_start_len < end
