"""Builds and loads the CUDA kernels: one library per op, bits and head dim, compiled on first use.

A library is ``<cache>/sm_<arch>/<variant>-<sources>-<compiler>.so``; the last two are hashes, so an
edited source or another compiler builds anew, and a library built elsewhere from the same sources
still loads where there is no compiler.

Environment: ``PATTERNKV_CACHE_DIR`` (default ``~/.cache/patternkv_kernels``),
``PATTERNKV_CUDA_ARCH`` (``80``, ``89``, ``90a`` …; default: the current GPU's), ``CUDA_HOME``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch

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

MIN_ARCH = 80
"""Asynchronous copies and bfloat16 tensor cores came with compute capability 8.0."""

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
_REMEDY = (
    "Install the CUDA toolkit (nvcc and a C++ compiler) or set CUDA_HOME to it; "
    'the torch ops work without (impl="reference").'
)
_ERROR_LINES = 40


class BuildError(RuntimeError):
    """The CUDA kernels cannot be built or loaded here; the message says why and what to do."""


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


def arch() -> str:
    """The architecture to compile for: ``PATTERNKV_CUDA_ARCH``, else the current GPU's.

    Raises :class:`BuildError` where there is neither, and for GPUs before compute capability 8.0.
    """
    wanted = os.environ.get("PATTERNKV_CUDA_ARCH", "")
    if not wanted:
        # Asking whether there is a GPU costs more than the rest of an op's dispatch.
        if not torch.cuda.is_initialized() and not torch.cuda.is_available():
            raise BuildError(
                "no GPU tells which architecture to compile for: set PATTERNKV_CUDA_ARCH "
                "(80, 89, 90a …)"
            )
        return _device_arch(torch.cuda.current_device())
    if re.fullmatch(r"\d{2,3}[af]?", wanted) is None:
        raise BuildError(
            f"PATTERNKV_CUDA_ARCH={wanted!r}: must be digits and at most one letter, as in sm_90a: "
            "80, 89, 90a …"
        )
    return _supported(wanted)


@functools.cache
def _device_arch(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return _supported("90a" if (major, minor) == (9, 0) else f"{major}{minor}")


def _supported(arch: str) -> str:
    if int(arch.rstrip("af")) < MIN_ARCH:
        raise BuildError(
            f"compute capability sm_{arch}: the kernels need sm_{MIN_ARCH} (Ampere) or later; "
            "the torch ops run everywhere"
        )
    return arch


def is_available() -> bool:
    """Whether kernels can be compiled here."""
    return unavailable() is None


def unavailable() -> str | None:
    """Why kernels cannot be compiled here and what to do about it, or None if they can."""
    try:
        nvcc_version()
        include_folders()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def nvcc() -> Path:
    """The CUDA compiler. Raises :class:`BuildError` where there is none."""
    candidates = list(_nvcc_candidates())
    for path in candidates:
        if os.access(path, os.X_OK):
            return path
    looked = ", ".join(str(path) for path in candidates)
    raise BuildError(f"no CUDA compiler (nvcc); looked for {looked} and on PATH. {_REMEDY}")


def _nvcc_candidates() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "bin" / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    # The wheel nvidia-cuda-nvcc, which SGLang's dependencies bring.
    for folder in _package_folders("nvidia"):
        yield from sorted(folder.glob("cu*/bin/nvcc"), reverse=True)


@functools.cache
def nvcc_version() -> str:
    """What nvcc says about itself. Raises :class:`BuildError`, without a C++ compiler too."""
    command = [str(nvcc()), "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shlex.join(command)} does not run: {error}. {_REMEDY}") from error
    host = os.environ.get("NVCC_CCBIN", "gcc")
    if shutil.which(host) is None:
        raise BuildError(f"no C++ compiler for nvcc: {host} is not on PATH. {_REMEDY}")
    return done.stdout


@functools.cache
def include_folders() -> tuple[Path, ...]:
    """Our headers, FlashInfer's with the CCCL they need, and tvm_ffi's, in search order.

    Raises :class:`BuildError` if a package is missing.
    """
    data = _package_folder("flashinfer", "flashinfer-python") / "data"
    # CCCL ahead of the toolkit's own: FlashInfer uses what older toolkits lack.
    cccl = (data / "cccl" / part for part in ("cub", "libcudacxx/include", "thrust"))
    return (
        _PACKAGE / "include",
        *cccl,
        data / "include",
        data / "csrc",
        _package_folder("tvm_ffi", "apache-tvm-ffi") / "include",
    )


def _package_folder(name: str, distribution: str) -> Path:
    for folder in _package_folders(name):
        return folder
    raise BuildError(
        f"no package {name}, whose headers the kernels include: pip install {distribution}. "
        'The torch ops work without (impl="reference").'
    )


def _package_folders(name: str) -> list[Path]:
    """Where package ``name`` lies, without importing it: FlashInfer takes seconds to import."""
    spec = importlib.util.find_spec(name)
    return [] if spec is None else [Path(path) for path in spec.submodule_search_locations or ()]


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
