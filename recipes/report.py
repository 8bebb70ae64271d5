"""A run in numbers: ``metrics.json``, one table, one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .metrics import summarise
from .records import Sample, Session

Metrics = Mapping[str, Any]

UNKNOWN = "–"
# Tables and windows take their part of the memory, which the pool's bytes do not include.
POOL_TOLERANCE = 0.15


def variant_metrics(
    samples: Sequence[Sample], sessions: Sequence[Session], n: int, n_wanted: int
) -> dict[str, Any]:
    """Everything ``metrics.json`` says about one variant.

    Rates are in [0, 1]; see ``metrics.summarise`` for those of the samples. Speed and read counts
    cover the sessions that came to their end; the state of the cache is the last session's.
    """
    last = sessions[-1]
    result = summarise(samples, n)
    seconds = math.fsum(session.seconds for session in sessions)
    tokens = sum(session.completion_tokens for session in sessions)
    reads = sum(session.kv_reads or 0 for session in sessions)
    shared = sum(session.kv_reads_shared or 0 for session in sessions)
    counted = last.kv_reads is not None
    pool = None
    if last.bytes_per_token is not None and last.kv_tokens is not None:
        pool = last.bytes_per_token * last.kv_tokens
    return result | {
        "partial": result["n_problems"] < n_wanted,
        "kv_bytes_per_token": last.bytes_per_token,
        "bf16_kv_bytes_per_token": last.bf16_bytes_per_token,
        "kv_tokens": last.kv_tokens,
        "kv_pool_bytes": pool,
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
    }


def table(variants: Mapping[str, Metrics], n: int) -> str:
    """The table of a run, one line per variant; ratios are to bf16, else to the first."""
    base = variants.get("bf16") or next(iter(variants.values()))
    head = (
        "cache", "pass@1", f"maj@{n}", "KV bytes/token", "KV tokens in the same memory",
        "decoded tok/s", "tables held", "shared reads",
    )  # fmt: skip
    rows = [head]
    for name, row in variants.items():
        rows.append(
            (
                name + (" (partial)" if row["partial"] else ""),
                _rate(row["pass_at_1"], row["stderr"]),
                _rate(row["maj_at_k"][str(n)], row["maj_at_k_stderr"][str(n)]),
                _count(row["kv_bytes_per_token"]),
                _count(row["kv_tokens"]) + _ratio(row["kv_tokens"], base["kv_tokens"]),
                _count(row["decoded_tokens_per_second"]),
                _count(row["tables_live"]),
                UNKNOWN if row["shared_reads"] is None else f"{row['shared_reads']:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join((cells[0].ljust(len(first)), *rest)))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def memory_note(variants: Mapping[str, Metrics]) -> str | None:
    """A warning if the engines did not have the same memory for KV, else None.

    SGLang takes its share of what is free when an engine starts, on a CPU of the machine's memory.
    """
    pools = {name: row["kv_pool_bytes"] for name, row in variants.items() if row["kv_pool_bytes"]}
    if not pools or max(pools.values()) <= (1 + POOL_TOLERANCE) * min(pools.values()):
        return None
    sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in pools.items())
    return (
        f"note: the memory for KV was not the same ({sizes}), so KV tokens do not compare; "
        "other programs changed what was free when the engines started"
    )


def plot(variants: Mapping[str, Metrics], title: str, path: Path) -> None:
    """Draw maj@k over k with standard errors, and the KV tokens that fit, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, row) in enumerate(variants.items()):
        ks = [int(k) for k in row["maj_at_k"]]
        rates = [100 * row["maj_at_k"][str(k)] for k in ks]
        errors = [100 * (row["maj_at_k_stderr"][str(k)] or 0) for k in ks]
        color = f"C{number}"
        curves.errorbar(ks, rates, errors, marker="o", capsize=3, label=name, color=color)
        if row["kv_tokens"]:
            drawn = bars.bar(name, row["kv_tokens"], color=color)
            bars.bar_label(drawn, fmt="{:,.0f}")
    curves.set_xscale("log", base=2)
    curves.set_xticks(ks, [str(k) for k in ks])
    curves.set(xlabel="k samples per problem", ylabel="maj@k, %", title=title)
    curves.grid(alpha=0.3)
    curves.legend(title="KV cache")
    bars.set(xlabel="KV cache", ylabel="tokens", title="KV tokens in the same memory")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
