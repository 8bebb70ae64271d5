"""The CUDA decode kernels on the CPU: their sources compiled with simt.h, called through ctypes."""

from __future__ import annotations

import ctypes
import functools

import torch

from patternkv_kernels import SlotFormat, SlotSource
from tests.cases import DecodeInputs
from tests.simt_library import compile_library, fields

_POINTERS = [
    "q",
    "buffer",
    "req_to_token",
    "patterns",
    "channel_scale",
    "segments",
    "row_indptr",
    "rows",
    "sources",
    "source_req_to_token",
    "window_k",
    "window_v",
    "ring",
    "window_start",
    "window_end",
    "new_k",
    "new_v",
    "out",
    "lse",
]
_NUMBERS = [
    "req_stride",
    "b",
    "h_q",
    "h_kv",
    "page_size",
    "num_patterns",
    "num_segments",
    "nnz",
    "num_listed",
    "window",
    "bf16",
    "hopper",
    "schedule",
    "fewest_rows",
    "num_narrow",
    "num_wide",
    "num_many",
]


class Arguments(ctypes.Structure):
    """``Arguments`` of ``simt/decode.cpp``."""

    _fields_ = fields(_POINTERS, _NUMBERS, ["sm_scale", "logit_cap"])


@functools.cache
def _library(k_bits: int, v_bits: int, head_dim: int) -> ctypes.CDLL:
    return compile_library("decode", k_bits, v_bits, head_dim)


def simt_decode(
    inputs: DecodeInputs,
    *,
    hopper: bool = False,
    source: SlotSource | None = None,
    schedule: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``tree_decode_with_lse`` by the CUDA kernels' sources, on CPU tensors.

    ``hopper``: those of compute capability 9.0 too, where head dim and patterns have them.
    ``source``: of slots that the planner lists. ``schedule``: of warps, 32 bits: those of bits that
    are set lag behind the others.
    """
    return _decode(inputs, hopper, fewest_rows=33, source=source, schedule=schedule)[:2]


def leaves_32_rows(inputs: DecodeInputs, fewest_rows: int) -> bool:
    """Whether the planner of compute capability 9.0 leaves shared segments to kernels of more than
    32 rows, if it does so from ``fewest_rows`` of most segments on."""
    return _decode(inputs, True, fewest_rows)[2].num_many > 0


def separates_private_work(inputs: DecodeInputs) -> bool:
    """Whether the planner of compute capability 9.0 gives private segments a kernel of theirs."""
    return _decode(inputs, True, fewest_rows=33)[2].num_narrow > 0


def _decode(
    inputs: DecodeInputs,
    hopper: bool,
    fewest_rows: int,
    *,
    source: SlotSource | None = None,
    schedule: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Arguments]:
    fmt: SlotFormat = inputs.fmt
    b, h_q, _ = inputs.q.shape
    out = torch.full_like(inputs.q, torch.nan)
    lse = torch.full((b, h_q), torch.nan)
    window, plan = inputs.window, inputs.plan
    tensors = {
        "q": inputs.q,
        "buffer": inputs.buffer,
        "req_to_token": plan.req_to_token,
        "patterns": inputs.tables.patterns,
        "channel_scale": inputs.tables.channel_scale,
        "segments": plan.segments,
        "row_indptr": plan.row_indptr,
        "rows": plan.rows,
        "out": out,
        "lse": lse,
    }
    if source is not None:
        tensors |= {"sources": source.sources, "source_req_to_token": source.req_to_token}
    if window is not None:
        tensors |= {
            "window_k": window.k,
            "window_v": window.v,
            "ring": window.ring,
            "window_start": window.start,
            "window_end": window.end,
            "new_k": window.new_k,
            "new_v": window.new_v,
        }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    arguments = Arguments(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        req_stride=plan.req_to_token.stride(0),
        b=b,
        h_q=h_q,
        h_kv=fmt.h_kv,
        page_size=fmt.page_size,
        num_patterns=inputs.tables.num_patterns,
        num_segments=len(plan.segments),
        nnz=len(plan.rows),
        num_listed=0 if source is None else source.num_tokens,
        window=0 if window is None else window.k.shape[1],
        bf16=inputs.q.dtype == torch.bfloat16,
        hopper=hopper,
        schedule=schedule,
        fewest_rows=fewest_rows,
        sm_scale=inputs.sm_scale,
        logit_cap=inputs.case.logit_cap,
    )
    _library(fmt.k_bits, fmt.v_bits, fmt.head_dim).decode(ctypes.byref(arguments))
    return out, lse, arguments
