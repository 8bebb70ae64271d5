"""Cells merged into one result per model, method, bits and task."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.quality.cells import Cell
from benchmarks.quality.statistics import Paired
from recipes.metrics import maj_at_each_k, mean_and_stderr, pass_at_k, powers_of_two

VOTES = 8
"""The k of the maj@k that caches are compared by."""


@dataclass(frozen=True)
class Result:
    """All cells of one model, method, bits and task. Rates are in percent, KL in nats.

    The problems are in the order of their ids, so that results of different methods on the same
    task pair up.
    """

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        return self.cells[0]

    @property
    def kind(self) -> str:
        return self.first.task.split()[0]

    @property
    def level(self) -> str:
        return self.first.task.split()[1]

    @property
    def problems(self) -> list[str]:
        return sorted({name for cell in self.cells for name in cell.problems})

    @property
    def bits_per_element(self) -> float:
        return math.fsum(cell.bits_per_element for cell in self.cells) / len(self.cells)

    @property
    def samples(self) -> int:
        """Branches of each problem."""
        return self.first.samples

    @property
    def no_answer(self) -> float:
        return self._share("no_answer")

    @property
    def loops(self) -> float:
        return self._share("loops")

    def _share(self, name: str) -> float:
        total = sum(cell.samples * len(cell.problems) for cell in self.cells)
        return 100 * math.fsum(getattr(cell, name) for cell in self.cells) / total

    @property
    def kl(self) -> list[float]:
        """Of each chain."""
        return self._by_problem("kl")

    @property
    def kl_curve(self) -> list[float | None]:
        """Mean over chains per step of the curve; over those that get there."""
        longest = max(len(cell.kl_curve) for cell in self.cells)
        points: list[float | None] = []
        for i in range(longest):
            values = [
                (value, len(cell.kl))
                for cell in self.cells
                for value in cell.kl_curve[i : i + 1]
                if value is not None
            ]
            weight = sum(count for _, count in values)
            points.append(sum(v * count for v, count in values) / weight if weight else None)
        return points

    @property
    def attn_err(self) -> list[float]:
        """Per layer, mean over cells."""
        return _column_means([cell.attn_err for cell in self.cells])

    @property
    def flatness(self) -> list[list[float]]:
        """Per layer, mean over cells; empty without patterns."""
        layers = zip(*(cell.flatness for cell in self.cells), strict=True)
        return [_column_means(layer) for layer in layers]

    def passes(self, k: int) -> list[float]:
        """Chance per problem, in percent, that k of its samples hold a correct one."""
        return [100 * pass_at_k(self.samples, right, k) for right in self._by_problem("right")]

    def majorities(self, k: int) -> list[float]:
        """Credit per problem, in percent, of a vote among k of its samples: a power of two, or
        all of them."""
        pairs = zip(self._by_problem("right"), self._by_problem("wrong"), strict=True)
        return [
            100 * _majorities(self.samples, right, tuple(sorted(wrong.values())))[k]
            for right, wrong in pairs
        ]

    def _by_problem(self, name: str) -> list[Any]:
        values = {
            problem: value
            for cell in self.cells
            for problem, value in zip(cell.problems, getattr(cell, name), strict=True)
        }
        return [values[problem] for problem in sorted(values)]


def results(cells: Iterable[Cell]) -> list[Result]:
    """Cells grouped, in order of first appearance; repeated problems count once."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        key = (cell.model, cell.method, cell.bits_k, cell.bits_v, cell.task, cell.seed)
        groups.setdefault(key, []).append(cell)
    return [Result(tuple(group)) for group in groups.values()]


def compare(ours: Result, theirs: Result, values: str, k: int | None = None) -> Paired:
    """``kl``, or ``passes`` or ``majorities`` at ``k``, of ``ours`` minus ``theirs`` on common
    problems.

    Raises:
        ValueError: they have fewer than two problems in common.
    """
    common = set(ours.problems) & set(theirs.problems)
    return Paired.test(on(ours, common, values, k), on(theirs, common, values, k))


def on(result: Result, problems: Collection[str], values: str, k: int | None = None) -> list[float]:
    """``kl``, or ``passes`` or ``majorities`` at ``k``, of those of ``problems`` that it has."""
    found = getattr(result, values)
    pairs = zip(result.problems, found if k is None else found(k), strict=True)
    return [value for name, value in pairs if name in problems]


def rows(found: Sequence[Result]) -> list[dict[str, Any]]:
    """The published rows: one per result and k, and one with k null where only KL is known.

    ``kl`` and ``attn_err`` (mean over layers) come from the forced chains of the same level;
    ``stderr`` is that of ``maj_at_k`` over problems, or of ``kl`` where k is null.
    """

    def key(result: Result) -> tuple[str, str, int, int, str]:
        cell = result.first
        return cell.model, cell.method, cell.bits_k, cell.bits_v, result.level

    forced = {key(result): result for result in found if result.kind == "forced"}
    published = []
    for result in found:
        cell, chain = result.first, forced.get(key(result))
        common: dict[str, Any] = {
            "model": cell.model,
            "method": cell.method,
            "bits_k": cell.bits_k,
            "bits_v": cell.bits_v,
            "bits_per_element": round(result.bits_per_element, 4),
            "context": cell.context,
            "task": cell.task,
        }
        measured = {
            "kl": mean_and_stderr(chain.kl)[0] if chain else None,
            "attn_err": mean_and_stderr(chain.attn_err)[0] if chain else None,
            "n_problems": len(result.problems),
            "seed": cell.seed,
            "commit": cell.commit,
        }
        if result.kind == "forced":
            empty = dict.fromkeys(("k", "pass_at_1", "pass_at_k", "maj_at_k"))
            stderr = mean_and_stderr(result.kl)[1] if len(result.kl) > 1 else None
            published.append(common | empty | {"stderr": stderr} | measured)
            continue
        passes = {k: mean_and_stderr(result.passes(k))[0] for k in powers_of_two(result.samples)}
        for k, solved in passes.items():
            maj, stderr = mean_and_stderr(result.majorities(k))
            rates: dict[str, Any] = {"k": k, "pass_at_1": passes[1], "pass_at_k": solved}
            rates |= {"maj_at_k": maj, "stderr": stderr}
            published.append(common | rates | measured)
    return published


@cache
def _majorities(samples: int, right: int, wrong: tuple[int, ...]) -> dict[int, float]:
    """maj@k by k, of votes that problems often have in common."""
    answers: list[str | None] = [*("right" for _ in range(right))]
    answers += [str(i) for i, count in enumerate(wrong) for _ in range(count)]
    answers += [None] * (samples - len(answers))
    ks = powers_of_two(samples)
    credits = maj_at_each_k(answers, [answer == "right" for answer in answers], ks)
    return dict(zip(ks, credits, strict=True))


def _column_means(table: Iterable[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*table, strict=True)]
