"""Bytes a decode step cannot avoid moving, and the time they take at copy bandwidth."""

from __future__ import annotations

import torch

from benchmarks.kernel_cases import H_KV, H_Q, HEAD_DIM, Case
from patternkv_kernels import SlotFormat

_INDEX_BYTES = 4
_VECTOR_BYTES = 2
"""Queries and outputs are bfloat16, patterns and channel scales float16."""


def query_bytes(case: Case) -> int:
    """Queries in, outputs out."""
    return 2 * case.branches * H_Q * HEAD_DIM * _VECTOR_BYTES


def packed_bytes(case: Case, fmt: SlotFormat, patterns: int) -> int:
    """What one layer of our decode moves at least: every slot of the tree and its index once,
    every table once, queries and outputs."""
    slots = case.tokens // fmt.page_size * fmt.page_bytes + case.tokens * _INDEX_BYTES
    table = 2 * H_KV * (patterns + 1) * HEAD_DIM * _VECTOR_BYTES
    return slots + case.tables * table + query_bytes(case)


def unpacked_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of the K and V of the tree in ``dtype``."""
    return 2 * case.tokens * H_KV * HEAD_DIM * dtype.itemsize


def roofline_us(nbytes: int, copy_gbps: float) -> float:
    """Microseconds to move ``nbytes`` at ``copy_gbps``, which counts bytes read plus written."""
    return nbytes / copy_gbps / 1e3
