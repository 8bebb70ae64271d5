"""Measures one case: FlashInfer's kernels, ours at one bit width, and whether ours are right."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.baselines import FP8, Decode, FlashInfer
from benchmarks.kernel_cases import BITS, H_KV, H_Q, HEAD_DIM, Case, flat
from benchmarks.kernel_inputs import (
    KV,
    Tree,
    build_tree,
    random_kv,
    random_pool,
    random_queries,
    random_tables,
)
from benchmarks.roofline import packed_bytes, unpacked_bytes
from benchmarks.timing import Timing, copies_beyond_l2, measure
from patternkv_kernels import (
    DecodeShape,
    DecodeWorkspace,
    LayerTables,
    SlotFormat,
    dequantize,
    plan_decode,
    tree_decode,
)
from patternkv_sgl.config import PatternKVConfig

SMOKE = flat(2, 64, 64)
"""A tiny case, to build kernels with."""
TOLERANCE = 0.02
"""Relative error of an output (Frobenius norm). The unpacked cache is rounded to bfloat16."""
_BLOCK_SLOTS = 16384

Impl = Literal["cuda", "reference"]


class WrongOutputError(Exception):
    """Our decode differs from attention over the dequantized cache."""


@dataclass(frozen=True)
class PackedCache:
    """One copy of a layer's cache."""

    fmt: SlotFormat
    pool: torch.Tensor
    tables: LayerTables
    workspace: DecodeWorkspace | None = None


def profile_second(call: Callable[[], object]) -> None:
    """Call twice, the second time for a profiler that waits for ``cudaProfilerStart``."""
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


