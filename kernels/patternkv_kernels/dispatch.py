"""Which implementation of an op runs: the CUDA kernels or the torch reference.

Environment: ``PATTERNKV_IMPL``, what ``impl="auto"`` stands for: ``reference`` runs the torch ops
on a GPU too, to compare a server's kernels with; ``cuda`` makes it an error where the kernels
cannot run; ``auto``, the default, takes the torch ops there. ``PATTERNKV_IMPL_DECODE`` and so on,
one for each op of ``jit.OPS``, win for theirs. They are read when a process first runs the op.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Literal, get_args

import torch

import patternkv_kernels.compiler as compiler
import patternkv_kernels.jit as jit
from patternkv_kernels.format import SlotFormat

Impl = Literal["auto", "cuda", "reference"]
IMPLS: tuple[Impl, ...] = get_args(Impl)
"""``cuda`` raises where the kernels cannot run, ``auto`` then takes the torch reference."""

logger = logging.getLogger(__name__)


def use_cuda(
    impl: Impl, op: jit.Op, fmt: SlotFormat | None, device: torch.device, unsupported: str | None
) -> bool:
    """Whether the CUDA kernels of ``op`` run; builds them at the first use.

    ``unsupported`` says why they cannot take the op's arguments, None if they can: then ``fmt`` is
    what they are built for. Raises
    ``ValueError`` for ``impl="cuda"`` when they cannot run, and for an unknown ``impl``.
    """
    if impl == "auto":
        impl = auto_impl(op)
    elif impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: choose one of {IMPLS}")
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return False
    reason = unsupported
    if reason is None and fmt is not None:
        reason = _missing(op, fmt, device)
    if impl == "cuda" and reason is not None:
        raise ValueError(f"impl='cuda' cannot run {op}: {reason}")
    if reason is not None:
        _warn(op, reason)
    return reason is None


@functools.cache
def auto_impl(op: jit.Op) -> Impl:
    """What the environment says of ``op``. Raises ``ValueError`` for a value that is no
    implementation."""
    name = f"PATTERNKV_IMPL_{op.upper()}"
    if name not in os.environ:
        name = "PATTERNKV_IMPL"
    value = os.environ.get(name, "auto")
    for impl in IMPLS:
        if value == impl:
            return impl
    raise ValueError(f"{name}={value!r}: choose one of {IMPLS}, or leave it unset")


def missing(op: jit.Op, fmt: SlotFormat, device: torch.device) -> str | None:
    """Why ``impl="auto"`` runs no CUDA kernels of ``op`` on ``device``, or None; builds them at the
    first use."""
    if auto_impl(op) == "reference":
        return "the environment (PATTERNKV_IMPL) asks for the torch ops"
    return _missing(op, fmt, device)


def _missing(op: jit.Op, fmt: SlotFormat, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}"
    return _failure(op, fmt.k_bits, fmt.v_bits, fmt.head_dim, device.index)


# Failures are remembered too: a build that fails takes as long as one that works.
@functools.cache
def _failure(op: jit.Op, k_bits: int, v_bits: int, head_dim: int, device: int | None) -> str | None:
    """Why the kernels cannot be loaded, None once they are."""
    try:
        with torch.cuda.device(device):
            jit.load(op, SlotFormat(k_bits, v_bits, head_dim, h_kv=1))
    except compiler.BuildError as error:
        return str(error)
    return None


@functools.cache
def _warn(op: jit.Op, reason: str) -> None:
    logger.warning("PatternKV's %s runs torch ops on the GPU, many times slower: %s", op, reason)
