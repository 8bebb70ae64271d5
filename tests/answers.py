"""Greedy requests to SGLang, and when two of their answers agree."""

from __future__ import annotations

from typing import Any

TOP = 5  # alternatives that an answer carries per token


def greedy(text: str | list[str], num_tokens: int = 16, **params: Any) -> dict[str, Any]:
    """Body of a greedy ``/generate`` of exactly ``num_tokens`` tokens, with logprobs."""
    return {
        "text": text,
        "sampling_params": {
            "temperature": 0.0,
            "max_new_tokens": num_tokens,
            "ignore_eos": True,
            **params,
        },
        "return_logprob": True,
        "top_logprobs_num": TOP,
    }


def outputs(answer: dict[str, Any]) -> list[tuple[float, int]]:
    """Logprob and id of each generated token."""
    return [(lp, token) for lp, token, _ in answer["meta_info"]["output_token_logprobs"]]


def cached(answer: dict[str, Any]) -> int:
    """Prompt tokens that were found in the radix cache."""
    tokens: int = answer["meta_info"]["cached_tokens"]
    return tokens


def assert_close(left: dict[str, Any], right: dict[str, Any], bound: float) -> None:
    """Assert that two greedy answers agree within ``bound`` nats.

    As long as their tokens are equal, so are the logprobs, within ``bound``. Where tokens part,
    each answer must have held the other's token for a near tie; what follows has another past.
    """
    for step, ((lp, token), (other_lp, other)) in enumerate(
        zip(outputs(left), outputs(right), strict=True)
    ):
        if token == other:
            assert abs(lp - other_lp) <= bound, (
                f"step {step}, token {token}: logprobs {lp} and {other_lp} differ by more "
                f"than {bound}"
            )
            continue
        for answer, own, theirs in ((left, lp, other), (right, other_lp, token)):
            top = {token: lp for lp, token, _ in answer["meta_info"]["output_top_logprobs"][step]}
            assert own - top.get(theirs, float("-inf")) <= bound, (
                f"step {step}: tokens {token} and {other} were chosen, no tie within {bound} "
                f"in {top}"
            )
        return
