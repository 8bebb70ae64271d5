"""The equal-memory curve: accuracy over the gigabytes of KV it takes, from saved best-of-n runs.

    python -m recipes.best_of_n --config recipes/demo/compare_runs.yaml
    python -m recipes.compare --results results/compare/*

Each cache gets a curve: maj@k of its samples over the bytes that the k branches of one problem
occupy in it. A second table asks what the same bytes buy in each cache: how many branches fit, and
how often their majority is right.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from .environment import demo_package
from .footprint import Footprint
from .metrics import maj_at_k, mean_and_stderr, powers_of_two, whole_groups
from .records import Records, Sample
from .report import UNKNOWN, aligned
from .settings import PATH, parse
from .variant import Variant

# Keys of a run's configuration in which compared runs may differ.
FREE = {
    "variants", "base_url", "concurrency", "cpu_threads", "timeout", "output", "select", "verifier",
    "reward_url", "reward_prompt", "top_logprobs", "mem_fraction_static", "engine_args", "model",
}  # fmt: skip


BUDGETS = 8


@dataclass(frozen=True)
class CompareConfig:
    """Every key of the recipe.

    Attributes:
        results: folders of best-of-n runs over the same problems with the same sampling.
        parallel: problems in memory at the same time, each with its k branches.
        output: folder for ``equal_memory.png``, ``.json`` and ``.txt``; None is the first of
            ``results``.
    """

    results: tuple[str, ...] = field(default=(), metadata=PATH)
    parallel: int = 1
    output: str | None = None

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results is missing: name one or more folders of best-of-n runs")
        if self.parallel < 1:
            raise ValueError(f"parallel {self.parallel}: expected at least 1")


@dataclass(frozen=True)
class Curve:
    """One cache: its footprint, and the samples of each problem that has all ``n``."""

    footprint: Footprint
    groups: list[list[Sample]]
    origin: dict[str, Any]

    def majority(self, k: int) -> tuple[float, float]:
        """maj@k in [0, 1] and its standard error over problems."""
        return mean_and_stderr(
            [
                maj_at_k([s.answer for s in group], [s.correct for s in group], k)
                for group in self.groups
            ]
        )


@dataclass(frozen=True)
class Comparison:
    """Caches over the same problems; ``skipped`` has why one is not among ``curves``."""

    n: int
    curves: dict[str, Curve]
    skipped: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what ``argv`` (default: the command line) names; gives the exit status."""
    description = "Accuracy over gigabytes of KV, from saved best-of-n runs."
    config = parse(CompareConfig, "compare", description, argv)
    try:
        demo_package("matplotlib", "plots need")
        comparison = load([Path(folder) for folder in config.results])
        folder = Path(config.output or config.results[0])
        folder.mkdir(parents=True, exist_ok=True)
        report(comparison, config.parallel, folder)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def load(folders: Sequence[Path]) -> Comparison:
    """The runs in ``folders``.

    Raises:
        ValueError: a folder holds no run, runs differ in problems, model or sampling, a cache is
            there twice, or its size is not known.
    """
    curves: dict[str, Curve] = {}
    skipped: dict[str, str] = {}
    first: dict[str, Any] = {}
    for folder in folders:
        path = folder / "metrics.json"
        if not path.exists():
            raise ValueError(f"{folder}: no metrics.json there; name folders of best-of-n runs")
        metrics = orjson.loads(path.read_bytes())
        skipped |= metrics.get("skipped", {})
        for name, row in metrics["variants"].items():
            if name in curves:
                raise ValueError(f"{folder}: {name} is in an earlier folder already; leave one out")
            samples = Records(folder / f"samples-{Variant(name).slug}.jsonl", Sample).items
            groups = whole_groups(samples, metrics["config"]["n"])
            same = {key: value for key, value in metrics["config"].items() if key not in FREE}
            same["model"] = row["origin"]["model_fingerprint"] or metrics["config"]["model"]
            same["problems"] = sorted(group[0].problem for group in groups)
            check_same(first or same, same, folder)
            first = first or same
            curves[name] = Curve(Footprint.of(name, row, groups), groups, row["origin"])
    if not curves:
        raise ValueError(f"{', '.join(map(str, folders))}: no variant has samples")
    missing = {name: why for name, why in skipped.items() if name not in curves}
    return Comparison(first["n"], curves, missing)


def check_same(first: Mapping[str, Any], other: Mapping[str, Any], folder: Path) -> None:
    """Make sure that two runs can be compared.

    Raises:
        ValueError: they differ in something else than the cache.
    """
    for key in first:
        if first[key] != other.get(key):
            was, now = (str(value)[:80] for value in (first[key], other.get(key)))
            raise ValueError(f"{folder}: {key} is {now}, in the first run {was}; compare like runs")


