"""What the methods are measured on: problems to sample, chains of thought to be led along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes.config import RunConfig
from recipes.demo.ledger import Level, make_problems
from recipes.problems import Problem, ProblemSet, load_problems

LOOP_REPEATS = 3
"""Times a completion ends in the same block before it counts as a loop."""


@dataclass(frozen=True)
class Chains:
    """Prompts ``[p, n]`` and what follows them ``[p, t]``; ``scored`` bool ``[t]`` are the tokens
    of reasoning, as opposed to questions."""

    ids: list[str]
    prompts: torch.Tensor
    tokens: torch.Tensor
    scored: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """Problems whose prompts ``[p, n]`` are equally long."""

    problems: list[Problem]
    tokens: torch.Tensor


def ledger_chains(
    tokenizer: Any, level: Level, contexts: int, questions: int, seed: int, batch: int
) -> Iterator[Chains]:
    """Transcripts that answer several questions about a held-out ledger, without a mistake."""
    problems = list(make_problems(level, contexts=contexts, questions=questions, seed=seed))
    groups = [problems[i : i + questions] for i in range(0, len(problems), questions)]
    for i in range(0, len(groups), batch):
        prompts, rows, scored = [], [], []
        for group in groups[i : i + batch]:
            prompts.append(tokenizer(group[0].context)["input_ids"])
            row: list[int] = []
            marks: list[bool] = []
            for problem in group:
                question = tokenizer(problem.question, add_special_tokens=False)["input_ids"]
                reasoning = tokenizer(problem.reasoning, add_special_tokens=False)["input_ids"]
                reasoning.append(tokenizer.eos_token_id)
                row += question + reasoning
                marks += [False] * len(question) + [True] * len(reasoning)
            rows.append(row)
            scored.append(marks)
        ids = [f"{group[0].id}x{questions}" for group in groups[i : i + batch]]
        yield Chains(ids, torch.tensor(prompts), torch.tensor(rows), torch.tensor(scored[0]))


def problem_set(
    path: str, count: int, seed: int, prompt: str, pattern: str | None, grader: str = "text"
) -> ProblemSet:
    """The first ``count`` problems of a JSONL file, or of the ledger level ``path`` names.

    ``pattern`` and ``grader`` are for files: ``answer_pattern`` and ``grader`` of `TaskConfig`.
    """
    common: dict[str, Any] = {"model": "unused", "num_problems": count, "prompt": prompt}
    if path.endswith(".jsonl"):
        return load_problems(
            RunConfig(problems=path, answer_pattern=pattern, grader=grader, **common)
        )
    level = str(Level.parse(path))
    return load_problems(
        RunConfig(level=level, questions_per_context=1, problem_seed=seed, **common)
    )


def prompt_batches(tokenizer: Any, problems: ProblemSet, batch: int) -> Iterator[Prompts]:
    """Problems of equal prompt length, at most ``batch`` at a time."""
    by_length: dict[int, list[tuple[Problem, list[int]]]] = {}
    for problem in problems.problems:
        ids = tokenizer(problems.prompt(problem))["input_ids"]
        by_length.setdefault(len(ids), []).append((problem, ids))
    for group in by_length.values():
        for i in range(0, len(group), batch):
            chosen, ids = zip(*group[i : i + batch], strict=True)
            yield Prompts(list(chosen), torch.tensor(ids))


def loops(tokens: Sequence[int], stopped: bool) -> bool:
    """Whether an unfinished completion ends in a block of tokens, three times in a row."""
    if stopped:
        return False
    return any(
        all(tokens[-i] == tokens[-i - size] for i in range(1, (LOOP_REPEATS - 1) * size + 1))
        for size in range(1, len(tokens) // LOOP_REPEATS + 1)
    )
