"""Builds and loads the CUDA kernels: one library per op, bits and head dim, compiled on first use.

A library is ``<cache>/sm_<arch>/<variant>-<sources>-<compiler>.so``; the last two are hashes, so an
edited source or another compiler builds anew, and a library built elsewhere from the same sources
still loads where there is no compiler.

Environment: ``PATTERNKV_CACHE_DIR`` (default ``~/.cache/patternkv_kernels``), and what
``compiler.py`` names.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from patternkv_kernels.compiler import (
    BuildError,
    arch,
    include_folders,
    is_available,
    nvcc,
    nvcc_version,
    unavailable,
)
from patternkv_kernels.format import SlotFormat

if TYPE_CHECKING:
    import tvm_ffi

    Module = tvm_ffi.Module

Op = Literal["decode", "dequantize", "mining", "rotate", "store"]
OPS: tuple[Op, ...] = get_args(Op)

OPS_OF_ALL_BITS: frozenset[Op] = frozenset({"mining", "rotate"})
"""They read and write no codes, so one library serves all bits,"""
BITS_OF_ALL = (4, 4)
"""which is called by these."""

_PACKAGE = Path(__file__).parent
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-use_fast_math",
    "--expt-relaxed-constexpr",
    # Hidden: a process loads libraries of several variants, whose names are the same.
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DFLASHINFER_ENABLE_F16",
    "-DFLASHINFER_ENABLE_BF16",
)
_ERROR_LINES = 40


class Variant(NamedTuple):
    """What one library is compiled for."""

    op: Op
    k_bits: int
    v_bits: int
    head_dim: int
    arch: str
    """as in ``sm_<arch>``: ``80``, ``90a``"""

    def __str__(self) -> str:
        return f"{self.op}_k{self.k_bits}v{self.v_bits}_d{self.head_dim}"


def load(op: Op, fmt: SlotFormat) -> tvm_ffi.Module:
    """The kernels of ``op`` for ``fmt`` and the current GPU, built if need be.

    The page size and the number of heads are arguments of the kernels. Raises :class:`BuildError`.
    """
    return load_variant(Variant(op, fmt.k_bits, fmt.v_bits, fmt.head_dim, arch()))


def format_of_all_bits(d: int) -> SlotFormat:
    """What an op of `OPS_OF_ALL_BITS` is loaded for with heads of ``d`` dims."""
    return SlotFormat(*BITS_OF_ALL, d, h_kv=1)


@functools.cache
def load_variant(variant: Variant) -> tvm_ffi.Module:
    """The library of ``variant``; every process loads it once. Raises :class:`BuildError`."""
    library = build(variant)
    try:
        # Imported late: who never loads a kernel needs no tvm_ffi.
        import tvm_ffi

        return tvm_ffi.load_module(str(library))
    except Exception as error:
        raise BuildError(f"{library} does not load: {error}; delete it to rebuild") from error


def build(variant: Variant) -> Path:
    """Compile ``variant`` unless the cache has it. Returns the library.

    Processes that ask for the same one at once wait for a single build. Raises
    :class:`BuildError`.
    """
    library = _cached(variant)
    if library is not None:
        return library
    reason = unavailable()
    if reason is not None:
        raise BuildError(f"{variant} cannot be compiled: {reason}")
    library = _library(variant, _digest(nvcc_version()))
    library.parent.mkdir(parents=True, exist_ok=True)
    with _lock(library.with_suffix(".lock")):
        if not library.exists():
            # In the folder of the library, since only a rename within a file system is atomic.
            with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
                output = Path(folder) / library.name
                compile_source(variant, output, "-shared")
                os.replace(output, library)
    return library


def compile_source(variant: Variant, output: Path, *mode: str) -> None:
    """Run nvcc on the source of ``variant``; ``mode`` says to what (``-shared``, ``-cubin`` …).

    Raises :class:`BuildError` with the command and the end of its output.
    """
    command = [
        str(nvcc()),
        *compile_flags(variant),
        *(f"-I{folder}" for folder in include_folders()),
        *mode,
        "-o",
        str(output),
        str(source_file(variant.op)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()[-_ERROR_LINES:]
        raise BuildError(
            f"nvcc failed with exit code {done.returncode} on {variant} for sm_{variant.arch}:\n"
            f"{shlex.join(command)}\n" + "\n".join(lines)
        )


def compile_flags(variant: Variant) -> list[str]:
    """What nvcc is told besides folders and files."""
    return [
        *_FLAGS,
        f"-gencode=arch=compute_{variant.arch},code=sm_{variant.arch}",
        f"-DPKV_K_BITS={variant.k_bits}",
        f"-DPKV_V_BITS={variant.v_bits}",
        f"-DPKV_HEAD_DIM={variant.head_dim}",
        # Compute capability 9.0 alone has warpgroup products.
        f"-DPKV_WGMMA={int(variant.arch == '90a')}",
    ]


def source_file(op: Op) -> Path:
    """The CUDA source of ``op``."""
    return _PACKAGE / "csrc" / f"{op}.cu"


def source_files(op: Op) -> list[Path]:
    """Every file of ours that a library of ``op`` may be made from."""
    return [source_file(op), *sorted((_PACKAGE / "include").rglob("*.cuh"))]


def cache_folder(arch: str) -> Path:
    """Where libraries for ``sm_<arch>`` are kept."""
    root = os.environ.get("PATTERNKV_CACHE_DIR") or Path.home() / ".cache" / "patternkv_kernels"
    return Path(root) / f"sm_{arch}"


def _cached(variant: Variant) -> Path | None:
    """The library of ``variant`` if it is built: by our compiler, or by any if there is none."""
    if is_available():
        library = _library(variant, _digest(nvcc_version()))
        return library if library.exists() else None
    pattern = _library(variant, "*")
    return min(pattern.parent.glob(pattern.name), default=None)


def _library(variant: Variant, compiler: str) -> Path:
    return cache_folder(variant.arch) / f"{variant}-{_source_digest(variant)}-{compiler}.so"


@functools.cache
def _source_digest(variant: Variant) -> str:
    """Hash of all that the library depends on but the compiler."""
    parts = compile_flags(variant)
    parts += [f"{name}={_version(name)}" for name in ("apache-tvm-ffi", "flashinfer-python")]
    for path in source_files(variant.op):
        parts += [path.name, path.read_text(encoding="utf-8")]
    return _digest(*parts)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` against other processes; the system releases it when one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
