"""How the answer is read from a model's text, and what counts as the expected one."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from .environment import demo_package

LAST_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"

Extract = Callable[[str], str | None]


class Grader(Protocol):
    """Reads and compares answers. Equal answers are written alike, so that they vote as one."""

    def __call__(self, text: str, expected: str) -> tuple[str | None, bool]:
        """The answer in ``text``, None if there is none, and whether it is ``expected``."""

    def check(self, expected: str) -> None:
        """Raise ``ValueError`` if no answer could ever count as ``expected``."""


class TextGrader:
    """Answers that ``extract`` reads, compared as numbers or else as strings."""

    def __init__(self, extract: Extract) -> None:
        self._extract = extract

    def __call__(self, text: str, expected: str) -> tuple[str | None, bool]:
        answer = self._extract(text)
        if answer is None:
            return None, False
        answer = normal(answer)
        return answer, answer == normal(expected)

    def check(self, expected: str) -> None:
        pass


class MathGrader:
    """Mathematical expressions, read and compared by math-verify (LaTeX, boxed or plain).

    Runs in the main thread: math-verify limits its time by a signal. Numbers that are equal vote
    as one; other equal expressions only as far as SymPy writes them alike.

    Raises:
        RuntimeError: math-verify is not installed.
    """

    def __init__(self, extract: Extract | None) -> None:
        self._math = demo_package("math-verify", "grader math needs")
        self._extract = extract

    def __call__(self, text: str, expected: str) -> tuple[str | None, bool]:
        found = text if self._extract is None else self._extract(text)
        parsed = self._parsed(found) if found is not None else []
        if not parsed:
            return None, False
        return _written(parsed[0]), bool(self._math.verify(self._expected(expected), parsed))

    def check(self, expected: str) -> None:
        if all(isinstance(item, str) for item in self._expected(expected)):
            raise ValueError(
                f"answer {expected!r}: math-verify reads no expression in it; correct it or use "
                "grader text"
            )

    def _expected(self, expected: str) -> list[Any]:
        return self._parsed(f"${expected}$") or self._parsed(expected)

    def _parsed(self, text: str) -> list[Any]:
        parsed: list[Any] = self._math.parse(text)
        return parsed


def _written(expression: Any) -> str:
    import sympy

    if isinstance(expression, sympy.Expr) and expression.is_number:
        return str(sympy.nsimplify(expression, rational=True))
    return str(expression)


def normal(answer: str) -> str:
    """``answer`` without what does not change it: spaces, thousands separators, trailing zeros."""
    text = answer.strip().rstrip(".")
    try:
        return format(Decimal(text.replace(",", "")).normalize(), "f")
    except InvalidOperation:
        return text


def last_match(pattern: str) -> Extract:
    """Reads the last match of ``pattern``, its first group if it has one."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"answer_pattern {pattern!r}: {error}") from None

    def extract(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    return extract
