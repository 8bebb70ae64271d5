"""The ledger task: unlimited problems, an exact verifier, and a held-out split.

A context is a shuffled ledger. The fact ``; ba ko ri lu +35`` says that account ``ba ko`` holds
what ``ri lu`` holds plus 35, and ``; ri lu 83`` that ``ri lu`` holds 83. A question ``? ba ko``
asks for a balance modulo 100. The reasoning follows the references through the ledger, one fact
per step with a running total behind it, and ends in ``answer 18``. Every step is one retrieval
among all facts of the context plus one addition; a single wrong step makes the answer wrong. Names
are pairs of a few syllables, so a retrieval has to tell a name from many that share a syllable.

The facts of a context form disjoint chains of equal depth and each chain is asked once, so no
question's reasoning reveals a fact that another question needs.

**Split.** The numbers of a context, summed, decide its split: held out exactly when the sum is a
multiple of ``SPLIT_MODULUS``. Both generators (this file and ``batches.py``) place every context
they draw on their own side by moving one balance, so no held-out context, hence no held-out
problem, can occur in training whatever the seeds.

Run ``python -m recipes.demo.ledger --level demo --contexts 4 --questions 2 --out problems.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

MODULUS = 100
SPLIT_MODULUS = 8
SPLITS = ("train", "heldout")
OPENING = "ledger"

SYLLABLES = [consonant + vowel for consonant in "bklmr" for vowel in "aeiou"]
NAMES = [f"{first} {second}" for first in SYLLABLES for second in SYLLABLES]

_ANSWER = re.compile(r"\banswer (\d{1,2})(?!\d)")


@dataclass(frozen=True)
class Level:
    """Difficulty: ``facts`` in the context, ``depth`` facts on each question's chain.

    A context has ``facts // depth`` chains and ``6 * facts - 2 * facts // depth + 1`` tokens; a
    question has 3 and its reasoning ``7 * depth + 1``, end of text included.
    """

    facts: int
    depth: int

    def __post_init__(self) -> None:
        if self.depth < 1 or self.facts < self.depth or self.facts % self.depth:
            raise ValueError(
                f"level {self}: depth must be at least 1 and divide the number of facts; "
                f"try {max(1, self.facts // max(1, self.depth)) * max(1, self.depth)} facts"
            )
        if self.facts > len(NAMES):
            raise ValueError(f"level {self}: at most {len(NAMES)} facts (one name each)")

    def __str__(self) -> str:
        return f"{self.facts}x{self.depth}"

    @property
    def chains(self) -> int:
        """Chains of a context, which is also the number of questions it can be asked."""
        return self.facts // self.depth

    @classmethod
    def parse(cls, text: str) -> Level:
        """Read a level from its name in ``LEVELS`` or from ``FACTSxDEPTH``."""
        if text in LEVELS:
            return LEVELS[text]
        match = re.fullmatch(r"(\d+)x(\d+)", text)
        if match is None:
            raise ValueError(f"level {text!r}: use one of {', '.join(LEVELS)}, or FACTSxDEPTH")
        return cls(int(match[1]), int(match[2]))


LEVELS = {
    "easy": Level(48, 4),
    "demo": Level(192, 8),
    "hard": Level(192, 12),
    "long": Level(384, 8),
}


@dataclass(frozen=True)
class Problem:
    """One question about one context. The prompt is ``context + question``; ``reasoning`` is the
    completion a model is trained to give, without the end-of-text token."""

    id: str
    level: str
    context: str
    question: str
    answer: str
    reasoning: str


def make_problems(
    level: Level, *, contexts: int, questions: int, seed: int, split: str = "heldout"
) -> Iterator[Problem]:
    """Yield ``questions`` problems about each of ``contexts`` contexts, context by context.

    The same arguments give the same problems, and a context does not depend on how many others
    are drawn. Raises ``ValueError`` if a context has fewer chains than ``questions``.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    if not 1 <= questions <= level.chains:
        raise ValueError(
            f"{questions} questions per context: level {level} allows 1 to {level.chains} "
            "(its chains); ask for more contexts instead"
        )
    for index in range(contexts):
        rng = random.Random(f"{split}/{level}/{seed}/{index}")
        chains = _draw_chains(level, rng, split)
        context = _write_context(chains, rng)
        for number, chain in enumerate(chains[:questions]):
            reasoning, answer = _reason(chain)
            yield Problem(
                id=f"{split}-{level}-{seed}-{index}-{number}",
                level=str(level),
                context=context,
                question=f" ? {chain[0][0]}",
                answer=answer,
                reasoning=reasoning,
            )


