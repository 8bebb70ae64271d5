"""``sgl.Engine(kv_quant="patternkv")`` that never finds a cached prefix, against a bf16 engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.answers import assert_close, cached, outputs
from tests.fixtures import BRANCHED_PROMPT, BRANCHES, CHUNK, LENGTHS

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

NUM_PROMPTS = len(LENGTHS)


@pytest.fixture(scope="module")
def answers(engines: dict[str, Any]) -> list[Any]:
    answers: list[Any] = engines["patternkv"]["answers"]
    return answers


@pytest.fixture(scope="module")
def stats(engines: dict[str, Any]) -> dict[str, Any]:
    (stats,) = engines["patternkv"]["stats"]
    assert isinstance(stats, dict)
    return stats


def prompt_logprobs(answer: dict[str, Any]) -> np.ndarray:
    """Logprob of every prompt token but the first, which nothing predicts."""
    return np.array([lp for lp, _, _ in answer["meta_info"]["input_token_logprobs"][1:]])


def test_keyword_arguments_reach_the_cache(stats: dict[str, Any]) -> None:
    assert (stats["bits"], stats["mine_tokens"]) == ("4/2", CHUNK // 2)


def test_no_prefix_is_found_and_equal_prompts_answer_equally(answers: list[Any]) -> None:
    singles, branches = answers[:-1], answers[-1]
    assert len(singles) == 2 * NUM_PROMPTS and len(branches) == BRANCHES
    assert not any(cached(answer) for answer in [*singles, *branches])
    for first, second in zip(singles[:NUM_PROMPTS], singles[NUM_PROMPTS:], strict=True):
        assert outputs(first) == outputs(second)
        assert (prompt_logprobs(first) == prompt_logprobs(second)).all()


def test_every_long_chunk_mines(stats: dict[str, Any]) -> None:
    chunks = [min(CHUNK, length - start) for length in LENGTHS for start in range(0, length, CHUNK)]
    mining = sum(chunk >= CHUNK // 2 for chunk in chunks)
    branched = sum(chunk >= CHUNK // 2 for chunk in [CHUNK, CHUNK, BRANCHED_PROMPT - 2 * CHUNK])
    # SGLang prefills the branched prompt once more than it has branches. Chunks that start alike
    # in one batch share a table.
    assert 2 * mining + branched < stats["tables_mined"]
    assert stats["tables_mined"] <= 2 * mining + (BRANCHES + 1) * branched
    assert stats["running_requests"] == 0
