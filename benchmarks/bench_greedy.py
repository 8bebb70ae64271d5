"""Greedy answers of the demo model on one kind of machine, and how they differ on another.

    python -m benchmarks.bench_greedy --out cpu.jsonl             # answers, one line each
    python -m benchmarks.bench_greedy --out gpu.jsonl --against cpu.jsonl
    PATTERNKV_IMPL=reference python -m benchmarks.bench_greedy …  # the torch reference on a GPU

Every context is stored by a request of its own before its questions are asked, so that two runs
mine the same tables whatever their speed. A difference is explained where the first token that
differs was a near tie: there each answer held the other's token within ``--tie`` nats of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, read_rows
from recipes.config import TaskConfig
from recipes.environment import git_commit, hardware, versions
from recipes.problems import load_problems

MODEL = Path(__file__).parents[1] / "recipes" / "demo" / "model"
ALTERNATIVES = 5
"""Tokens whose log-probabilities each step of an answer keeps."""
AGREEMENT = 0.95
"""Share of answers that must be equal."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of the answers")
    parser.add_argument("--against", type=Path, help="answers to compare with")
    parser.add_argument("--count", type=int, default=200, help="prompts (%(default)s)")
    parser.add_argument("--level", default="demo", help="difficulty (%(default)s)")
    parser.add_argument("--bits", default="4", help="--kv-quant-bits (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="at most (%(default)s)")
    parser.add_argument(
        "--tie", type=float, default=0.25, help="nats that make a near tie (%(default)s)"
    )
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help="JSON with more arguments of Engine"
    )
    return parser.parse_args(argv)


def answer_all(args: argparse.Namespace) -> list[Row]:
    """Answers of one engine, in the order of the problems."""
    import sglang

    problems = load_problems(
        TaskConfig(model=str(MODEL), num_problems=args.count, level=args.level)
    )
    options = {
        "model_path": str(MODEL),
        "dtype": "bfloat16",
        "kv_quant": "patternkv",
        "kv_quant_bits": args.bits,
        "mem_fraction_static": 0.3,
        "max_total_tokens": 60000,
        "grammar_backend": "none",
        "random_seed": 0,
        "log_level": "warning",
    }
    sampling = {"temperature": 0.0, "max_new_tokens": args.new_tokens}
    engine = sglang.Engine(**options | args.engine_args)
    rows = []
    try:
        for context, group in groupby(problems.problems, problems.shared_prompt):
            engine.generate(context, {**sampling, "max_new_tokens": 1})
            asked = list(group)
            answers = engine.generate(
                [problems.prompt(problem) for problem in asked],
                sampling,
                return_logprob=True,
                top_logprobs_num=ALTERNATIVES,
            )
            for problem, answer in zip(asked, answers, strict=True):
                correct = problems.grade(problem, answer["text"])[1]
                rows.append({"id": problem.id, "correct": correct, **_steps(answer)})
    finally:
        engine.shutdown()
    return rows


def _steps(answer: dict[str, Any]) -> Row:
    meta = answer["meta_info"]
    return {
        "tokens": [token for _, token, _ in meta["output_token_logprobs"]],
        "top": [
            {str(token): round(logprob, 4) for logprob, token, _ in step}
            for step in meta["output_top_logprobs"]
        ],
    }


def gap(left: Row, right: Row) -> float | None:
    """Nats by which the first differing step is no tie; None for equal answers.

    How much less each answer gave to the other's token than to its own, the larger of the two.
    Infinite where an answer did not hold it among its alternatives, or only one has ended.
    """
    for step, (token, other) in enumerate(zip(left["tokens"], right["tokens"], strict=False)):
        if token != other:
            mine, theirs = left["top"][step], right["top"][step]
            worst = float("-inf")
            return max(
                mine[str(token)] - mine.get(str(other), worst),
                theirs[str(other)] - theirs.get(str(token), worst),
            )
    return None if len(left["tokens"]) == len(right["tokens"]) else float("inf")


def compare(left: list[Row], right: list[Row], tie: float) -> tuple[list[str], bool]:
    """What differs, a line each with a summary first; and whether that is as it should be.

    Raises:
        ValueError: the two files do not answer the same prompts.
    """
    if [row["id"] for row in left] != [row["id"] for row in right]:
        raise ValueError(
            f"{len(left)} and {len(right)} answers are to different prompts: make both files "
            "with the same --count and --level"
        )
    gaps = {a["id"]: gap(a, b) for a, b in zip(left, right, strict=True)}
    different = {name: found for name, found in gaps.items() if found is not None}
    unexplained = sum(found > tie for found in different.values())
    equal = len(gaps) - len(different)
    correct = " and ".join(str(sum(row["correct"] for row in rows)) for rows in (left, right))
    lines = [
        f"{equal} of {len(gaps)} answers equal, {len(different) - unexplained} part at a tie "
        f"within {tie} nats, {unexplained} otherwise; correct: {correct}"
    ]
    lines += [
        f"{name}: parts where {found:.3f} nats lie between" for name, found in different.items()
    ]
    return lines, unexplained == 0 and equal >= AGREEMENT * len(gaps)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    made_with = {**hardware(), "versions": versions(), "commit": git_commit()}
    rows = answer_all(args)
    with args.out.open("w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row | made_with), file=file)
    print(f"{sum(row['correct'] for row in rows)} of {len(rows)} answers correct")
    if args.against is None:
        return 0
    lines, sound = compare(rows, read_rows(args.against), args.tie)
    print("\n".join(lines))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