def extract_answer(text: str) -> str | None:
    """The answer stated in a completion (the last one if it states several), or None."""
    found = _ANSWER.findall(text)
    return str(int(found[-1])) if found else None


def solve(context: str, question: str) -> str:
    """The answer, worked out from the text alone."""
    facts = _read_facts(context)
    first, second = question.split()[-2:]
    name = (first, second)
    total = 0
    while True:
        *reference, number = facts[name]
        total += int(number)
        if not reference:
            return str(total % MODULUS)
        name = (reference[0], reference[1])


def _read_facts(context: str) -> dict[tuple[str, str], list[str]]:
    """Map each name to the rest of its fact: ``[*name, "+number"]`` or ``[number]``."""
    words = (fact.split() for fact in context.removeprefix(OPENING).split(";")[1:])
    return {(first, second): body for first, second, *body in words}


def _draw_chains(level: Level, rng: random.Random, split: str) -> list[list[tuple[str, int]]]:
    """Draw ``level.chains`` lists of ``level.depth`` (name, number), on the side of ``split``."""
    names = rng.sample(NAMES, level.facts)
    numbers = [rng.randrange(MODULUS) for _ in names]
    residue = sum(numbers) % SPLIT_MODULUS
    last = numbers[-1]
    if split == "heldout":
        numbers[-1] = last - residue if last >= residue else last + SPLIT_MODULUS - residue
    elif residue == 0:
        # A step of one, and the wrap from 99 to 0, both leave the multiples of SPLIT_MODULUS.
        numbers[-1] = (last + 1) % MODULUS
    facts = list(zip(names, numbers, strict=True))
    return [facts[i : i + level.depth] for i in range(0, level.facts, level.depth)]


def _write_context(chains: list[list[tuple[str, int]]], rng: random.Random) -> str:
    facts = []
    for chain in chains:
        for (name, number), (reference, _) in pairwise(chain):
            facts.append(f" ; {name} {reference} +{number}")
        facts.append(f" ; {chain[-1][0]} {chain[-1][1]}")
    rng.shuffle(facts)
    return OPENING + "".join(facts)


def _reason(chain: list[tuple[str, int]]) -> tuple[str, str]:
    """The worked reasoning of a question that starts at the top of ``chain``, and its answer."""
    steps = []
    total = 0
    for (name, number), (reference, _) in pairwise(chain):
        total = (total + number) % MODULUS
        steps.append(f" ; {name} {reference} +{number} {total}")
    name, number = chain[-1]
    answer = str((total + number) % MODULUS)
    return "".join(steps) + f" ; {name} {number} {answer} answer {answer}", answer


def level_argument(text: str) -> Level:
    """``Level.parse`` for command lines: argparse prints what is wrong with the text."""
    try:
        return Level.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description="Write ledger problems as JSON lines.")
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--level", type=level_argument, default="demo", help="name or FACTSxDEPTH")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--questions", type=int, default=4, help="per context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: standard output")
    args = parser.parse_args()
    problems = make_problems(
        args.level,
        contexts=args.contexts,
        questions=args.questions,
        seed=args.seed,
        split=args.split,
    )
    try:
        records = [asdict(problem) for problem in problems]
    except ValueError as error:
        parser.error(str(error))
    for record in records:
        del record["reasoning"]
    lines = [json.dumps(record) + "\n" for record in records]
    if args.out is None:
        sys.stdout.writelines(lines)
    else:
        args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