class KernelBench:
    """Measures cases on one device.

    Args:
        flashinfer: None measures no baselines and takes the reference op for the right output.
        shuffle: see :func:`~benchmarks.kernel_inputs.build_tree`.
        budget_s: replaying time per measurement.
    """

    def __init__(
        self,
        device: torch.device,
        flashinfer: FlashInfer | None,
        *,
        page_size: int,
        shuffle: bool,
        budget_s: float,
    ) -> None:
        self._device = device
        self._flashinfer = flashinfer
        self._page_size = page_size
        self._shuffle = shuffle
        self._budget_s = budget_s
        self._impl: Impl = "cuda" if device.type == "cuda" else "reference"

    def build(self) -> None:
        """Compile the kernels, FlashInfer's beside ours; both keep what they have built."""
        tree = self.tree(SMOKE)
        q = random_queries(SMOKE, self._device)

        def ours() -> None:
            for bits in BITS:
                self._decode(tree, q, self._cache(tree, bits), self._impl)

        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(ours)]
            if self._flashinfer is not None:
                jobs.append(pool.submit(self._flashinfer.compile))
            for job in jobs:
                job.result()

    def fits(self, case: Case) -> bool:
        """Whether the bfloat16 caches of ``case``, the largest thing measured, fit the device."""
        if self._device.type == "cpu":
            return True
        torch.cuda.empty_cache()
        cache = unpacked_bytes(case, torch.bfloat16)
        caches = cache * copies_beyond_l2(cache, self._device)
        # Two page tables and two more in FlashInfer's order, int32.
        indices = 4 * 4 * case.branches * case.context
        return caches + indices < 0.9 * torch.cuda.mem_get_info(self._device)[0]

    def tree(self, case: Case) -> Tree:
        return build_tree(case, self._page_size, self._device, shuffle=self._shuffle)

    def baselines(self, tree: Tree) -> dict[str, float | None]:
        """Microseconds of FlashInfer's plain decode, the same over fp8, and the cascade; None for
        what is not measured."""
        times: dict[str, float | None] = dict.fromkeys(
            ("flashinfer_us", "flashinfer_fp8_us", "cascade_us")
        )
        if self._flashinfer is not None:
            bf16 = {"flashinfer_us": self._flashinfer.flat(tree, torch.bfloat16)}
            if tree.case.shared:
                bf16["cascade_us"] = self._flashinfer.cascade(tree)
            times |= self._baseline_us(tree, torch.bfloat16, bf16)
            fp8 = {"flashinfer_fp8_us": self._flashinfer.flat(tree, FP8)}
            times |= self._baseline_us(tree, FP8, fp8)
        return times

    def ours(self, tree: Tree, bits: tuple[int, int]) -> dict[str, Any]:
        """Times of our decode and of its planner in microseconds, the bytes that a layer moves, and
        what it was measured with.

        Raises :class:`WrongOutputError` instead of timing a kernel that is wrong.
        """
        q = random_queries(tree.case, self._device)
        first = self._cache(tree, bits)
        self._check(tree, q, first)
        nbytes = packed_bytes(tree.case, first.fmt, first.tables.num_patterns)
        copies = copies_beyond_l2(nbytes, self._device)
        caches = [first, *(self._cache(tree, bits) for _ in range(copies - 1))]
        timing = self._measure([partial(self._decode, tree, q, c, self._impl) for c in caches])
        return {
            "bits_k": bits[0],
            "bits_v": bits[1],
            "patterns": first.tables.num_patterns,
            "us": timing.us,
            "us_p20": timing.p20,
            "us_p80": timing.p80,
            "plan_us": self._plan_us(tree, first),
            "bytes": nbytes,
        }

    def profile(self, tree: Tree, bits: tuple[int, int]) -> None:
        """Decode under a profiler: see :func:`profile_second`."""
        q, cache = random_queries(tree.case, self._device), self._cache(tree, bits)
        profile_second(lambda: self._decode(tree, q, cache, self._impl))

    def _plan_us(self, tree: Tree, cache: PackedCache) -> float | None:
        """Time of making the work list, once per step; None where the reference op needs none."""
        if cache.workspace is None:
            return None
        return self._measure(
            [partial(plan_decode, tree.plan, cache.workspace, tree.case.branches)]
        ).us

    def _baseline_us(
        self, tree: Tree, dtype: torch.dtype, decodes: dict[str, Decode]
    ) -> dict[str, float]:
        copies = copies_beyond_l2(unpacked_bytes(tree.case, dtype), self._device)
        caches = [random_kv(tree, dtype) for _ in range(copies)]
        q = random_queries(tree.case, self._device)
        return {
            name: self._measure([partial(decode, q, kv) for kv in caches]).us
            for name, decode in decodes.items()
        }

    def _measure(self, calls: list[Callable[[], object]]) -> Timing:
        return measure(calls, self._device, self._budget_s)

    def _cache(self, tree: Tree, bits: tuple[int, int]) -> PackedCache:
        fmt = SlotFormat(*bits, HEAD_DIM, self._page_size, h_kv=H_KV)
        patterns = PatternKVConfig.patterns
        pool = random_pool(fmt, tree, patterns)
        tables = random_tables(tree.case, patterns, self._device)
        return PackedCache(fmt, pool, tables, self._workspace(tree, fmt, patterns))

    def _workspace(self, tree: Tree, fmt: SlotFormat, patterns: int) -> DecodeWorkspace | None:
        """The work list of ``tree``, which serving makes once for all layers of a step."""
        if self._impl != "cuda":
            return None
        b, nnz = tree.case.branches, len(tree.plan.rows)
        shape = DecodeShape(fmt, patterns, H_Q, b, nnz, b * tree.case.context)
        workspace = DecodeWorkspace.allocate(shape, self._device)
        plan_decode(tree.plan, workspace, b)
        return workspace

    def _decode(self, tree: Tree, q: torch.Tensor, cache: PackedCache, impl: Impl) -> torch.Tensor:
        return tree_decode(
            q,
            cache.fmt,
            cache.pool,
            cache.tables,
            tree.plan,
            window=None,
            sm_scale=HEAD_DIM**-0.5,
            workspace=cache.workspace,
            impl=impl,
        )

    def _check(self, tree: Tree, q: torch.Tensor, cache: PackedCache) -> None:
        out = self._decode(tree, q, cache, self._impl).float()
        if self._flashinfer is None:
            expected = self._decode(tree, q, cache, "reference").float()
        else:
            decode = self._flashinfer.flat(tree, torch.bfloat16)
            expected = decode(q, dequantized(tree, cache)).float()
        error = float((out - expected).norm() / expected.norm())
        # Written so that NaN fails.
        if not error <= TOLERANCE:
            raise WrongOutputError(f"relative error {error:.3g} of the output, limit {TOLERANCE}")


def dequantized(tree: Tree, cache: PackedCache) -> KV:
    """The bfloat16 K and V that ``cache`` stands for."""
    device, tokens = tree.pages.device, tree.case.tokens
    k, v = (
        torch.empty(tokens, H_KV, HEAD_DIM, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    for first in range(0, tokens, _BLOCK_SLOTS):
        block = slice(first, min(first + _BLOCK_SLOTS, tokens))
        slots = torch.arange(block.start, block.stop, device=device)
        k[block], v[block] = dequantize(
            cache.fmt, cache.pool, slots, cache.tables, tree.slot_tables[block], torch.bfloat16
        )
    paged = (tree.num_pages, tree.page_size, H_KV, HEAD_DIM)
    return k.view(paged), v.view(paged)
