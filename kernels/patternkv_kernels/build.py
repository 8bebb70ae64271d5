"""Compile the CUDA kernels ahead of their first use.

    python -m patternkv_kernels.build                                  # everything, for this GPU
    python -m patternkv_kernels.build --arch 90a --bits 4:2 --head-dim 128

Libraries go to the cache that the ops load from (``PATTERNKV_CACHE_DIR``); what it has is not
compiled again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

import patternkv_kernels.compiler as compiler
import patternkv_kernels.jit as jit
from patternkv_kernels.format import BITS, HEAD_DIMS


def bits(text: str) -> tuple[int, int]:
    """``"K:V"``, or one width for both, as two supported widths."""
    k, separator, v = text.partition(":")
    widths = [int(part) for part in (k, v if separator else k) if part.isdecimal()]
    if len(widths) != 2 or any(width not in BITS for width in widths):
        raise argparse.ArgumentTypeError(f"{text!r}: K:V or one for both, each one of {BITS}")
    return widths[0], widths[1]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    every = [f"{k}:{v}" for k, v in itertools.product(BITS, BITS)]
    parser = argparse.ArgumentParser(
        prog="python -m patternkv_kernels.build", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--arch", help="as in sm_90a: 80, 89, 90a … (default: this GPU's)")
    parser.add_argument("--op", nargs="+", choices=jit.OPS, default=jit.OPS)
    parser.add_argument(
        "--bits",
        nargs="+",
        type=bits,
        default=[bits(text) for text in every],
        metavar="K:V",
        help="as in --kv-quant-bits: 4, 4:2 …",
    )
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Build what ``arguments`` ask for. Returns the exit code: 1 if anything failed."""
    options = parse(arguments)
    try:
        if options.arch is None:
            arch = compiler.arch(remedy="name it with --arch")
        else:
            arch = compiler.checked_arch(options.arch, "--arch ")
    except compiler.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    variants = []
    for head_dim, widths, op in itertools.product(options.head_dim, options.bits, options.op):
        k_bits, v_bits = jit.BITS_OF_ALL if op in jit.OPS_OF_ALL_BITS else widths
        variant = jit.Variant(op, k_bits, v_bits, head_dim, arch)
        if variant not in variants:
            variants.append(variant)
    started = time.perf_counter()
    failures = []
    # Threads, since each of them only waits for nvcc.
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(variants), unit="library") as bar:
        futures = {pool.submit(jit.build, variant): variant for variant in variants}
        for future in as_completed(futures):
            failure = future.exception()
            if failure is not None:
                failures.append(f"{futures[future]}: {failure}")
            bar.set_postfix_str(str(futures[future]))
            bar.update()
    for message in failures:
        print(f"error: {message}", file=sys.stderr)
    print(
        f"{len(variants) - len(failures)} of {len(variants)} libraries for sm_{arch} in "
        f"{jit.cache_folder(arch)} after {time.perf_counter() - started:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
