"""Branches of a prompt go from the tokenizer to the scheduler as one message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput


@dataclass
class _Call:
    """A request with several branches per prompt that a task handles."""

    num_branches: int
    held: list[TokenizedGenerateReqInput] = field(default_factory=list)


class BranchDispatch:
    """Holds back the branches of a prompt until the last of them is there.

    SGLang's tokenizer sends one branch after the other, each with the ids of the whole prompt
    (managers/tokenizer_manager.py, ``_handle_batch_request``): the scheduler reads them one by one
    and starts its first batch with those that have come. In one message they share the ids, and
    the first batch has them all.
    """

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any] | None, _Call] = {}

    @contextmanager
    def handling(self, num_branches: int) -> Iterator[None]:
        """While the current task handles a request with ``num_branches`` for each prompt."""
        task = asyncio.current_task()
        self._calls[task] = _Call(num_branches)
        try:
            yield
        finally:
            del self._calls[task]

    def ready(self, obj: TokenizedGenerateReqInput) -> list[TokenizedGenerateReqInput]:
        """What goes to the scheduler now that ``obj`` would: ``obj`` if it is no branch, all
        branches of its prompt if it is the last of them, else nothing."""
        call = self._calls.get(asyncio.current_task())
        # The prefill ahead of branches generates nothing; images travel by ways of their own.
        if call is None or obj.sampling_params.max_new_tokens == 0 or obj.mm_inputs is not None:
            return [obj]
        call.held.append(obj)
        if len(call.held) < call.num_branches:
            return []
        branches, call.held = call.held, []
        return branches
