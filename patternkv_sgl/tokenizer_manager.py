"""What hooks add to SGLang's tokenizer manager (managers/tokenizer_manager.py), where requests come
in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from patternkv_sgl import hooks
from patternkv_sgl.dispatch import BranchDispatch
from patternkv_sgl.refusals import (
    refuse_ids,
    refuse_logprob_start,
    refuse_no_tokens,
    refuse_stop_ids,
    refuse_top_logprobs,
)

_dispatch = BranchDispatch()


def handle_batch(
    original: Callable[..., AsyncGenerator[Any]], self: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any]:
    """Around ``_handle_batch_request``: branches of ``obj`` wait for one another."""
    answers = original(self, obj, *args, **kwargs)
    num_branches = getattr(obj, "parallel_sample_num", 1)
    # Images travel by ways of their own.
    if num_branches == 1 or not hooks.enabled() or obj.contains_mm_input():
        return answers
    return _handle_branches(answers, obj.batch_size, num_branches)


async def _handle_branches(
    answers: AsyncGenerator[Any], num_prompts: int, num_branches: int
) -> AsyncGenerator[Any]:
    with _dispatch.handling(num_prompts, num_branches):
        async with aclosing(answers):
            async for answer in answers:
                yield answer


async def send_request(original: Callable[..., Awaitable[None]], self: Any, obj: Any) -> None:
    """Around ``_send_one_request``: sends what may go now, see `BranchDispatch.ready`."""
    ready = _dispatch.ready(obj)
    if len(ready) == 1:
        await original(self, *ready)
    elif ready:
        await self._send_batch_request(ready)


def validate_request(self: Any, obj: Any, input_ids: Any) -> None:
    """Ahead of ``_validate_one_request``: refuses requests that end a scheduler.

    Raises:
        ValueError: names the value and the limit.
    """
    if not hooks.enabled():
        return
    vocab_size = self.model_config.vocab_size
    # SGLang refuses unknown ids in token_ids_logprob itself.
    refuse_top_logprobs(getattr(obj, "top_logprobs_num", 0), vocab_size)
    if isinstance(params := getattr(obj, "sampling_params", None), dict):
        refuse_stop_ids(params.get("stop_token_ids"), vocab_size)
    if getattr(obj, "return_logprob", False):
        refuse_logprob_start(obj.logprob_start_len)
    if input_ids is None or getattr(obj, "input_embeds", None) is not None:
        return
    refuse_no_tokens(input_ids)
    if obj.input_ids is not None:
        refuse_ids(input_ids, vocab_size)
