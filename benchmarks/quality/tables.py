"""The tables of the published page, from results of one seed."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.formatting import interval, paired, significance, small, table, value
from benchmarks.quality.methods import METHODS, split_method
from benchmarks.quality.statistics import ALPHA, POWER, Paired
from benchmarks.quality.summary import VOTES, Result, compare, on
from patternkv_sgl.config import PatternKVConfig
from recipes.metrics import mean_and_stderr, powers_of_two

OURS = (
    "patternkv_sgl 2/2",
    "patternkv_sgl[protect=0] 2/2",
    "patternkv_sgl[protect=0,rotate=0] 2/2",
)
RIVALS = ("kivi_g32 2/2", "kivi_g128 2/2", "patternkv_paper 2/2", "ott 2/2")
"""What ours has to beat."""
FEWER_BITS = (
    "patternkv_sgl[patterns=32,window=16] 2/2",
    "patternkv_sgl[protect=0,patterns=32,window=0] 2/2",
)
"""Ours with half the patterns and half the window, which takes about as much as its rivals; and
without a window and 4 bits in any layer, which takes less than each of them."""
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
            sizes = {
                level: f"{level}: {len(result.kl)} chains, {result.first.context} tokens of "
                f"context and {result.first.generated + 1} after it"
                for (*_, level), result in self.shown(model, "forced").items()
            }
            parts.append(f"**{model}**, {'; '.join(sizes.values())}.\n\n{table(head, lines)}")
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

    def losses(self) -> str:
        """maj@k of every default method minus that of bf16, a row per model and a column per
        level, shortest prompts first."""
        sampled = [r for r in self.found if r.kind == "sampled" and "[" not in r.first.method]
        contexts = {result.level: result.first.context for result in sampled}
        levels = sorted(contexts, key=lambda level: (contexts[level], level))
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for result in sampled:
            model = result.first.model
            exact = self.exact(model, "sampled", result.level)
            if exact is None or exact is result:
                continue
            test = compare(result, exact, "majorities", min(VOTES, result.samples))
            text = f"{test.difference:+.1f} ± {test.stderr:.1f}"
            lines.setdefault((model, name(result)), {})[result.level] = text
        ordered = sorted(lines.items(), key=lambda line: self.models.index(line[0][0]))
        head = ["model", "method", *(f"{level}, {contexts[level]} tokens" for level in levels)]
        return table(head, [[*key, *(cells.get(x, "–") for x in levels)] for key, cells in ordered])

    def by_samples(self) -> str:
        """maj@k and pass@k of the default methods for every k, a table per model."""
        parts = []
        for model in self.models:
            picked = self.shown(model, "sampled")
            chosen = [r for r in picked.values() if "[" not in r.first.method]
            if not chosen:
                continue
            ks = powers_of_two(max(result.samples for result in chosen))
            lines = [
                [
                    name(result),
                    result.level,
                    *(
                        f"{value(result.majorities(k))} · {value(result.passes(k))}"
                        if k <= result.samples
                        else "–"
                        for k in ks
                    ),
                ]
                for result in chosen
            ]
            head = ["method", "level", *(f"k = {k}" for k in ks)]
            parts.append(f"**{model}**: maj@k · pass@k, percent.\n\n{table(head, lines)}")
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

    def fewer_bits(self) -> str:
        """Answers of ours at each of `FEWER_BITS`, of bf16 and of every competitor, on the problems
        that all of ours were asked; a block of rows per model and level. Differences are bold
        where ours takes no more bits."""
        lines = []
        for model in self.models:
            picked = self.pick(model, "sampled").values()
            for level in dict.fromkeys(result.level for result in picked):
                found = {name(result): result for result in picked if result.level == level}
                ours = [found[method] for method in FEWER_BITS if method in found]
                if not ours:
                    continue
                common = set.intersection(*(set(result.problems) for result in ours))
                k = min(VOTES, *(result.samples for result in ours))
                exact = self.exact(model, "sampled", level)
                rivals = [*([exact] if exact else []), *(found[r] for r in RIVALS if r in found)]
                for result in (*ours, *rivals):
                    line = [model, level, str(len(common)), name(result)]
                    line.append(f"{result.bits_per_element:.2f}")
                    line.append(value(on(result, common, "passes", 1)))
                    line.append(value(on(result, common, "majorities", k)))
                    for method in FEWER_BITS:
                        if result in ours or method not in found:
                            line.append("–")
                            continue
                        votes = [on(r, common, "majorities", k) for r in (found[method], result)]
                        smaller = found[method].bits_per_element <= result.bits_per_element
                        mark = "**" if smaller else ""
                        line.append(f"{mark}{paired(Paired.test(*votes))}{mark}")
                    lines.append(line)
        head = ["model", "level", "problems", "method", "bits", "pass@1", f"maj@{VOTES}"]
        return table([*head, *(f"{method} − it" for method in FEWER_BITS)], lines)

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
