"""``results/quality.jsonl`` and ``docs/quality.md`` with its plots, from the cells of a run.

python -m benchmarks.report_quality
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.quality.cells import CURVE_STEP, Cell
from benchmarks.quality.methods import METHODS, SETTINGS, split_method
from benchmarks.quality.statistics import ALPHA, POWER, Paired
from benchmarks.quality.storage import bits_at
from benchmarks.quality.summary import VOTES, Result, compare, results, rows
from patternkv_sgl.config import PatternKVConfig
from recipes.metrics import mean_and_stderr
from recipes.records import Records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXT = Path(__file__).parent / "quality" / "report.md"
STORAGE_CONTEXT = 4096
OURS = (
    "patternkv_sgl 2/2",
    "patternkv_sgl[protect=0] 2/2",
    "patternkv_sgl[protect=0,rotate=0] 2/2",
)
RIVALS = ("kivi_g32 2/2", "kivi_g128 2/2", "patternkv_paper 2/2", "ott 2/2")
"""What ours has to beat."""
CHOICES = ("patterns", "window", "sinks", "balance", "generated")
"""Options whose values are compared one at a time, with the others at their defaults."""
PAPER_CLAIMS = (
    # claim, the paper's number, bits, what it is compared with
    ("4-bit drop to 16 bits", "0.08 % (average, LongBench)", (4, 4), "bf16"),
    ("2-bit gain over KIVI", "1.00 points (LongBench 45.33 to 44.33)", (2, 2), "kivi_g128"),
)


def name(result: Result) -> str:
    return f"{result.first.method} {result.first.bits_k}/{result.first.bits_v}"


def order(result: Result) -> tuple[int, str, int, int, int]:
    cell = result.first
    method, _ = split_method(cell.method)
    return list(METHODS).index(method), cell.method, -cell.bits_k, -cell.bits_v, cell.context


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


def contest(ours: Result, theirs: Result) -> list[str]:
    """Who is compared, at which bits, in what, and ours minus theirs."""
    if ours.kind == "forced":
        what, test = "KL, nats", compare(ours, theirs, "kl")
        text = f"{test.difference:+.3f} ± {test.stderr:.3f} ({significance(test)})"
    else:
        k = min(VOTES, ours.samples)
        what = f"maj@{k}, points" if k > 1 else "pass@1, points"
        text = paired(compare(ours, theirs, "majorities", k))
    bits = f"{ours.bits_per_element:.2f} to {theirs.bits_per_element:.2f}"
    return [name(ours), name(theirs), bits, what, text]


class Report:
    """Every table of the page, from results of one seed."""

    def __init__(self, found: Sequence[Result]) -> None:
        self.found = sorted(found, key=order)
        self.models = list(dict.fromkeys(result.first.model for result in found))

    def pick(self, model: str, kind: str) -> dict[tuple[str, int, int, str], Result]:
        """By method, bits and level."""
        return {
            (r.first.method, r.first.bits_k, r.first.bits_v, r.level): r
            for r in self.found
            if r.first.model == model and r.kind == kind
        }

    def shown(self, model: str, kind: str) -> dict[tuple[str, int, int, str], Result]:
        """As :meth:`pick`, without the variants of ours that were tried one option at a time."""
        picked = self.pick(model, kind)
        return {k: r for k, r in picked.items() if "[" not in k[0] or name(r) in OURS}

    def exact(self, model: str, kind: str, level: str) -> Result | None:
        """bf16; that of ``demo`` for models which are the same function, bit for bit."""
        own = self.pick(model, kind).get(("bf16", 16, 16, level))
        if own is None and model.startswith("demo_outliers"):
            return self.pick("demo", kind).get(("bf16", 16, 16, level))
        return own

    def chains(self) -> str:
        """KL and attention error, a table per model."""
        parts = []
        for model in self.models:
            lines = []
            for (*_, level), result in self.shown(model, "forced").items():
                kl, stderr = mean_and_stderr(result.kl)
                points = [point for point in result.kl_curve if point is not None]
                lines.append(
                    [
                        name(result),
                        level,
                        f"{result.bits_per_element:.2f}",
                        f"{small(kl)} ± {small(stderr)}",
                        small(points[0]),
                        small(points[-1]),
                        *(f"{error:.3f}" for error in result.attn_err),
                    ]
                )
            if not lines:
                continue
            layers = [f"layer {i}" for i in range(len(lines[0]) - 6)]
            head = ["method", "level", "bits", "KL", "KL first", "KL last", *layers]
            cell = next(iter(self.shown(model, "forced").values()))
            first = cell.first
            parts.append(
                f"**{model}**: {len(cell.kl)} chains, {first.context} tokens of context, "
                f"{first.generated + 1} after it.\n\n{table(head, lines)}"
            )
        return "\n\n".join(parts)

    def answers(self) -> str:
        """Greedy and sampled answers, a table per model and kind."""
        parts = []
        for model in self.models:
            for kind in ("greedy", "sampled"):
                picked = self.shown(model, kind)
                lines, detectable = [], 0.0
                for (*_, level), result in picked.items():
                    n, k = result.samples, min(VOTES, result.samples)
                    size = f"{len(result.problems)} × {n}"
                    line = [name(result), level, size, f"{result.bits_per_element:.2f}"]
                    line.append(value(result.passes(1)))
                    if n > 1:
                        line += [value(result.majorities(k)), value(result.passes(k))]
                    exact = self.exact(model, kind, level)
                    if exact is not None and result is not exact:
                        tests = [compare(result, exact, "passes", 1)]
                        if n > 1:
                            tests.append(compare(result, exact, "majorities", k))
                        line += [paired(test) for test in tests]
                        if result.first.method == "patternkv_sgl":
                            detectable = max(detectable, tests[-1].detectable)
                    else:
                        line += ["–"] * (1 + (n > 1))
                    line += [f"{result.no_answer:.1f}", f"{result.loops:.1f}"]
                    lines.append(line)
                if not lines:
                    continue
                n = max(result.samples for result in picked.values())
                k = min(VOTES, n)
                reach = f"{detectable:.1f} points" if detectable else "unknown, no problem differs"
                votes = [f"maj@{k}", f"pass@{k}"] if n > 1 else []
                head = ["method", "level", "problems", "bits", "pass@1", *votes, "pass@1 − bf16"]
                head += [f"maj@{k} − bf16"] if n > 1 else []
                parts.append(
                    f"**{model}, {kind}**: percent, problems × answers to each. "
                    "Smallest difference of `patternkv_sgl` to bf16 found with power "
                    f"{POWER} (two-sided α = {ALPHA}): {reach}.\n\n"
                    + table([*head, "no answer", "loops"], lines)
                )
        return "\n\n".join(parts)

    def flatness(self) -> str:
        lines: list[list[str]] = []
        for model in self.models:
            for result in self.shown(model, "forced").values():
                if "[" in result.first.method:
                    continue
                for layer, ratios in enumerate(result.flatness):
                    cells = [f"{ratio:.3f}" for ratio in ratios]
                    line = [model, result.first.method, str(layer), *cells]
                    # Patterns, unlike codes, are often the same at other bits.
                    if line not in lines:
                        lines.append(line)
        head = ["model", "method", "layer", "K range", "K variance", "V range", "V variance"]
        return table(head, lines)

    def contests(self) -> str:
        """Ours at 2/2 against every competitor at 2/2: KL along chains, and answers."""
        lines = []
        for model in self.models:
            for kind in ("forced", "greedy", "sampled"):
                picked = self.shown(model, kind)
                rivals = [r for r in picked.values() if name(r) in RIVALS]
                for ours in (r for r in picked.values() if name(r) == OURS[0]):
                    for theirs in rivals:
                        if theirs.level == ours.level:
                            lines.append([model, ours.first.task, *contest(ours, theirs)])
        head = ["model", "task", "ours", "theirs", "bits, ours to theirs", "measure", "difference"]
        return table(head, lines)

    def choices(self) -> str:
        """What each option of ours does alone: KL along chains, by value; the default in bold."""
        lines = []
        defaults = {**vars(PatternKVConfig()), "balance": 1, "generated": 0, "protect": 1}
        for model in self.models:
            found: dict[tuple[str, int, int | None, str], dict[int, Result]] = {}
            for (method, *bits, level), result in self.pick(model, "forced").items():
                base, options = split_method(method)
                rotated, protect = options.pop("rotate", 1), options.pop("protect", 1)
                if base != "patternkv_sgl" or bits != [2, 2] or len(options) > 1:
                    continue
                for option in options or CHOICES:
                    number = options.get(option, int(defaults[option]))
                    found.setdefault((level, rotated, protect, option), {})[number] = result
                if not options:
                    found.setdefault((level, rotated, None, "protect"), {})[protect] = result
            for (level, rotated, kept, option), by_value in found.items():
                if len(by_value) < 2:
                    continue
                for number, result in sorted(by_value.items()):
                    kl, stderr = mean_and_stderr(result.kl)
                    mark = "**" if number == defaults[option] else ""
                    size = f"{result.bits_per_element:.2f}"
                    lines.append(
                        [
                            model,
                            level,
                            "yes" if rotated else "no",
                            "" if kept is None else "yes" if kept else "no",
                            option,
                            f"{mark}{number}{mark}",
                            size,
                            f"{small(kl)} ± {small(stderr)}",
                        ]
                    )
        head = ["model", "level", "rotated", "protected", "option", "value", "bits", "KL"]
        return table(head, lines)

    def targets(self) -> str:
        """What the defaults have to reach, on the sampled problems."""
        lines = []
        for model in self.models:
            picked = self.pick(model, "sampled")
            for bits, margin in (((4, 4), 0.3), ((4, 2), 0.5), ((2, 2), 1.0)):
                for level in dict.fromkeys(key[3] for key in picked):
                    ours = picked.get(("patternkv_sgl", *bits, level))
                    exact = self.exact(model, "sampled", level)
                    if ours is None or exact is None:
                        continue
                    test = compare(ours, exact, "majorities", min(VOTES, ours.samples))
                    low, high = interval(test)
                    verdict = "met" if low >= -margin else "missed" if high < -margin else "open"
                    lines.append(
                        [
                            model,
                            level,
                            name(ours),
                            f"−{margin}",
                            f"{low:+.1f} to {high:+.1f}",
                            verdict,
                        ]
                    )
        interval_head = f"95 % interval of maj@{VOTES} − bf16"
        head = ["model", "level", "method", "margin", interval_head, "verdict"]
        return table(head, lines)

    def claims(self) -> str:
        """The paper's claims next to the same comparisons here."""
        lines = []
        for title, claim, bits, rival in PAPER_CLAIMS:
            for method in ("patternkv_paper", "patternkv_sgl"):
                for kind in ("greedy", "sampled"):
                    picked = self.pick("demo", kind)
                    for level in dict.fromkeys(key[3] for key in picked):
                        ours = picked.get((method, *bits, level))
                        other_bits = (16, 16) if rival == "bf16" else bits
                        theirs = picked.get((rival, *other_bits, level))
                        if ours is None or theirs is None:
                            continue
                        test = compare(ours, theirs, "passes", 1)
                        here = f"{name(ours)} − {name(theirs)}, {kind} {level}"
                        lines.append([title, claim, here, paired(test)])
        picked = self.pick("demo", "sampled")
        for method in ("kivi_g128", "patternkv_paper", "patternkv_sgl"):
            for level in dict.fromkeys(key[3] for key in picked):
                result = picked.get((method, 2, 2, level))
                if result is None:
                    continue
                k = min(VOTES, result.samples)
                gain = Paired.test(result.majorities(k), result.passes(1))
                here = f"{name(result)}, maj@{k} − pass@1, {level}"
                claim = "+10 % on average (abstract, base not stated)"
                lines.append(["test-time-scaling gain at 2 bits", claim, here, paired(gain)])
        return table(["claim", "paper", "here", "points"], lines)


