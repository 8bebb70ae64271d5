"""Which implementation of an op runs: the CUDA kernels or the torch reference."""

from __future__ import annotations

import functools
import logging
from typing import Literal, get_args

import torch

import patternkv_kernels.jit as jit

Impl = Literal["auto", "cuda", "reference"]
"""``cuda`` raises where the kernels cannot run, ``auto`` then takes the torch reference."""

logger = logging.getLogger(__name__)


def use_cuda(impl: Impl, device: torch.device, unsupported: str | None) -> bool:
    """Whether the CUDA kernels run.

    ``unsupported`` says why they cannot take the op's arguments, None if they can. Raises
    ``ValueError`` for ``impl="cuda"`` when they cannot run, and for an unknown ``impl``.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r}: choose one of {get_args(Impl)}")
    if impl == "reference":
        return False
    if device.type != "cuda":
        unsupported = f"the tensors are on {device}"
    reason = unsupported or jit.unavailable()
    if impl == "cuda" and reason is not None:
        raise ValueError(f"impl='cuda' cannot run: {reason}")
    if reason is not None and device.type == "cuda":
        _warn(reason)
    return reason is None


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("PatternKV runs torch ops on the GPU, many times slower: %s", reason)
