"""The CUDA mining kernel on the CPU: its sources compiled with simt.h, called through ctypes."""

from __future__ import annotations

import ctypes
import functools

import torch

from patternkv_kernels import MinedTable
from tests.simt_library import compile_library, fields

_POINTERS = [
    *("k", "v", "q", "weight"),
    *("k_patterns", "k_scale", "k_weight", "v_patterns", "v_scale", "v_weight"),
]
_NUMBERS = [
    *("rows", "queries", "h", "group", "num_patterns", "num_sinks", "max_sample", "iterations"),
    "bf16",
]


class Arguments(ctypes.Structure):
    """``Arguments`` of ``simt/mining.cpp``."""

    _fields_ = fields(_POINTERS, _NUMBERS)


@functools.cache
def _library(head_dim: int) -> ctypes.CDLL:
    return compile_library("mining", 4, 4, head_dim)


def simt_mine(
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    *,
    num_patterns: int,
    num_sinks: int,
    channel_weight: torch.Tensor | None = None,
    max_sample: int = 2048,
    iterations: int = 3,
) -> list[MinedTable]:
    """``mine_kv``, or without ``v`` and ``q`` ``mine_table``, by the CUDA kernel's source, on
    contiguous bfloat16 or float16 CPU tensors."""
    n, h, d = k.shape
    out = []
    for _ in range(1 if v is None else 2):
        shapes = ((h, num_patterns, d), (h, d), (h, d))
        tables = [torch.full(shape, torch.nan, dtype=torch.float16) for shape in shapes]
        out.append(MinedTable(*tables))
    tensors = {"k": k, "v": v, "q": q, "weight": channel_weight}
    for side, table in zip("kv", out, strict=False):
        for name, x in zip(("patterns", "scale", "weight"), table, strict=True):
            tensors[f"{side}_{name}"] = x
    given = {name: x for name, x in tensors.items() if x is not None}
    assert all(x.is_contiguous() for x in given.values())
    arguments = Arguments(
        **{name: x.data_ptr() for name, x in given.items()},
        rows=n,
        queries=0 if q is None else len(q),
        h=h,
        group=1 if q is None else q.shape[1] // h,
        num_patterns=num_patterns,
        num_sinks=num_sinks,
        max_sample=max_sample,
        iterations=iterations,
        bf16=k.dtype == torch.bfloat16,
    )
    _library(d).mine(ctypes.byref(arguments))
    return out
