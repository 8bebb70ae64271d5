"""pass@k, maj@k and best@k of all k from one set of samples, with errors over problems."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .records import Sample
from .selection import Scores, best_at_k, sample_scores


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 … up to ``n``, and ``n`` itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that ``k`` of ``n`` samples drawn without replacement hold a correct one.

    The unbiased estimator 1 - C(n - correct, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374).
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Expected credit of a majority vote among ``k`` of the samples.

    Exact over all subsets of size ``k``. Samples without an answer do not vote; correct answers
    vote as one however they are written; t answers that tie for the most votes get 1 / t each.
    """
    return maj_at_each_k(answers, correct, [k])[0]


def maj_at_each_k(
    answers: Sequence[str | None], correct: Sequence[bool], ks: Sequence[int]
) -> list[float]:
    """:func:`maj_at_k` of every ``k`` of ``ks``, which have most of the work in common."""
    right = sum(correct)
    wrong = Counter(
        answer
        for answer, good in zip(answers, correct, strict=True)
        if not good and answer is not None
    )
    silent = len(answers) - right - wrong.total()
    # No number below exceeds that of all subsets of any size.
    integers = np.int64 if len(answers) < 63 else object
    subsets = np.array([math.comb(len(answers), k) for k in ks], integers)
    credit = np.zeros(len(ks))
    for votes in range(1, min(right, max(ks)) + 1):
        others = max(ks) - votes
        # ways[size, ties]: subsets of the wrong answers, none with more than `votes` votes and
        # `ties` of them with exactly as many.
        ways = np.zeros((others + 1, others // votes + 1), integers)
        ways[0, 0] = 1
        for count in wrong.values():
            grown = np.zeros_like(ways)
            for taken in range(min(count, votes, others) + 1):
                ties = int(taken == votes)
                stop = ways.shape[0] - taken, ways.shape[1] - ties
                grown[taken:, ties:] += ways[: stop[0], : stop[1]] * math.comb(count, taken)
            ways = grown
        # Samples without an answer fill up what is left of each k.
        left = [[k - votes - size for size in range(others + 1)] for k in ks]
        filled = [[math.comb(silent, n) if n >= 0 else 0 for n in sizes] for sizes in left]
        won = math.comb(right, votes) * (np.array(filled, integers) @ ways)
        shares = (won / subsets[:, None]).astype(float)
        credit += shares @ (1 / np.arange(1, ways.shape[1] + 1))
    found: list[float] = credit.tolist()
    return found


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the error of a single value is NaN."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def whole_groups(samples: Iterable[Sample], n: int) -> list[list[Sample]]:
    """The samples of each problem that has all ``n`` of them.

    Raises:
        ValueError: no problem has.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem, []).append(sample)
    whole = [group for group in groups.values() if len(group) == n]
    if not whole:
        raise ValueError(f"no problem has all of its {n} samples: nothing to measure")
    return whole


def summarise(
    samples: Iterable[Sample],
    n: int,
    select: Sequence[str] = (),
    scores: Mapping[str, Scores] | None = None,
) -> dict[str, Any]:
    """Rates in [0, 1] over the problems that have all ``n`` samples.

    ``select`` names ways of picking one answer beside the majority, ``scores`` has what scorers
    think of the samples, by selection.

    Keys: ``n_problems``, ``n_samples``, ``pass_at_1`` and its ``stderr``, ``pass_at_k``,
    ``maj_at_k``, ``<selection>_at_k`` and their ``_stderr`` by k, ``no_answer`` (nothing could be
    read from the sample), ``truncated`` (the sample ran into its length limit), ``by_level`` if
    problems have levels.

    Raises:
        ValueError: no problem has all its samples, or a selection lacks a score.
    """
    given = scores or {}
    whole = whole_groups(samples, n)

    def rates(groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        result = _rates(groups, n)
        for name in select:
            if name != "majority":
                scored = [sample_scores(name, group, given.get(name, {})) for group in groups]
                result |= _best(name, groups, scored, n)
        return result

    flat = [sample for group in whole for sample in group]
    result = rates(whole) | {
        "no_answer": sum(sample.answer is None for sample in flat) / len(flat),
        "truncated": sum(sample.finish_reason == "length" for sample in flat) / len(flat),
        "completion_tokens_mean": sum(sample.completion_tokens for sample in flat) / len(flat),
        "cached_tokens_mean": sum(sample.cached_tokens for sample in flat) / len(flat),
    }
    levels = sorted({group[0].level for group in whole if group[0].level is not None})
    if levels:
        result["by_level"] = {
            level: rates([group for group in whole if group[0].level == level]) for level in levels
        }
    return result


def _rates(groups: Sequence[Sequence[Sample]], n: int) -> dict[str, Any]:
    result: dict[str, Any] = {"n_problems": len(groups), "n_samples": len(groups) * n}
    for name in ("pass_at_k", "maj_at_k"):
        result[name], result[f"{name}_stderr"] = {}, {}
    ks = powers_of_two(n)
    votes = [
        maj_at_each_k([s.answer for s in group], [s.correct for s in group], ks) for group in groups
    ]
    for k, majorities in zip(ks, zip(*votes, strict=True), strict=True):
        passes = [pass_at_k(n, sum(sample.correct for sample in group), k) for group in groups]
        for name, values in (("pass_at_k", passes), ("maj_at_k", majorities)):
            result[name][str(k)], result[f"{name}_stderr"][str(k)] = mean_and_stderr(values)
    return result | {
        "pass_at_1": result["pass_at_k"]["1"],
        "stderr": result["pass_at_k_stderr"]["1"],
    }


def _best(
    name: str, groups: Sequence[Sequence[Sample]], scored: Sequence[Sequence[float]], n: int
) -> dict[str, dict[str, float]]:
    means, errors = {}, {}
    for k in powers_of_two(n):
        rates = [
            best_at_k(scores, [sample.correct for sample in group], k)
            for group, scores in zip(groups, scored, strict=True)
        ]
        means[str(k)], errors[str(k)] = mean_and_stderr(rates)
    return {f"{name}_at_k": means, f"{name}_at_k_stderr": errors}
