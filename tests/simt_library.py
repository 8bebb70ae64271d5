"""CUDA sources compiled for the CPU with ``simt/simt.h``."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import patternkv_kernels.compiler as compiler
import patternkv_kernels.jit as jit

SOURCES = Path(__file__).parent / "simt"
INCLUDE = Path(jit.__file__).parent / "include"


def unavailable() -> str | None:
    """Why kernels cannot be compiled for the CPU here, or None."""
    if shutil.which("g++") is None:
        return "no g++ on PATH"
    return None if _cuda_headers() else "no CUDA headers beside nvcc"


@functools.cache
def _cuda_headers() -> Path | None:
    try:
        folder = compiler.nvcc().resolve().parents[1] / "include"
    except compiler.BuildError:
        return None
    return folder if (folder / "cuda_fp16.h").exists() else None


def fields(
    pointers: Iterable[str], numbers: Iterable[str], reals: Iterable[str] = ()
) -> list[tuple[str, type[ctypes._SimpleCData[Any]]]]:
    """``_fields_`` of the ``Arguments`` that a library's source declares in this order."""
    return [
        *((name, ctypes.c_void_p) for name in pointers),
        *((name, ctypes.c_int64) for name in numbers),
        *((name, ctypes.c_double) for name in reals),
    ]


def compile_library(name: str, k_bits: int, v_bits: int, head_dim: int) -> ctypes.CDLL:
    """The library of ``simt/<name>.cpp``."""
    folder = tempfile.mkdtemp(prefix="patternkv_simt_")
    library = Path(folder) / f"{name}.so"
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-w",
            "-fPIC",
            "-shared",
            # Kernels read shared memory as other types than they wrote, which nvcc allows.
            "-fno-strict-aliasing",
            # Its checks take jumps between stacks for errors.
            "-U_FORTIFY_SOURCE",
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
            str(SOURCES / f"{name}.cpp"),
        ],
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    return loaded
