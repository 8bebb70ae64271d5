"""The CUDA decode kernels on the CPU: their sources compiled with simt.h, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels import SlotFormat
from tests.cases import DecodeInputs

SOURCES = Path(__file__).parent / "simt"
INCLUDE = Path(jit.__file__).parent / "include"

_POINTERS = [
    "q",
    "buffer",
    "req_to_token",
    "patterns",
    "channel_scale",
    "segments",
    "row_indptr",
    "rows",
    "window_k",
    "window_v",
    "ring",
    "window_start",
    "window_end",
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
    "window",
    "bf16",
    "hopper",
    "fewest_rows",
]


class Arguments(ctypes.Structure):
    """``Arguments`` of ``simt/decode.cpp``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("sm_scale", ctypes.c_double),
        ("logit_cap", ctypes.c_double),
    ]


def unavailable() -> str | None:
    """Why kernels cannot be compiled for the CPU here, or None."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    return None if _cuda_headers() else "no CUDA headers beside nvcc"


@functools.cache
def _cuda_headers() -> Path | None:
    try:
        folder = jit.nvcc().resolve().parents[1] / "include"
    except jit.BuildError:
        return None
    return folder if (folder / "cuda_fp16.h").exists() else None


@functools.cache
def _library(k_bits: int, v_bits: int, head_dim: int) -> ctypes.CDLL:
    folder = tempfile.mkdtemp(prefix="patternkv_simt_")
    library = Path(folder) / "decode.so"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O2",
            "-w",
            "-fPIC",
            "-shared",
            # Kernels read shared memory as other types than they wrote, which nvcc allows.
            "-fno-strict-aliasing",
            # Libraries of other formats have variables of the same names.
            "-fno-gnu-unique",
            "-Wl,-Bsymbolic",
            "-include",
            "simt.h",
            f"-DPKV_K_BITS={k_bits}",
            f"-DPKV_V_BITS={v_bits}",
            f"-DPKV_HEAD_DIM={head_dim}",
            "-DPKV_WGMMA=1",
            *(f"-I{folder}" for folder in (SOURCES, INCLUDE, _cuda_headers())),
            "-o",
            str(library),
            str(SOURCES / "decode.cpp"),
        ],
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded


def simt_decode(
    inputs: DecodeInputs, *, hopper: bool = False, fewest_rows: int = 33
) -> tuple[torch.Tensor, torch.Tensor]:
    """``tree_decode_with_lse`` by the CUDA kernels' sources, on CPU tensors.

    ``hopper``: those of compute capability 9.0, where the head dim has them; ``fewest_rows``: what
    shared segments must mostly have there for work items of up to 64 rows.
    """
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
    if window is not None:
        tensors |= {
            "window_k": window.k,
            "window_v": window.v,
            "ring": window.ring,
            "window_start": window.start,
            "window_end": window.end,
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
        window=0 if window is None else window.k.shape[1],
        bf16=inputs.q.dtype == torch.bfloat16,
        hopper=hopper,
        fewest_rows=fewest_rows,
        sm_scale=inputs.sm_scale,
        logit_cap=inputs.case.logit_cap,
    )
    _library(fmt.k_bits, fmt.v_bits, fmt.head_dim).decode(ctypes.byref(arguments))
    return out, lse
