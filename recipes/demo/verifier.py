"""A verifier for the ledger task: how much of a reasoning the ledger bears out.

It needs no expected answer: each step has to quote a fact of the context and add its number up.
"""

from __future__ import annotations

from ..problems import Problem
from .ledger import MODULUS, OPENING


def sound_steps(problem: Problem, text: str) -> float:
    """Share of the reasoning's steps that are right, from 0 to 1; 0 if there is none.

    A step after a wrong total counts as right if it goes on correctly from there.
    """
    facts = {fact.strip() for fact in problem.context.removeprefix(OPENING).split(";")}
    steps = [step.split() for step in text.partition(" answer ")[0].split(";")[1:]]
    total = right = 0
    for step in steps:
        *fact, written = step or [""]
        before = total
        total = int(written) if written.isdecimal() else -1
        number = int(fact[-1]) if fact and fact[-1].lstrip("+").isdecimal() else -1
        right += " ".join(fact) in facts and total == (before + number) % MODULUS
    return right / len(steps) if steps else 0.0
