"""Branches of a prompt go from the tokenizer to the scheduler as one message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput


@dataclass(eq=False)
class _Call:
    """A request with several branches for each of its prompts, until all of them are sent."""

    num_branches: int
    prefills_left: int
    prompts_left: int
    held: list[TokenizedGenerateReqInput] = field(default_factory=list)


class BranchDispatch:
    """Holds back the branches of a prompt until the last of them is there.

    SGLang's tokenizer sends a prefill of every prompt of a request, and then one branch after the
    other, each with the ids of the whole prompt (managers/tokenizer_manager.py,
    ``_handle_batch_request``): the scheduler reads them one by one and starts its first batch with
    those that have come. In one message they share the ids, and the first batch has them all.
    """

    def __init__(self) -> None:
        self._calls: dict[asyncio.Task[Any] | None, _Call] = {}

    @contextmanager
    def handling(self, num_prompts: int, num_branches: int) -> Iterator[None]:
        """While the current task handles a request of ``num_prompts`` with ``num_branches`` each.

        It may handle others meanwhile, once all of these are sent: readers of streams take turns.
        """
        task = asyncio.current_task()
        call = self._calls[task] = _Call(num_branches, num_prompts, num_prompts)
        try:
            yield
        finally:
            if self._calls.get(task) is call:
                del self._calls[task]

    def ready(self, obj: TokenizedGenerateReqInput) -> list[TokenizedGenerateReqInput]:
        """What goes to the scheduler now that ``obj`` would: ``obj`` if it is no branch, all
        branches of its prompt if it is the last of them, else nothing."""
        task = asyncio.current_task()
        call = self._calls.get(task)
        if call is None:
            return [obj]
        if call.prefills_left:
            call.prefills_left -= 1
            return [obj]
        call.held.append(obj)
        if len(call.held) < call.num_branches:
            return []
        branches, call.held = call.held, []
        call.prompts_left -= 1
        if not call.prompts_left:
            del self._calls[task]
        return branches
