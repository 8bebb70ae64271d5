"""How fast is tree decode? Ours at 4/4, 4/2 and 2/2 bits against FlashInfer and the roofline.

    python -m benchmarks.bench_kernels                # writes benchmarks/results/kernels.jsonl
    python -m benchmarks.bench_kernels --check        # compares that file with the targets
    python -m benchmarks.bench_kernels --markdown     # prints that file as tables

One process, one GPU, one layer. Every time is the median of CUDA-graph replays over buffers that
exceed the L2 cache twice. Our output is compared with FlashInfer's on the dequantized cache first;
a kernel that is wrong is not timed and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.baselines import FlashInfer
from benchmarks.kernel_bench import SMOKE, KernelBench, WrongOutputError
from benchmarks.kernel_cases import BITS, PAGE, suites
from benchmarks.kernel_inputs import Tree
from benchmarks.kernel_results import HEADER, line, made_with, markdown, misses
from benchmarks.roofline import roofline_us
from benchmarks.rows import Row, read_rows
from benchmarks.timing import copy_gbps, matmul_tflops

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print the targets that --out misses")
    parser.add_argument("--markdown", action="store_true", help="print the rows of --out as tables")
    parser.add_argument(
        "--cases", choices=("design", "trees", "prompts", "sweep", "all"), default="all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer replays and sweep cells")
    parser.add_argument(
        "--page", type=int, default=PAGE, help=f"slots per page ({PAGE}, as in serving)"
    )
    parser.add_argument("--shuffle", action="store_true", help="scatter pages over the pool")
    parser.add_argument("--no-baselines", action="store_true", help="leave out FlashInfer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu tries the script: the reference op on one tiny case, written nowhere",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.check:
        missed = misses(read_rows(args.out), args.page)
        print("\n".join(missed) or "every target is reached")
        return 1 if missed else 0
    if args.markdown:
        print(markdown(read_rows(args.out)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: no GPU here; --device cpu tries the script on a tiny case")
    return measure_all(args)


def measure_all(args: argparse.Namespace) -> int:
    """Measure, print and write row by row, so that an interrupted run leaves what it has; the exit
    code."""
    torch.manual_seed(0)
    start = time.monotonic()
    device = torch.device(args.device)
    on_cpu = device.type == "cpu"
    bench = KernelBench(
        device,
        None if on_cpu or args.no_baselines else find_flashinfer(device),
        page_size=args.page,
        shuffle=args.shuffle,
        budget_s=0.05 if args.quick else 0.15,
    )
    origin = {
        "copy_gbps": copy_gbps(device),
        "matmul_tflops": matmul_tflops(device),
        **made_with(),
    }
    print(
        f"{origin['gpu'] or device}: copy {origin['copy_gbps']:.0f} GB/s (read + write), "
        f"bfloat16 matmul {origin['matmul_tflops']:.0f} TFLOP/s",
        flush=True,
    )
    bench.build()
    print(f"kernels built after {time.monotonic() - start:.0f} s\n{HEADER}", flush=True)
    cases = {"smoke": [SMOKE]} if on_cpu else suites(args.cases, quick=args.quick)
    wrong = 0
    with Path(os.devnull if on_cpu else args.out).open("w", encoding="utf-8") as file:
        for suite, case in ((suite, case) for suite, of in cases.items() for case in of):
            if not bench.fits(case):
                print(f"{case.name}: skipped, its bfloat16 cache does not fit this device")
                continue
            tree = bench.tree(case)
            of_case = {"suite": suite, **case_keys(tree, args), **bench.baselines(tree)}
            for bits in BITS:
                try:
                    row = of_case | bench.ours(tree, bits) | origin
                except WrongOutputError as error:
                    wrong += 1
                    print(f"{case.name} {bits[0]}/{bits[1]}: not timed, {error}", flush=True)
                    continue
                row["roofline_us"] = roofline_us(row["bytes"], origin["copy_gbps"])
                print(json.dumps(row), file=file, flush=True)
                print(line(row), flush=True)
    print(f"done after {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


def case_keys(tree: Tree, args: argparse.Namespace) -> Row:
    case = tree.case
    return {
        "case": case.name,
        "branches": case.branches,
        "shared": case.shared,
        "own": case.own,
        "levels": [[level.nodes, level.tokens] for level in case.levels],
        "page": args.page,
        "shuffle": args.shuffle,
    }


def find_flashinfer(device: torch.device) -> FlashInfer | None:
    try:
        return FlashInfer(device)
    except ImportError as error:
        print(f"no baselines: {error}")
        return None


if __name__ == "__main__":
    sys.exit(main())
