"""Rotation in torch: what :func:`patternkv_kernels.rotate.rotate` means."""

from __future__ import annotations

import functools

import torch


@functools.cache
def hadamard(
    d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Symmetric ``[d, d]`` of ones, minus ones and zeros: along the diagonal, Sylvester's matrix of
    the largest power of two that divides ``d``. Its square is that power times the identity.
    Everyone gets the same tensor."""
    block = d & -d
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix] * (d // block)).to(device, dtype)


def rotate_heads(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``(x * factors) @ hadamard(d)`` of ``x [..., h, d]`` and ``factors [h, d]``, dtypes alike."""
    return (x * factors) @ hadamard(x.shape[-1], x.dtype, x.device)


def rotate_reference(
    q: torch.Tensor, k: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~patternkv_kernels.rotate.rotate` of arguments that it has checked.

    Two kernels, or three where ``q`` and ``k`` are not parts of one projection's output.
    """
    both = _together(q, k)
    if both is None:
        both = torch.cat([q, k], 1)
    turned_q, turned_k = rotate_heads(both, factors).split([q.shape[1], k.shape[1]], 1)
    return turned_q, turned_k


def _together(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """``[n, h_q + h_kv, d]`` without a copy, if ``k``'s heads lie behind ``q``'s."""
    n, h_q, d = q.shape
    follows = k.data_ptr() == q.data_ptr() + h_q * d * q.itemsize
    if not follows or q.stride() != k.stride() or q.stride()[1:] != (d, 1):
        return None
    return q.as_strided((n, h_q + k.shape[1], d), q.stride())
