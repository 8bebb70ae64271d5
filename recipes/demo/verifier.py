"""A verifier for the ledger task: how much of a reasoning the ledger bears out.

It needs no expected answer: each step has to quote the fact of the account that the step before
refers to, and add its number up.
"""

from __future__ import annotations

from ..problems import Problem
from .ledger import MODULUS, OPENING


def sound_steps(problem: Problem, text: str) -> float:
    """Share of the reasoning's steps that are right, the answer being the last of them.

    A step after a wrong one counts as right if it goes on correctly from there, so only the right
    answer, reached step by step, gets 1.
    """
    facts = {fact.strip() for fact in problem.context.removeprefix(OPENING).split(";")}
    steps, _, answer = text.partition(" answer ")
    name, total, right = problem.question.split()[-2:], 0, 0
    for step in steps.split(";")[1:]:
        *fact, written = step.split() or [""]
        number = fact[-1].removeprefix("+") if fact else ""
        due = str((total + int(number)) % MODULUS) if number.isdecimal() else None
        right += " ".join(fact) in facts and fact[:2] == name and written == due
        name, total = fact[2:4], int(written) if written.isdecimal() else 0
    # The last fact of a chain has a number where others have a name.
    right += len(name) == 1 and answer.strip() == str(total)
    return right / max(2, len(steps.split(";")))
