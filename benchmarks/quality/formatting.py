"""Numbers and tables of the published page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.statistics import Paired
from recipes.metrics import mean_and_stderr


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    parts = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in parts)


def value(values: Sequence[float], digits: int = 1) -> str:
    mean, stderr = mean_and_stderr(values)
    if stderr != stderr:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"


def small(number: float) -> str:
    return f"{number:.1e}" if number < 0.001 else f"{number:.4f}"


def paired(result: Paired) -> str:
    return f"{result.difference:+.1f} ± {result.stderr:.1f} ({significance(result)})"


def significance(result: Paired) -> str:
    return "p < 0.001" if result.p < 0.001 else f"p = {result.p:.2f}"


def interval(test: Paired) -> tuple[float, float]:
    """95 % of a difference in points. Where all n problems agree on it, up to 3 in n of others
    may not (rule of three), each by up to 100 points."""
    reach = 1.96 * test.stderr if test.stderr > 0 else 300 / test.n
    return test.difference - reach, test.difference + reach
