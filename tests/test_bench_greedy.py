"""When two greedy answers agree."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.bench_greedy import compare, gap


def answer(
    *steps: dict[int, float], name: str = "p", end: int | None = None, correct: bool = True
) -> dict[str, Any]:
    """An answer that takes the first token of every step."""
    return {
        "id": name,
        "correct": correct,
        "tokens": [next(iter(step)) for step in steps][:end],
        "top": [{str(token): logprob for token, logprob in step.items()} for step in steps][:end],
    }


SURE = {7: 0.0, 8: -9.0}
CLOSE = {5: -0.7, 6: -0.75}


def test_equal_answers_have_no_gap() -> None:
    assert gap(answer(SURE, CLOSE), answer(SURE, CLOSE)) is None


def test_the_gap_is_the_larger_of_both_sides() -> None:
    other = {6: -0.6, 5: -0.9}
    assert gap(answer(SURE, CLOSE), answer(SURE, other)) == pytest.approx(0.3)


def test_a_token_that_nobody_thought_of_and_a_missing_one_have_no_finite_gap() -> None:
    assert gap(answer(SURE), answer({9: -0.1, 7: -3.0})) == math.inf
    assert gap(answer(SURE, CLOSE), answer(SURE, CLOSE, end=1)) == math.inf


def test_few_ties_are_sound_and_one_surprise_is_not() -> None:
    same = [answer(SURE, name=f"{index}") for index in range(19)]
    tied = answer({6: -0.7, 5: -0.75}, name="tied")
    lines, sound = compare([*same, answer(CLOSE, name="tied")], [*same, tied], 0.1)
    assert sound
    assert lines[0] == (
        "19 of 20 answers equal, 1 part at a tie within 0.1 nats, 0 otherwise; correct: 20 and 20"
    )
    assert lines[1:] == ["tied: parts where 0.050 nats lie between"]
    assert not compare([*same, answer(CLOSE, name="tied")], [*same, tied], 0.01)[1]


def test_too_many_ties_are_not_sound() -> None:
    left = [answer(CLOSE, name=f"{index}") for index in range(10)]
    right = [answer({6: -0.7, 5: -0.75}, name=f"{index}") for index in range(10)]
    assert not compare(left, right, 0.1)[1]


def test_answers_to_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 and 1 answers are to different prompts"):
        compare([answer(SURE)], [answer(SURE, name="q")], 0.1)
