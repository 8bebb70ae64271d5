"""A run in numbers: ``metrics.json``, one table, one plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .metrics import summarise
from .origin import Origin
from .runner import Run
from .selection import Scores

Metrics = Mapping[str, Any]

UNKNOWN = "–"


def variant_metrics(drawn: Run, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Everything ``metrics.json`` says about one variant.

    Rates are in [0, 1]; see ``metrics.summarise`` for those of the samples. Speed and read counts
    cover the sessions that came to their end; the state of the cache is the last session's.
    """
    config, sessions = drawn.config, drawn.sessions.items
    last = sessions[-1]
    result = summarise(drawn.samples.items, config.n, config.select, scores)
    seconds = math.fsum(session.seconds for session in sessions)
    tokens = sum(session.completion_tokens for session in sessions)
    reads = sum(session.kv_reads or 0 for session in sessions)
    shared = sum(session.kv_reads_shared or 0 for session in sessions)
    counted = last.kv_reads is not None
    return result | {
        "partial": result["n_problems"] < config.num_problems,
        "kv_bytes_per_token": last.bytes_per_token,
        "bf16_kv_bytes_per_token": last.bf16_bytes_per_token,
        "kv_tokens": last.kv_tokens,
        "kv_bytes": last.kv_bytes,
        "table_bytes": last.table_bytes,
        "window_bytes": last.window_bytes,
        "tables_live": last.tables_live,
        "table_slots": last.table_slots,
        "tables_mined": last.tables_mined,
        "tables_inherited": last.tables_inherited,
        "kv_reads": reads if counted else None,
        "kv_reads_shared": shared if counted else None,
        "shared_reads": shared / reads if counted and reads else None,
        "wall_seconds": seconds,
        "decoded_tokens": tokens,
        "decoded_tokens_per_second": tokens / seconds if tokens else None,
        "sessions": len(sessions),
        "server": last.server,
        "origin": asdict(Origin.read(drawn.origin)),
    }


def with_same_memory(variants: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The metrics with ``kv_tokens_same_memory``: the tokens that fit into bf16's ``kv_bytes`` (the
    first variant's without bf16), at the tokens per byte that each engine really has.

    Engines get the same budget, but SGLang takes it from what is free when each one starts, which
    on a CPU drifts with the operating system's file cache.
    """
    memory = _base(variants)["kv_bytes"]
    return {
        name: {
            **row,
            "kv_tokens_same_memory": int(row["kv_tokens"] * memory / row["kv_bytes"])
            if memory and row["kv_bytes"]
            else None,
        }
        for name, row in variants.items()
    }


def table(variants: Mapping[str, Metrics], n: int, select: Sequence[str] = ("majority",)) -> str:
    """The table of a run, one line per variant, with a column for each way of selecting one of
    ``n`` answers; ratios are to bf16, else to the first."""
    base = _base(variants)["kv_tokens_same_memory"]
    picked = [curve_key(name) for name in select]
    head = (
        "cache", "pass@1", *(f"{key.removesuffix('_at_k')}@{n}" for key in picked),
        "KV bytes/token", "KV tokens in the same memory",
        "decoded tok/s", "tables held", "shared reads",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for name, row in variants.items():
        rows.append(
            (
                name + (" (partial)" if row["partial"] else ""),
                _rate(row["pass_at_1"], row["stderr"]),
                *(
                    _rate(row[key][str(n)], row[f"{key}_stderr"][str(n)]) if key in row else UNKNOWN
                    for key in picked
                ),
                _count(row["kv_bytes_per_token"]),
                _count(row["kv_tokens_same_memory"]) + _ratio(row["kv_tokens_same_memory"], base),
                _count(row["decoded_tokens_per_second"]),
                _count(row["tables_live"]),
                UNKNOWN if row["shared_reads"] is None else f"{row['shared_reads']:.1%}",
            )
        )
    return aligned(rows)


def curve_key(select: str) -> str:
    """The key of ``metrics.json`` for a selection's rates by k."""
    return "maj_at_k" if select == "majority" else f"{select}_at_k"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """``rows``, head first, as a table for a terminal; all columns but the first flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join((cells[0].ljust(len(first)), *rest)))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def plot(
    variants: Mapping[str, Metrics],
    title: str,
    path: Path,
    select: Sequence[str] = ("majority",),
) -> None:
    """Draw accuracy over k with standard errors, a line per variant and selection, and the KV
    tokens that fit, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, row) in enumerate(variants.items()):
        color = f"C{number}"
        for marker, picked in zip(itertools.cycle("osD^v"), select, strict=False):
            key = curve_key(picked)
            if key not in row:
                continue
            ks = [int(k) for k in row[key]]
            rates = [100 * row[key][str(k)] for k in ks]
            errors = [100 * (row[f"{key}_stderr"][str(k)] or 0) for k in ks]
            label = name if len(select) == 1 else f"{name} {picked}"
            curves.errorbar(ks, rates, errors, marker=marker, capsize=3, label=label, color=color)
        if row["kv_tokens_same_memory"] is not None:
            drawn = bars.bar(name, row["kv_tokens_same_memory"], color=color)
            bars.bar_label(drawn, fmt="{:,.0f}")
    ks = [int(k) for k in next(iter(variants.values()))["maj_at_k"]]
    curves.set_xscale("log", base=2)
    curves.set_xticks(ks, [str(k) for k in ks])
    curves.set(xlabel="k samples per problem", ylabel="right, %", title=title)
    curves.grid(alpha=0.3)
    curves.legend(title="KV cache, selection")
    bars.margins(y=0.1)
    bars.set(xlabel="KV cache", ylabel="tokens", title="KV tokens in the same memory")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _base(variants: Mapping[str, Metrics]) -> Metrics:
    return variants.get("bf16") or next(iter(variants.values()))


def _rate(mean: float, error: float | None) -> str:
    return (
        f"{100 * mean:.1f} %"
        if not error or math.isnan(error)
        else (f"{100 * mean:.1f} ± {100 * error:.1f} %")
    )


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "" if not value or not base or value == base else f" ({value / base:.2f}×)"