def curve_rows(comparison: Comparison, parallel: int) -> list[dict[str, Any]]:
    """The points of all curves: ``variant``, ``k``, ``gb`` (10⁹ bytes), ``maj_at_k``
    and ``stderr``."""
    rows = []
    for name, curve in comparison.curves.items():
        for k in powers_of_two(comparison.n):
            rate, error = curve.majority(k)
            size = parallel * curve.footprint.bytes(k) / 1e9
            rows.append({"variant": name, "k": k, "gb": size, "maj_at_k": rate, "stderr": error})
    return rows


def equal_rows(comparison: Comparison, parallel: int) -> list[dict[str, Any]]:
    """What ``BUDGETS`` amounts of memory buy in each cache, from what the smallest takes for one
    branch to what the largest takes for all: ``gb``, ``variant``, ``k`` (None if not even one
    branch fits), ``capped`` (more would fit than were sampled), ``maj_at_k`` and ``stderr``."""
    footprints = [curve.footprint for curve in comparison.curves.values()]
    least = min(footprint.bytes(1) for footprint in footprints)
    most = max(footprint.bytes(comparison.n) for footprint in footprints)
    rows = []
    for budget in np.geomspace(least, most, BUDGETS).tolist():
        for name, curve in comparison.curves.items():
            fits = curve.footprint.branches(budget)
            k = min(fits, comparison.n)
            rate, error = curve.majority(k) if k else (None, None)
            rows.append(
                {
                    "gb": parallel * budget / 1e9,
                    "variant": name,
                    "k": k or None,
                    "capped": fits > comparison.n,
                    "maj_at_k": rate,
                    "stderr": error,
                }
            )
    return rows


def report(comparison: Comparison, parallel: int, folder: Path) -> None:
    """Print both tables and write them with the plot into ``folder``."""
    curves, equal = curve_rows(comparison, parallel), equal_rows(comparison, parallel)
    problems = len(next(iter(comparison.curves.values())).groups)
    lines = [
        f"{problems} problems, {comparison.n} samples each; GB of KV for k branches of {parallel} "
        "problem(s), tables and windows included",
        "",
        _table(curves),
        "",
        "What equal memory buys (+: more would fit than were sampled)",
        "",
        _equal_table(equal, list(comparison.curves)),
        *(f"\n{name} is missing: {why}" for name, why in comparison.skipped.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (folder / "equal_memory.txt").write_text(text, encoding="utf-8")
    document = {
        "parallel": parallel,
        "n": comparison.n,
        "n_problems": problems,
        "curves": curves,
        "equal_memory": equal,
        "footprints": {name: asdict(c.footprint) for name, c in comparison.curves.items()},
        "origins": {name: curve.origin for name, curve in comparison.curves.items()},
        "skipped": comparison.skipped,
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    (folder / "equal_memory.json").write_bytes(orjson.dumps(document, option=options))
    plot(curves, folder / "equal_memory.png")
    print(f"{folder}: equal_memory.png, .json, .txt")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("cache", "k", "GB of KV", "maj@k")
    cells = [(row["variant"], str(row["k"]), _gb(row["gb"]), _percent(row)) for row in rows]
    return aligned([head, *cells])


def _equal_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    lines: list[tuple[str, ...]] = [("GB of KV", *(f"{name}: k, maj@k" for name in names))]
    for start in range(0, len(rows), len(names)):
        line = rows[start : start + len(names)]
        cells = (f"{row['k'] or UNKNOWN}{'+' * row['capped']}, {_percent(row)}" for row in line)
        lines.append((_gb(line[0]["gb"]), *cells))
    return aligned(lines)


def _gb(value: float) -> str:
    return f"{value:#.3g}"


def _percent(row: Mapping[str, Any]) -> str:
    if row["maj_at_k"] is None:
        return UNKNOWN
    error = "" if math.isnan(row["stderr"]) else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['maj_at_k']:.1f}{error} %"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw maj@k with standard errors over KV memory, a curve per cache, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = [row for row in rows if row["variant"] == name]
        size = [1e9 * row["gb"] for row in points]
        rate = [100 * row["maj_at_k"] for row in points]
        error = [0 if math.isnan(row["stderr"]) else 100 * row["stderr"] for row in points]
        drawn = axes.errorbar(size, rate, error, marker="o", capsize=3, label=name)
        for row, x, y in zip(points, size, rate, strict=True):
            axes.annotate(
                str(row["k"]), (x, y), xytext=(4, -10), textcoords="offset points", fontsize=8,
                color=drawn[0].get_color(),
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="KV memory (numbers: branches k)", ylabel="maj@k, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="KV cache")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
