"""What bounds the kernels? Hardware counters of every design case and of the prefill store.

    python -m benchmarks.kernel_counters               # writes benchmarks/results/counters.jsonl
    python -m benchmarks.kernel_counters --markdown    # prints that file as a table

Runs itself under Nsight Compute (``ncu``, which must be on PATH and allowed to read counters): one
call of each op, the second one, a kernel after the other, so kernels that overlap in use do not
here.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.kernel_bench import KernelBench, profile_second
from benchmarks.kernel_cases import H_KV, HEAD_DIM, PAGE, TARGETS, private
from benchmarks.kernel_inputs import random_tables
from benchmarks.kernel_results import made_with
from benchmarks.rows import Row, packages, read_rows, table
from patternkv_kernels import SlotFormat, store_kv
from patternkv_sgl.config import PatternKVConfig

RESULTS = Path(__file__).parent / "results" / "counters.jsonl"
BITS = ((4, 4), (2, 2))
"""Those with targets."""
STORED_TOKENS = 65536
STALLS = (
    "wait",
    "long_scoreboard",
    "short_scoreboard",
    "barrier",
    "gmma",
    "math_pipe_throttle",
    "mio_throttle",
    "lg_throttle",
    "branch_resolving",
    "dispatch_stall",
    "no_instruction",
    "imc_miss",
    "not_selected",
)
METRICS = {
    "us": "gpu__time_duration.sum",
    "issue_pct": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "tensor_pct": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "shared_pct": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed",
    "l2_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_pct": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.per_cycle_active",
    **{
        f"stall_{name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
        for name in STALLS
    },
}
KERNELS = ("window", "narrow", "hopper", "warpgroup", "wide", "merge", "store")
SHORTEST_US = 4
"""Kernels that take less have found nothing to do; the table leaves them out."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print --out as a table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run() -> None:
    """What is profiled."""
    device = torch.device("cuda")
    bench = KernelBench(device, None, page_size=PAGE, shuffle=False, budget_s=0)
    for case in TARGETS:
        tree = bench.tree(case)
        for bits in BITS:
            bench.profile(tree, bits)
    for bits in BITS:
        profile_store(bits, device)


def profile_store(bits: tuple[int, int], device: torch.device) -> None:
    """Store a prefill of random tokens, twice."""
    fmt = SlotFormat(*bits, HEAD_DIM, PAGE, h_kv=H_KV)
    tables = random_tables(private(1, STORED_TOKENS), PatternKVConfig.patterns, device)
    shape = (STORED_TOKENS, H_KV, HEAD_DIM)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    slots = torch.arange(STORED_TOKENS, device=device)
    pool = fmt.allocate(STORED_TOKENS, device)
    table_ids = torch.zeros_like(slots)
    profile_second(lambda: store_kv(fmt, pool, slots, k, v, tables, table_ids))


def ncu_command(ncu: str) -> list[str]:
    return [
        ncu,
        *("--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "mangled"),
        *("--profile-from-start", "off", "--clock-control", "none"),
        *("--kernel-name-base", "mangled", "--kernel-name", "regex:9patternkv"),
        *("--metrics", ",".join(METRICS.values())),
        *(sys.executable, "-m", "benchmarks.kernel_counters", "--run"),
    ]


def rows_of(text: str) -> Iterator[Row]:
    """Rows of the output of ``ncu``.

    Raises:
        ValueError: kernels are missing.
    """
    start = text.find('"ID"')
    if start < 0:
        raise ValueError(f"ncu printed no counters: …{text[-2000:]}")
    # The first line under the names has the units.
    lines = list(csv.DictReader(text[start:].splitlines()))[1:]
    stored = f"store {STORED_TOKENS} tokens"
    expected = [(case.name, bits) for case in TARGETS for bits in BITS]
    expected += [(stored, bits) for bits in BITS]
    for line in lines:
        kernel = kernel_name(line["Kernel Name"])
        if kernel is None:
            continue
        if not expected:
            raise ValueError(f"more kernels than expected: {line['Kernel Name']}")
        case, bits = expected[0]
        yield {"case": case, "bits_k": bits[0], "bits_v": bits[1], "kernel": kernel} | values(line)
        if kernel in ("merge", "store"):  # the last one of an op
            del expected[0]
    if expected:
        raise ValueError(f"no counters of {expected}")


def kernel_name(mangled: str) -> str | None:
    """One of `KERNELS`, by the namespace of a kernel; None for others."""
    found = re.match(r"_ZN9patternkv\d+(" + "|".join(KERNELS) + r")\d", mangled)
    return found[1] if found else None


def values(line: dict[str, str]) -> dict[str, float]:
    found = {name: float(line[metric].replace(",", "")) for name, metric in METRICS.items()}
    return found | {"us": found["us"] / 1e3}


def markdown(rows: list[Row]) -> str:
    """A line per kernel that has work, with the three reasons that its warps wait for most."""
    head = "case|bits|kernel|µs|issue %|tensor %|shared %|L2 %|DRAM %|warps|cycles waited for"
    lines = [head.split("|"), ["---"] * 11]
    for row in rows:
        if row["us"] < SHORTEST_US:
            continue
        stalls = {name: row[f"stall_{name}"] for name in STALLS if name != "not_selected"}
        most = sorted(stalls, key=lambda name: -stalls[name])[:3]
        counts = ("issue_pct", "tensor_pct", "shared_pct", "l2_pct", "dram_pct", "warps")
        lines.append(
            [
                row["case"],
                f"{row['bits_k']}/{row['bits_v']}",
                row["kernel"],
                f"{row['us']:.1f}",
                *(f"{row[name]:.0f}" for name in counts),
                ", ".join(f"{name.replace('_', ' ')} {stalls[name]:.1f}" for name in most),
            ]
        )
    first = rows[0]
    return f"{table(lines)}\n\n{first['gpu']}; {packages(first)}; commit {first['commit']}."


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.run:
        run()
    elif args.markdown:
        print(markdown(read_rows(args.out)))
    else:
        ncu = shutil.which("ncu")
        if ncu is None:
            print("ncu is not on PATH: install Nsight Compute, which CUDA's toolkit contains")
            return 1
        done = subprocess.run(ncu_command(ncu), capture_output=True, text=True, check=False)
        origin = made_with()
        try:
            rows = [row | origin for row in rows_of(done.stdout)]
        except ValueError as error:
            print(f"{error}\n{done.stderr[-2000:]}")
            return 1
        args.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
