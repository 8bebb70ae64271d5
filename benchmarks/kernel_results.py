"""The rows that bench_kernels writes: reading them, targets missed, tables for a README."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks.kernel_cases import BITS, PLAN_TARGET_US, PROMPTS, TARGETS
from benchmarks.rows import Row, packages, table
from recipes.environment import git_commit, hardware, versions

BASELINES = ("flashinfer_us", "flashinfer_fp8_us", "cascade_us")


HEADER = (
    f"{'case':36}{'bits':>4}{'us':>9}{'p20':>9}{'p80':>9}{'GB/s':>7}{'roof':>6}"
    f"{'x bf16':>9}{'x fp8':>9}{'x cascade':>11}{'plan us':>9}"
)


def made_with() -> Row:
    """What rows of kernels say of GPU, versions and commit."""
    return {
        "gpu": hardware()["gpu"],
        "versions": versions() | {"cuda": torch.version.cuda},
        "commit": git_commit(),
    }


def line(row: Row) -> str:
    """One row under :data:`HEADER`: time, bandwidth, percent of the packed roofline, how many times
    faster than each baseline, time of the planner."""
    plan = "" if row["plan_us"] is None else f"{row['plan_us']:.1f}"
    gains = ["" if row[name] is None else f"{row[name] / row['us']:.2f}" for name in BASELINES]
    return (
        f"{row['case']:36}{row['bits_k']}/{row['bits_v']:<2}{row['us']:9.1f}{row['us_p20']:9.1f}"
        f"{row['us_p80']:9.1f}{row['bytes'] / row['us'] / 1e3:7.0f}"
        f"{100 * row['roofline_us'] / row['us']:5.0f}%{gains[0]:>9}{gains[1]:>9}"
        f"{gains[2]:>11}{plan:>9}"
    )


def misses(rows: Iterable[Row], page: int) -> list[str]:
    """One line per target that is not reached or not measured with ``page`` slots per page, in the
    order of allocation: other rows do not count."""
    rows = [row for row in rows if row["page"] == page and not row["shuffle"]]
    measured = {(row["case"], row["bits_k"], row["bits_v"]): row["us"] for row in rows}
    missed = []
    for case, targets in TARGETS.items():
        for (k_bits, v_bits), target in targets.items():
            us = measured.get((case.name, k_bits, v_bits))
            what = f"{case.name} {k_bits}/{v_bits}"
            if us is None:
                missed.append(f"{what}: not measured, target {target:g} us")
            elif us > target:
                missed.append(f"{what}: {_over(us, target)}")
    for case in PROMPTS:
        # The same work whatever the bits.
        plans = [row["plan_us"] for row in rows if row["case"] == case.name]
        if not plans:
            missed.append(f"{case.name} planned: not measured, target {PLAN_TARGET_US:g} us")
        elif max(plans) > PLAN_TARGET_US:
            missed.append(f"{case.name} planned: {_over(max(plans), PLAN_TARGET_US)}")
    return missed


def _over(us: float, target: float) -> str:
    return f"{us:.1f} us, target {target:g} us ({100 * (us / target - 1):.0f} % over)"


def best_baseline(row: Row) -> float | None:
    """The fastest FlashInfer time of the row's case; None where none was measured."""
    return min((row[name] for name in BASELINES if row[name] is not None), default=None)


def markdown(rows: list[Row]) -> str:
    """A table per suite, a line per case, our bit widths side by side. Cells below 1 lose."""
    sections = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        cases: dict[str, list[Row]] = {}
        for row in rows:
            if row["suite"] == suite:
                cases.setdefault(row["case"], []).append(row)
        bits = " · ".join(f"{k}/{v}" for k, v in BITS)
        columns = f"case|FlashInfer bf16|fp8|cascade|ours {bits}|% of roofline|× best FlashInfer"
        head = columns.split("|")
        lines = [head, ["---"] * len(head), *(_line(name, of) for name, of in cases.items())]
        sections.append(f"**{suite}**, µs per layer\n\n{table(lines)}")
    return "\n\n".join([*sections, _provenance(rows[0])])


def _line(name: str, of_case: list[Row]) -> list[str]:
    def cells(values: Iterable[float | None], digits: int) -> str:
        return " · ".join("–" if value is None else f"{value:.{digits}f}" for value in values)

    by_bits = {(row["bits_k"], row["bits_v"]): row for row in of_case}

    def ours(value: Callable[[Row], float | None]) -> list[float | None]:
        return [value(by_bits[bits]) if bits in by_bits else None for bits in BITS]

    def gain(row: Row) -> float | None:
        best = best_baseline(row)
        return None if best is None else best / row["us"]

    return [
        name,
        *(cells([of_case[0][baseline]], 0) for baseline in BASELINES),
        cells(ours(lambda row: row["us"]), 1),
        cells(ours(lambda row: 100 * row["roofline_us"] / row["us"]), 0),
        cells(ours(gain), 2),
    ]


def _provenance(row: Row) -> str:
    return (
        f"{row['gpu']}, device copy {row['copy_gbps']:.0f} GB/s (read + write), bfloat16 matmul "
        f"{row['matmul_tflops']:.0f} TFLOP/s, page size {row['page']}; {packages(row)}; "
        f"commit {row['commit']}."
    )
