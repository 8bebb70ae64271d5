"""Mining on CUDA: the launcher of ``csrc/mining.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.format import HEAD_DIMS
from patternkv_kernels.launch import DTYPES, aligned
from patternkv_kernels.mined import MinedTable

MAX_TOKENS = 2048
"""Besides the sinks: eight blocks of 256."""


def unsupported(
    vectors: Sequence[torch.Tensor], out: Sequence[MinedTable], num_tokens: int
) -> str | None:
    """Why the CUDA kernel cannot take these arguments, or None."""
    dtype, d = vectors[0].dtype, vectors[0].shape[2]
    if dtype not in DTYPES or any(x.dtype != dtype for x in vectors):
        names = ", ".join(str(x.dtype) for x in vectors)
        return f"the vectors are {names}: the kernel takes bfloat16 or float16, all alike"
    if d not in HEAD_DIMS:
        return f"d={d}: supported head dims are {HEAD_DIMS}"
    if num_tokens > MAX_TOKENS:
        return f"{num_tokens} tokens besides the sinks: the kernel samples at most {MAX_TOKENS}"
    if not all(x is None or x.is_contiguous() for table in out for x in table):
        return "the tables are not contiguous"
    return None


def mine_cuda(
    sides: Sequence[torch.Tensor],
    q: torch.Tensor | None,
    channel_weight: torch.Tensor | None,
    out: Sequence[MinedTable],
    num_sinks: int,
    max_sample: int,
    iterations: int,
) -> None:
    """Mine ``sides`` (K, or K and V, each ``[n, h, d]``) into ``out``.

    K's channels are weighted by ``q [n, h_q, d]`` or by ``channel_weight``, or alike.
    """
    first = aligned(sides[0])
    n, h, d = first.shape
    num_patterns = out[0].patterns.shape[1]
    library = jit.load("mining", jit.format_of_all_bits(d))
    size = library.scratch_bytes(len(sides) * h, n, num_patterns, num_sinks, max_sample)
    library.mine(
        first,
        aligned(sides[1]) if len(sides) > 1 else None,
        None if q is None else aligned(q),
        None if channel_weight is None else channel_weight.half().contiguous(),
        *out[0],
        *(out[1] if len(sides) > 1 else (None, None, None)),
        torch.empty(size, dtype=torch.uint8, device=first.device),
        num_sinks,
        max_sample,
        iterations,
    )
