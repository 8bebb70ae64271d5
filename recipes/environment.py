"""What there is to make a result with: versions, hardware, commit, optional packages."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import patternkv_kernels
import patternkv_sgl

PACKAGES = ("sglang", "torch", "flashinfer-python", "transformers", "triton")
SOURCES = {".cu", ".cuh", ".h", ".py"}


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it runs on; None if not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "patternkv-sgl": patternkv_sgl.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def demo_package(name: str, need: str) -> ModuleType:
    """Import a package of this one's extra ``demo``, without which it may be installed.

    Args:
        name: as pip knows it. need: what it is for, with its verb: ``plots need``.

    Raises:
        RuntimeError: the package is not installed, or one that it needs itself.
    """
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise RuntimeError(
            f"{need} {name}, which does not import ({error}): install this package with its extra "
            "demo, in a checkout by pip install '.[demo]'"
        ) from None


def hardware() -> dict[str, str | int | None]:
    """Names of CPU and GPU, and how many of each this process may use."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
    }


def git_commit() -> str | None:
    """Commit of the checkout this file is in, with ``-dirty`` if files differ from it; None without
    a checkout. ``PATTERNKV_COMMIT`` names it for files that travelled without their history."""
    if named := os.environ.get("PATTERNKV_COMMIT"):
        return named

    def git(*words: str) -> str:
        where = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(where), *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def source_digest() -> str:
    """Digest of this package's sources: the cache, its kernels and the recipes. It tells versions
    apart between commits and where there is no history."""
    digest = hashlib.sha256()
    for file in (patternkv_kernels.__file__, patternkv_sgl.__file__, __file__):
        folder = Path(file).parent
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
