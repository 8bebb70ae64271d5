"""``results/quality.jsonl`` and ``docs/quality.md`` with its plots, from the cells of a run.

python -m benchmarks.report_quality
python -m benchmarks.report_quality --cells mine.jsonl --tables
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.quality.cells import Cell
from benchmarks.quality.formatting import small, table
from benchmarks.quality.methods import SETTINGS, Setting
from benchmarks.quality.plots import plot_curves, plot_storage
from benchmarks.quality.storage import bits_at
from benchmarks.quality.summary import results, rows
from benchmarks.quality.tables import FEWER_BITS, Report
from recipes.records import Records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = Path(__file__).parent / "quality" / "report.md"
STORAGE_CONTEXT = 4096


def storage() -> str:
    """Bits per element of a prompt alone, at two head dims."""
    lines = []
    smaller = [s for method in FEWER_BITS for s in Setting.parse(method.replace(" ", ":"))]
    for setting in SETTINGS + smaller:
        bits = [f"{bits_at(setting, STORAGE_CONTEXT, d):.2f}" for d in (64, 128)]
        lines.append([f"{setting.method} {setting.bits_name}", *bits])
    return table(["method", "head_dim 64", "head_dim 128"], lines)


def logit_errors(path: Path) -> str:
    """Of the worst head, by layer."""
    found = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    lines = [
        [row["model"], row["method"].replace(":", " "), *(f"{e:.2f}" for e in row["errors"])]
        for row in found
    ]
    layers = [f"layer {i}" for i in range(max(len(row["errors"]) for row in found))]
    return table(["model", "method", *layers], lines)


def served(path: Path) -> str:
    if not path.exists():
        return "Not measured."
    found = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    lines = [
        [
            row["variant"],
            f"{row['correct']} of {row['problems']}",
            str(row["tokens"]),
            small(row["to_simulator"]),
            small(row["to_exact"]),
        ]
        for row in found
    ]
    head = ["engine", "right", "tokens", "to the simulator, nats", "to exact attention, nats"]
    return table(head, lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=Path, default=RESULTS / "quality_cells.jsonl")
    parser.add_argument("--served", type=Path, default=RESULTS / "quality_served.jsonl")
    parser.add_argument("--memory", type=Path, default=RESULTS / "equal_memory.txt")
    parser.add_argument("--logits", type=Path, default=RESULTS / "quality_logits.jsonl")
    parser.add_argument("--rows", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--tables", action="store_true", help="print what --cells has, no more")
    args = parser.parse_args(argv)
    found = results(Records(args.cells, Cell).items)
    report = Report(found)
    if args.tables:
        for make in (report.losses, report.answers, report.by_samples, report.chains):
            print(make(), end="\n\n")
        return
    lines: list[dict[str, Any]] = rows(found)
    args.rows.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in lines))
    args.docs.mkdir(exist_ok=True)
    sections: dict[str, Callable[[], str]] = {
        "CHAINS": report.chains,
        "LOSSES": report.losses,
        "ANSWERS": report.answers,
        "BY_SAMPLES": report.by_samples,
        "FLATNESS": report.flatness,
        "CONTESTS": report.contests,
        "FEWER_BITS": report.fewer_bits,
        "CHOICES": report.choices,
        "TARGETS": report.targets,
        "CLAIMS": report.claims,
        "GUARD": lambda: logit_errors(args.logits),
        "EQUAL_MEMORY": lambda: args.memory.read_text(encoding="utf-8").strip(),
        "STORAGE": storage,
        "SERVED": lambda: served(args.served),
    }
    page = TEXT.read_text(encoding="utf-8")
    for key, make in sections.items():
        page = page.replace(f"<!-- {key} -->", make())
    (args.docs / "quality.md").write_text(page, encoding="utf-8")
    plot_curves(report, args.docs / "quality_curve.png")
    plot_storage(report, args.docs / "quality_bits.png")


if __name__ == "__main__":
    main()
