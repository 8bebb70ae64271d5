"""One answer of SGLang's ``generate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST_LOGPROB = math.log(2.0**-126)  # of the smallest normal float32


@dataclass(frozen=True)
class Generation:
    """One answer of SGLang's ``generate``.

    Attributes:
        text: the completion.
        prompt_tokens, cached_tokens: tokens of the prompt; those of them found in the radix cache.
        completion_tokens: tokens generated.
        finish_reason: ``stop`` or ``length``.
        mean_logprob, self_certainty: see ``selection.py``; None if not asked for.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str
    mean_logprob: float | None = None
    self_certainty: float | None = None

    @classmethod
    def parse(cls, answer: dict[str, Any]) -> Generation:
        """One element of SGLang's answer.

        Raises:
            RuntimeError: SGLang gave the request up.
        """
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            raise RuntimeError(f"SGLang aborted a request: {reason.get('message', reason)}")
        return cls(
            text=answer["text"],
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            completion_tokens=meta["completion_tokens"],
            finish_reason=reason["type"],
            mean_logprob=mean_logprob(meta),
            self_certainty=self_certainty(meta),
        )


def mean_logprob(meta: dict[str, Any]) -> float | None:
    """Mean log-probability of the generated tokens in a ``meta_info``; None if it has none."""
    tokens = meta.get("output_token_logprobs")
    return _mean([_floored(token[0]) for token in tokens]) if tokens else None


def self_certainty(meta: dict[str, Any]) -> float | None:
    """Mean over tokens of the mean -log p of the most likely tokens; None without them."""
    tops = meta.get("output_top_logprobs")
    return _mean([-_mean([_floored(top[0]) for top in row]) for row in tops]) if tops else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _floored(logprob: float | None) -> float:
    # A probability that underflows in float32 is -inf, which JSON has no number for.
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