def storage() -> str:
    """Bits per element of a prompt alone, at two head dims."""
    lines = []
    for setting in SETTINGS:
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


def _most_chains(found: Iterable[Result]) -> str:
    return max(found, key=lambda result: len(result.problems)).level


def plot_curves(report: Report, path: Path) -> None:
    """KL over generated tokens at the level with most chains, 4/4, 4/2 and 2/2 side by side."""
    from matplotlib.figure import Figure

    shown = report.shown("demo", "forced")
    level = _most_chains(shown.values())
    methods = [*dict.fromkeys(key[0] for key in shown)]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    lines: dict[str, Any] = {}
    for axis, bits in zip(axes, ((4, 4), (4, 2), (2, 2)), strict=True):
        for (method, *widths, at_level), result in shown.items():
            if tuple(widths) != bits or at_level != level:
                continue
            points = [
                (CURVE_STEP * i, point)
                for i, point in enumerate(result.kl_curve)
                if point is not None
            ]
            color = f"C{methods.index(method) % 10}"
            (lines[method],) = axis.plot(
                *zip(*points, strict=True), marker="o", markersize=3, color=color
            )
        title = f"{bits[0]}/{bits[1]} bits, {level}"
        axis.set(yscale="log", xlabel="generated tokens", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL(bf16 || method), nats")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def plot_storage(report: Report, path: Path) -> None:
    """KL against bits per element at the level with most chains, every method and bit width."""
    from matplotlib.figure import Figure

    picked = report.pick("demo", "forced")
    level = _most_chains(picked.values())
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        points = [
            (result.bits_per_element, mean_and_stderr(result.kl)[0], name(result).split()[1])
            for key, result in picked.items()
            if key[0] == method and key[3] == level and method != "bf16"
        ]
        if points:
            x, y, labels = zip(*points, strict=True)
            axis.plot(x, y, marker="o", label=method)
            for at, label in zip(zip(x, y, strict=True), labels, strict=True):
                axis.annotate(label, at, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set(
        yscale="log",
        xlabel="bits per element, all in, one branch on its own",
        ylabel="KL(bf16 || method), nats",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=Path, default=RESULTS / "quality_cells.jsonl")
    parser.add_argument("--served", type=Path, default=RESULTS / "quality_served.jsonl")
    parser.add_argument("--memory", type=Path, default=RESULTS / "equal_memory.txt")
    parser.add_argument("--logits", type=Path, default=RESULTS / "quality_logits.jsonl")
    parser.add_argument("--rows", type=Path, default=RESULTS / "quality.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    found = results(Records(args.cells, Cell).items)
    report = Report(found)
    lines: list[dict[str, Any]] = rows(found)
    args.rows.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in lines))
    args.docs.mkdir(exist_ok=True)
    sections: dict[str, Callable[[], str]] = {
        "CHAINS": report.chains,
        "ANSWERS": report.answers,
        "FLATNESS": report.flatness,
        "CONTESTS": report.contests,
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
