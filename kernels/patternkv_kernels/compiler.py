"""The CUDA compiler: where it is, what it compiles for, and the headers that it needs.

Environment: ``CUDA_HOME``, ``CUDA_PATH``, ``NVCC_CCBIN``; ``PATTERNKV_CUDA_ARCH`` (``80``, ``89``,
``90a`` …; default: the current GPU's).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

MIN_ARCH = 80
"""Asynchronous copies and bfloat16 tensor cores came with compute capability 8.0."""

_ARCH = "PATTERNKV_CUDA_ARCH"
_OURS = Path(__file__).parent / "include"
_REMEDY = (
    "Install the CUDA toolkit (nvcc and a C++ compiler) or set CUDA_HOME to it; "
    'the torch ops work without (impl="reference").'
)


class BuildError(RuntimeError):
    """The CUDA kernels cannot be built or loaded here; the message says why and what to do."""


def arch(remedy: str = f"set {_ARCH}") -> str:
    """The architecture to compile for: ``PATTERNKV_CUDA_ARCH``, else the current GPU's.

    Raises :class:`BuildError` where there is neither, with ``remedy``, and for GPUs before compute
    capability 8.0.
    """
    wanted = os.environ.get(_ARCH, "")
    if wanted:
        return checked_arch(wanted, f"{_ARCH}=")
    # Asking whether there is a GPU costs more than the rest of an op's dispatch.
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        raise BuildError(
            f"no GPU tells which architecture to compile for: {remedy} (80, 89, 90a …)"
        )
    return _device_arch(torch.cuda.current_device())


def checked_arch(wanted: str, source: str) -> str:
    """``wanted``, as in ``sm_<wanted>``.

    Raises :class:`BuildError` if it is no architecture that the kernels run on; the message begins
    with ``source``, which it was given by.
    """
    if re.fullmatch(r"\d{2,3}[af]?", wanted) is None:
        raise BuildError(
            f"{source}{wanted!r}: must be digits and at most one letter, as in sm_90a: "
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
        _OURS,
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
