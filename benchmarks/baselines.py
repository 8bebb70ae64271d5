"""FlashInfer's decode kernels on the same trees.

Wrappers are planned outside a CUDA graph and never again, so they need no graph mode.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.kernel_cases import H_KV, H_Q, HEAD_DIM, flat
from benchmarks.kernel_inputs import KV, Tree, build_tree

FP8 = torch.float8_e4m3fn
Decode = Callable[[torch.Tensor, KV], torch.Tensor]
"""Output of bfloat16 queries ``[branches, h_q, d]`` over K and V. The next call overwrites it."""

_WORKSPACE_BYTES = 256 << 20
_LEVELS = 4


def _host(values: range | list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class FlashInfer:
    """Plans FlashInfer's wrappers; ``ImportError`` where it is not installed whole."""

    def __init__(self, device: torch.device) -> None:
        import flashinfer

        # A folder with its headers alone imports as an empty namespace package.
        if not hasattr(flashinfer, "BatchDecodeWithPagedKVCacheWrapper"):
            raise ImportError(f"{list(flashinfer.__path__)} holds no FlashInfer but its headers")
        self._flashinfer: Any = flashinfer
        self._device = device
        # The partial results of the levels of a cascade coexist.
        self._workspaces = [
            torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device) for _ in range(_LEVELS)
        ]

    def compile(self) -> None:
        """Build every kernel the baselines use, side by side."""
        tree = build_tree(flat(2, 16, 16), 1, self._device)
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(self.flat, tree, dtype) for dtype in (torch.bfloat16, FP8)]
            jobs.append(pool.submit(self._flashinfer.cascade.get_cascade_module))
            for job in jobs:
                job.result()

    def flat(self, tree: Tree, dtype: torch.dtype) -> Decode:
        """Plain decode: every branch reads its whole context, K and V in ``dtype``."""
        wrapper = self._decode_wrapper(tree, tree.pages, dtype)
        out = self._output(tree)

        def decode(q: torch.Tensor, kv: KV) -> torch.Tensor:
            wrapper.run(q, kv, out=out)
            return out

        return decode

    def cascade(self, tree: Tree) -> Decode:
        """Level by level: prefill kernels on what is shared, decode on the rest, states merged.

        The stock cascade wrapper would take FA3 on Hopper, which neither splits KV nor packs the
        heads of a group: fa2 is the stronger baseline.
        """
        case = tree.case
        levels = []
        for depth, level in enumerate(case.levels):
            if not level.tokens:
                continue
            pages = tree.level_pages(depth)
            if depth == len(case.levels) - 1:
                wrapper = self._decode_wrapper(tree, pages, torch.bfloat16)
            else:
                wrapper = self._prefill_wrapper(tree, pages, self._workspaces[1 + depth])
            lse = torch.empty(case.branches, H_Q, dtype=torch.float32, device=self._device)
            levels.append((wrapper, self._output(tree), lse))
        merge = self._flashinfer.merge_state_in_place

        def decode(q: torch.Tensor, kv: KV) -> torch.Tensor:
            for wrapper, out, lse in levels:
                wrapper.run(q, kv, out=out, lse=lse, return_lse=True)
            _, merged, merged_lse = levels[-1]
            for _, out, lse in levels[:-1]:
                merge(merged, merged_lse, out, lse)
            return merged

        return decode

    def _output(self, tree: Tree) -> torch.Tensor:
        shape = (tree.case.branches, H_Q, HEAD_DIM)
        return torch.empty(shape, dtype=torch.bfloat16, device=self._device)

    def _decode_wrapper(self, tree: Tree, pages: torch.Tensor, dtype: torch.dtype) -> Any:
        """Every branch reads its row of ``pages [branches, n]``."""
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspaces[0], "NHD", use_tensor_cores=True, backend="fa2"
        )
        wrapper.plan(
            *self._page_lists(tree, pages),
            H_Q,
            H_KV,
            HEAD_DIM,
            tree.page_size,
            q_data_type=torch.bfloat16,
            kv_data_type=dtype,
        )
        return wrapper

    def _prefill_wrapper(self, tree: Tree, pages: torch.Tensor, workspace: torch.Tensor) -> Any:
        """As many consecutive branches each read a row of ``pages [nodes, n]``."""
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa2"
        )
        branches = tree.case.branches
        wrapper.plan(
            _host(range(0, branches + 1, branches // len(pages))),
            *self._page_lists(tree, pages),
            H_Q,
            H_KV,
            HEAD_DIM,
            tree.page_size,
            causal=False,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        return wrapper

    @staticmethod
    def _page_lists(tree: Tree, pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """indptr, indices and length of the last page of the rows of ``pages``."""
        nodes, each = pages.shape
        indptr = _host([row * each for row in range(nodes + 1)])
        return indptr, pages.flatten(), _host([tree.page_size] * nodes)
