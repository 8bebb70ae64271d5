"""``sgl.Engine(kv_quant="patternkv")`` that never finds a cached prefix, against a bf16 engine."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import numpy as np
import pytest

from tests.answers import cached, outputs
from tests.fixtures import BRANCHES, CHUNK, LENGTHS

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

NUM_PROMPTS = len(LENGTHS)
# Mean differences to bf16 in nats. Measured with the demo model, random words and 4:2 bits; answers
# to another prompt differ by 9. Random words are so unlikely (20 nats) that the rounding of bf16
# logits alone makes the first of these, where both engines attend exactly.
EXACT = 0.4  # prompt tokens of a first chunk; measured 0.10
CHUNKED = 2.0  # prompt tokens that follow a quantized chunk; measured 0.56
GENERATED = 0.3  # generated tokens before the answers part; measured 0.06


@pytest.fixture(scope="module")
def answers(engines: dict[str, Any]) -> list[Any]:
    answers: list[Any] = engines["patternkv"]["answers"]
    return answers


@pytest.fixture(scope="module")
def stats(engines: dict[str, Any]) -> list[dict[str, Any]]:
    """After each answer."""
    stats: list[dict[str, Any]] = engines["patternkv"]["stats"]
    return stats


def prompt_logprobs(answer: dict[str, Any]) -> np.ndarray:
    """Logprob of every prompt token but the first, which nothing predicts."""
    return np.array([lp for lp, _, _ in answer["meta_info"]["input_token_logprobs"][1:]])


def mines(num_tokens: int) -> bool:
    return num_tokens >= CHUNK // 2


def test_keyword_arguments_reach_the_cache(stats: list[dict[str, Any]]) -> None:
    assert (stats[-1]["bits"], stats[-1]["mine_tokens"]) == ("4/2", CHUNK // 2)


def test_no_prefix_is_found_and_equal_prompts_answer_equally(answers: list[Any]) -> None:
    *singles, branches = answers
    assert len(singles) == 2 * NUM_PROMPTS and len(branches) == BRANCHES
    assert not any(cached(answer) for answer in [*singles, *branches])
    passes = zip(LENGTHS, singles[:NUM_PROMPTS], singles[NUM_PROMPTS:], strict=True)
    for length, first, second in passes:
        # A shorter prompt inherits the root's table, which only the second pass finds mined.
        if mines(length):
            assert outputs(first) == outputs(second)
            assert (prompt_logprobs(first) == prompt_logprobs(second)).all()


def test_every_long_chunk_mines_and_branches_share(stats: list[dict[str, Any]]) -> None:
    chunks = [min(CHUNK, length - start) for length in LENGTHS for start in range(0, length, CHUNK)]
    singles, last = stats[2 * NUM_PROMPTS - 1], stats[-1]
    assert singles["tables_mined"] == 2 * sum(map(mines, chunks))
    assert singles["kv_reads_shared"] == 0
    # Rows of equal prompts end up on the same slots, whoever prefilled them.
    assert last["kv_reads_shared"] > 0
    assert last["running_requests"] == 0


def test_logprobs_are_near_those_of_a_bf16_cache(
    engines: dict[str, Any], answers: list[Any]
) -> None:
    exact, chunked, generated = [], [], []
    for ours, dense in zip(answers[:NUM_PROMPTS], engines["plugged"]["answers"], strict=True):
        difference = np.abs(prompt_logprobs(ours) - prompt_logprobs(dense))
        exact.extend(difference[: CHUNK - 1])
        chunked.extend(difference[CHUNK - 1 :])
        pairs = zip(outputs(ours), outputs(dense), strict=True)
        same = takewhile(lambda pair: pair[0][1] == pair[1][1], pairs)
        generated.extend(abs(lp - dense_lp) for (lp, _), (dense_lp, _) in same)
    assert len(generated) > NUM_PROMPTS
    assert np.mean(exact) < EXACT
    assert np.mean(chunked) < CHUNKED
    assert np.mean(generated) < GENERATED
