"""The rows that bench_serving writes: reading them, targets missed, table and plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import Row, packages, table
from benchmarks.serving_cases import FLOOR, FLOORS, TARGETS

BASELINE = "bf16"
JUDGED = "4/4"
"""The bits that the targets are for."""

HEADER = (
    f"{'case':46}{'kv':>5}{'tok/s':>9}{'step ms':>9}{'TTFT ms':>9}{'ITL p50':>9}{'p99':>7}"
    f"{'running':>8}{'KV tokens':>11}{'samples/min':>12}"
)


def line(row: Row) -> str:
    """One row under :data:`HEADER`."""

    def shown(name: str, digits: int) -> str:
        return "" if row[name] is None else f"{row[name]:.{digits}f}"

    return (
        f"{row['case']:46}{row['kv']:>5}{row['tok_s']:9.0f}{shown('step_ms', 2):>9}"
        f"{shown('ttft_ms', 1):>9}{shown('itl_ms_p50', 2):>9}{shown('itl_ms_p99', 2):>7}"
        f"{shown('peak_running', 0):>8}{row['kv_tokens']:11d}{shown('samples_min', 0):>12}"
    )


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Rows by case, then by KV cache."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["kv"]] = row
    return found


def misses(rows: list[Row]) -> list[str]:
    """One line per target that is not reached or not measured."""
    targets = {cell.name: target for cell, target in TARGETS.items()}
    cases = by_case(rows)
    missed = []
    for case in dict.fromkeys([*targets, *cases]):
        kinds = cases.get(case, {})
        workload = next((row["workload"] for row in kinds.values()), None)
        target = targets.get(case, FLOORS.get(workload, FLOOR) if workload else FLOOR)
        if JUDGED not in kinds or BASELINE not in kinds:
            missed.append(f"{case}: {JUDGED} or {BASELINE} not measured, target {target:g} x")
            continue
        gain = kinds[JUDGED]["tok_s"] / kinds[BASELINE]["tok_s"]
        if gain < target:
            missed.append(f"{case}: {gain:.2f} x the tokens per second of stock, target {target:g}")
    return missed


def markdown(rows: list[Row]) -> str:
    """A line per case: tokens per second of every kind, and ours over stock's."""
    kinds = list(dict.fromkeys(row["kv"] for row in rows))
    speeds = [f"{kv} tok/s" for kv in kinds]
    head = ["case", *speeds, f"{JUDGED} × stock bf16", f"TTFT ms, bf16 · {JUDGED}"]
    lines = [head, ["---"] * len(head)]
    for case, found in by_case(rows).items():
        values = [f"{found[kv]['tok_s']:.0f}" if kv in found else "–" for kv in kinds]
        both = JUDGED in found and BASELINE in found
        gain = f"{found[JUDGED]['tok_s'] / found[BASELINE]['tok_s']:.2f}" if both else "–"
        ttft = [
            f"{found[kv]['ttft_ms']:.0f}" if kv in found and found[kv]["ttft_ms"] else "–"
            for kv in (BASELINE, JUDGED)
        ]
        lines.append([case, *values, gain, " · ".join(ttft)])
    row = rows[0]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    made_at = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f"{table(lines)}\n\n{row['gpu']}; {packages(row)}; {made_at}."


def headline(rows: list[Row]) -> str:
    """Best of N at a glance: tokens per second at :data:`JUDGED` bits and how many times stock's,
    a line per prompt length, a column per number of branches."""
    cells = {
        (found[JUDGED]["prompt"], found[JUDGED]["branches"]): (
            f"{found[JUDGED]['tok_s']:.0f} "
            f"({found[JUDGED]['tok_s'] / found[BASELINE]['tok_s']:.2f}×)"
        )
        for found in by_case(rows).values()
        if {JUDGED, BASELINE} <= set(found) and found[BASELINE]["workload"] == "best_of_n"
    }
    branches = sorted({n for _, n in cells})
    lines = [
        ["prompt tokens", *(f"n={n}" for n in branches)],
        ["---"] * (1 + len(branches)),
        *(
            [str(prompt), *(cells.get((prompt, n), "–") for n in branches)]
            for prompt in sorted({prompt for prompt, _ in cells})
        ),
    ]
    return table(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Tokens per second over stock's in bfloat16, best-of-N cells, by branches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [
        found
        for found in by_case(rows).values()
        if BASELINE in found and found[BASELINE]["workload"] == "best_of_n"
    ]
    prompts = sorted({found[BASELINE]["prompt"] for found in cases})
    figure, axes = pyplot.subplots(1, len(prompts), figsize=(3.2 * len(prompts), 3.2), sharey=True)
    for axis, prompt in zip([axes] if len(prompts) == 1 else axes, prompts, strict=True):
        of_prompt = [found for found in cases if found[BASELINE]["prompt"] == prompt]
        for kv in dict.fromkeys(row["kv"] for row in rows):
            points = sorted(
                (found[kv]["branches"], found[kv]["tok_s"] / found[BASELINE]["tok_s"])
                for found in of_prompt
                if kv in found
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=kv)
        axis.set(title=f"{prompt} prompt tokens", xlabel="branches", xscale="log")
        axis.set_xticks([1, 8, 32, 64, 128], labels=["1", "8", "32", "64", "128"])
        axis.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("tokens/s over stock bf16")
    first.legend()
    figure.suptitle(rows[0]["gpu"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
