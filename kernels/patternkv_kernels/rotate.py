"""Queries and keys in the basis that K is stored in: channels scaled, then mixed.

Residuals of few large channels are what two bits round worst; a Walsh-Hadamard transform spreads
them over all channels. See ``patternkv_sgl/basis.py`` for where the factors come from.
"""

from __future__ import annotations

import torch

import patternkv_kernels.jit as jit
from patternkv_kernels.dispatch import Impl, use_cuda
from patternkv_kernels.rotate_cuda import rotate_cuda, unsupported
from patternkv_kernels.rotate_reference import rotate_reference


def rotate(
    q: torch.Tensor, k: torch.Tensor, factors: torch.Tensor, *, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q * factors[:h_q]) @ H`` and ``(k * factors[h_q:]) @ H``, views of one tensor.

    Parameters
    ----------
    q: ``[n, h_q, d]``, k: ``[n, h_kv, d]``, of one dtype, any strides.
    factors: ``[h_q + h_kv, d]``, in ``q``'s dtype; powers of two, or minus them, are exact.
    impl: the CUDA kernel rounds results only, torch in low precision the products with ``factors``
        too.

    ``H`` is :func:`~patternkv_kernels.rotate_reference.hadamard`.

    Raises ``ValueError`` on shapes or dtypes that do not fit each other.
    """
    (n, h_q, d), h_kv = q.shape, k.shape[1]
    if k.shape != (n, h_kv, d) or factors.shape != (h_q + h_kv, d):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, factors {list(factors.shape)}: expected "
            "[n, h_q, d], [n, h_kv, d] and [h_q + h_kv, d]"
        )
    if not q.dtype == k.dtype == factors.dtype:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype} and factors {factors.dtype}: they must be alike"
        )
    reason = unsupported(q)
    fmt = None if reason else jit.format_of_all_bits(d)
    if use_cuda(impl, "rotate", fmt, q.device, reason):
        return rotate_cuda(q, k, factors)
    return rotate_reference(q, k, factors)
