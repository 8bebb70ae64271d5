"""A table per model and task of cells on standard input, for a terminal.

gunzip -c cells.jsonl.gz | python -m benchmarks.quality.brief
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import orjson

from benchmarks.quality.cells import Cell
from benchmarks.quality.summary import VOTES, Result, compare, results
from recipes.metrics import mean_and_stderr
from recipes.report import aligned


def table(found: Sequence[Result]) -> str:
    """Results of one model and task: KL, or rates with their paired difference to bf16."""
    exact = next((result for result in found if result.first.method == "bf16"), None)
    lines = []
    for result in found:
        cell = result.first
        line = [f"{cell.method} {cell.bits_k}/{cell.bits_v}", f"{result.bits_per_element:.2f}"]
        if result.kind == "forced":
            line.append(_value(result.kl, 5))
            line += [f"{error:.3f}" for error in result.attn_err]
        else:
            k = min(VOTES, result.samples)
            line += [
                str(len(result.problems)),
                _value(result.passes(1)),
                _value(result.majorities(k)),
            ]
            if exact is not None and result is not exact:
                test = compare(result, exact, "majorities", k)
                line.append(f"{test.difference:+.2f} ± {test.stderr:.2f}")
            else:
                line.append("")
            line.append(f"{sum(cell.seconds for cell in result.cells):.0f} s")
        lines.append(line)
    if found[0].kind == "forced":
        head = ["method", "bits", "KL", *("layer" for _ in found[0].attn_err)]
    else:
        head = ["method", "bits", "problems", "pass@1", f"maj@{VOTES}", "to bf16", "took"]
    return aligned([head, *lines])


def _value(values: Sequence[float], digits: int = 2) -> str:
    mean, stderr = mean_and_stderr(values)
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"


def main(lines: Iterable[Any] = sys.stdin) -> None:
    found = results(Cell(**orjson.loads(line)) for line in lines)
    found.sort(key=lambda result: (result.first.model, result.first.task))
    for (model, task), group in groupby(found, lambda r: (r.first.model, r.first.task)):
        same = list(group)
        print(f"\n{model}, {task}: {same[0].first.context} tokens of context\n{table(same)}")


if __name__ == "__main__":
    main()
