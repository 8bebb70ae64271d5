"""Rotation on CUDA: the launcher of ``csrc/rotate.cu``."""

from __future__ import annotations

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.format import HEAD_DIMS
from patternkv_kernels.launch import DTYPES, aligned


def unsupported(q: torch.Tensor) -> str | None:
    """Why the CUDA kernel cannot take these arguments, or None."""
    if q.dtype not in DTYPES:
        return f"the vectors are {q.dtype}: the kernel takes bfloat16 or float16"
    if q.shape[2] not in HEAD_DIMS:
        return f"d={q.shape[2]}: supported head dims are {HEAD_DIMS}"
    return None


def rotate_cuda(
    q: torch.Tensor, k: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~patternkv_kernels.rotate.rotate` of arguments that it has checked."""
    (n, h_q, d), h_kv = q.shape, k.shape[1]
    out = q.new_empty(n, h_q + h_kv, d)
    library = jit.load("rotate", jit.format_of_all_bits(d))
    library.rotate(aligned(q), aligned(k), factors.contiguous(), out)
    return out[:, :h_q], out[:, h_q:]
