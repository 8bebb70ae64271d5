"""Best-of-n: how one of k answers is picked, who scores them, and how answers are compared."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import orjson
import pytest

from recipes.demo.ledger import Level, make_problems
from recipes.demo.verifier import sound_steps
from recipes.generation import LEAST_LOGPROB, Generation
from recipes.grading import MathGrader, TextGrader, last_match
from recipes.metrics import summarise
from recipes.problems import Problem, load_problems
from recipes.records import Records, Sample
from recipes.scoring import score_samples
from recipes.selection import Score, best_at_k
from tests.recipe_fakes import config_of, sample, serving


@pytest.mark.parametrize("scores", [[3, 1, 4, 1, 5, 9], [2, 2, 2, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
def test_best_at_k_is_the_mean_over_all_subsets(scores: list[float]) -> None:
    correct = [True, False, False, True, True, False]
    for k in range(1, len(scores) + 1):
        credits = []
        for subset in itertools.combinations(zip(scores, correct, strict=True), k):
            best = [good for score, good in subset if score == max(score for score, _ in subset)]
            credits.append(sum(best) / len(best))
        assert best_at_k(scores, correct, k) == pytest.approx(sum(credits) / len(credits))


def test_selections_rank_by_what_they_name() -> None:
    # Of each problem's two samples the second is right; only logprob prefers it.
    samples = [
        sample(p, i, correct=i == 1, mean_logprob=[-2.0, -1.0][i], self_certainty=[3.0, 2.0][i])
        for p in "pq"
        for i in range(2)
    ]
    scores = {"verifier": {(p, i): float(i) for p in "pq" for i in range(2)}}
    result = summarise(samples, 2, ["majority", "logprob", "self_certainty", "verifier"], scores)
    assert result["logprob_at_k"] == {"1": 0.5, "2": 1.0}
    assert result["self_certainty_at_k"] == {"1": 0.5, "2": 0.0}
    assert result["verifier_at_k"]["2"] == 1.0
    assert result["verifier_at_k_stderr"]["2"] == 0.0
    with pytest.raises(ValueError, match="problem 'p', sample 0: reward is None"):
        summarise(samples, 2, ["reward"], scores)


def test_log_probabilities_are_means_over_tokens() -> None:
    meta: dict[str, Any] = {
        "prompt_tokens": 7,
        "cached_tokens": 5,
        "completion_tokens": 2,
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-1.0, 4, None], [-2.0, 5, None]],
        "output_top_logprobs": [[[-1.0, 4, None], [-3.0, 9, None]], [[0.0, 5, None], [None, 3, 0]]],
    }
    found = Generation.parse({"text": "t", "meta_info": meta})
    assert found.mean_logprob == pytest.approx(-1.5)
    assert found.self_certainty == pytest.approx((2.0 - LEAST_LOGPROB / 2) / 2)
    for name in ("output_token_logprobs", "output_top_logprobs"):
        del meta[name]
    plain = Generation.parse({"text": "t", "meta_info": meta})
    assert (plain.mean_logprob, plain.self_certainty, plain.prompt_tokens) == (None, None, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": ("best",)}, "select 'best': expected one of majority, logprob"),
        ({"select": ("verifier",)}, "'verifier' and key verifier need each other"),
        ({"reward_url": "http://r"}, "'reward' and key reward_url need each other"),
        ({"select": ()}, "at least one"),
        ({"reward_prompt": "{prompt}"}, "expected {answer} in it"),
        ({"grader": "sympy"}, "grader 'sympy': expected one of text, math"),
    ],
)
def test_bad_selections_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)


def test_requests_ask_for_the_log_probabilities_that_are_needed(tmp_path: Path) -> None:
    assert config_of(tmp_path).logprob_request == {}
    assert config_of(tmp_path, select=("logprob",)).logprob_request == {"return_logprob": True}
    both = config_of(tmp_path, select=("self_certainty", "logprob"), top_logprobs=7)
    assert both.logprob_request == {"return_logprob": True, "top_logprobs_num": 7}


def favour_second(problem: Problem, text: str) -> bool:
    """A verifier for the tests below."""
    return text == f"second answer to{problem.question}"


def drawn_samples(tmp_path: Path, **changes: Any) -> tuple[Any, Any, list[Sample]]:
    config = config_of(tmp_path, **changes)
    problems = load_problems(config)
    samples = [
        sample(p.id, i, correct=i == 1, text=f"{['first', 'second'][i]} answer to{p.question}")
        for p in problems.problems
        for i in range(2)
    ]
    return config, problems, samples


def test_a_verifier_scores_each_sample_once(tmp_path: Path) -> None:
    path = f"{__name__}.favour_second"
    config, problems, samples = drawn_samples(tmp_path, select=("verifier",), verifier=path)
    scores = tmp_path / "scores.jsonl"
    found = score_samples(scores, config, problems, samples[:5])
    assert len(scores.read_bytes().splitlines()) == 5
    found = score_samples(scores, config, problems, samples)
    assert len(scores.read_bytes().splitlines()) == len(samples)
    assert found["verifier"] == {(s.problem, s.index): float(s.index) for s in samples}
    assert summarise(samples, 2, config.select, found)["verifier_at_k"]["2"] == 1.0


def test_scores_of_another_verifier_are_not_used(tmp_path: Path) -> None:
    path = f"{__name__}.favour_second"
    config, problems, samples = drawn_samples(tmp_path, select=("verifier",), verifier=path)
    scores = tmp_path / "scores.jsonl"
    stale = [Score(s.problem, s.index, "verifier", f"{path}@0", 9.0) for s in samples]
    Records(scores, Score).append(*stale)
    found = score_samples(scores, config, problems, samples)
    assert set(found["verifier"].values()) == {0.0, 1.0}


@pytest.mark.parametrize("path", ["nowhere.at_all", "math.pi", "recipes.scoring.absent", "print"])
def test_a_missing_verifier_is_told(path: str, tmp_path: Path) -> None:
    config, problems, samples = drawn_samples(tmp_path, select=("verifier",), verifier=path)
    with pytest.raises(ValueError, match=r"expected package.module.function"):
        score_samples(tmp_path / "scores.jsonl", config, problems, samples)


def test_a_reward_model_reads_prompt_and_answer(tmp_path: Path) -> None:
    with serving() as server:
        server.answers["/model_info"] = {"model_path": "reward", "weight_version": "1"}
        server.answers["/classify"] = lambda body: [
            {"embedding": [float("second" in text)]} for text in body["text"]
        ]
        config, problems, samples = drawn_samples(
            tmp_path,
            select=("reward",),
            reward_url=server.url,
            reward_prompt="<{prompt}|{answer}>",
        )
        found = score_samples(tmp_path / "scores.jsonl", config, problems, samples)
        first = problems.problems[0]
        assert server.bodies[0]["text"][0] == f"<{problems.prompt(first)}|{samples[0].text}>"
        assert summarise(samples, 2, config.select, found)["reward_at_k"]["2"] == 1.0

        (tmp_path / "scores.jsonl").unlink()
        server.answers["/classify"] = lambda body: [{"embedding": [0.1, 0.2]} for _ in body["text"]]
        with pytest.raises(RuntimeError, match="expected one number each: serve a reward model"):
            score_samples(tmp_path / "scores.jsonl", config, problems, samples)


def test_equal_numbers_vote_as_one() -> None:
    grade = TextGrader(last_match(r"answer (\S+)"))
    assert grade("answer 1,000.0", "1000") == ("1000", True)
    assert grade("answer 1000", "1") == ("1000", False)
    assert grade("none", "1") == (None, False)


@pytest.mark.parametrize(
    ("text", "expected", "answer", "correct"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$.", "0.5", "1/2", True),
        ("the answer is 0.5", r"\frac{1}{2}", "1/2", True),
        (r"$\boxed{x^2 + 2x + 1}$", "(x+1)^2", "x**2 + 2*x + 1", True),
        (r"$\boxed{\{2, 1\}}$", r"\{1,2\}", "{1, 2}", True),
        (r"$\boxed{7}$", "8", "7", False),
        ("no idea", "8", None, False),
    ],
)
def test_maths_answers_compare_as_expressions(
    text: str, expected: str, answer: str | None, correct: bool
) -> None:
    assert MathGrader(None)(text, expected) == (answer, correct)


def test_maths_answers_must_be_expressions(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(orjson.dumps({"question": "Why?", "answer": "—"}))
    config = config_of(tmp_path, problems=str(path), num_problems=1, grader="math")
    with pytest.raises(ValueError, match="answer '—': math-verify reads no expression"):
        load_problems(config)
    path.write_bytes(orjson.dumps({"question": "1/4 + 1/4?", "answer": "1/2"}))
    problems = load_problems(config)
    assert problems.grade(problems.problems[0], r"$\frac24$") == ("1/2", True)
    tagged = config_of(
        tmp_path, problems=str(path), num_problems=1, grader="math", answer_pattern=r"<a>(.*?)</a>"
    )
    problems = load_problems(tagged)
    assert problems.grade(problems.problems[0], r"3 <a>$\frac{2}{4}$</a> 4") == ("1/2", True)


def test_a_score_must_be_a_number() -> None:
    samples = [sample("p", 0, True, mean_logprob=math.nan)]
    with pytest.raises(ValueError, match="logprob is nan"):
        summarise(samples, 1, ["logprob"])


def test_the_demo_verifier_counts_sound_steps() -> None:
    context = "ledger ; ba ko ri lu +35 ; mo ba 4 ; ri lu 83"
    problem = Problem("p", context, " ? ba ko", "18")
    right = " ; ba ko ri lu +35 35 ; ri lu 83 18 answer 18"
    assert sound_steps(problem, right) == 1
    # Forgot to carry, and went on from there.
    assert sound_steps(problem, right.replace("18", "8")) == pytest.approx(2 / 3)
    assert sound_steps(problem, right.replace("35 35", "36 36")) == pytest.approx(1 / 3)
    assert sound_steps(problem, " ; mo ba 4 4 answer 4") == 1 / 2  # another account
    assert sound_steps(problem, " ; ba ko ri lu +35 35 answer 35") == 1 / 2  # stopped half way
    for nothing in ("", " ;", " answer 18", " ; ba ko ri lu"):
        assert sound_steps(problem, nothing) == 0
    (drawn,) = make_problems(Level(48, 4), contexts=1, questions=1, seed=0)
    held = Problem(drawn.id, drawn.context, drawn.question, drawn.answer)
    assert sound_steps(held, drawn.reasoning) == 1.0
