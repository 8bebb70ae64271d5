"""Ragged attention over exact K and V, with its log-sum-exp, and the merge of two such states.

Prefill attends its new tokens causally and its dequantized prefix in full, and merges both. On a
GPU FlashInfer's ragged prefill kernels do the work, elsewhere torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

LN2 = 0.6931471805599453
FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASHINFER_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_WORKSPACE_BYTES = 128 << 20
"""FlashInfer's recommendation for the partial results of split KV."""
INT_WORKSPACE_BYTES = 8 << 20
"""What each FlashInfer wrapper allocates for its plan."""
_QUERY_BLOCK = 512
"""Query rows per step in torch, which bounds the mask and skips keys that no row may see."""

logger = logging.getLogger(__name__)


class RaggedWorkspace:
    """FlashInfer's buffers on one CUDA device, reused from batch to batch.

    Args:
        device: where the attention runs.
        num_plans: plans made room for at once; a batch that needs more adds to them.
    """

    def __init__(self, device: torch.device, num_plans: int) -> None:
        self._floats = torch.empty(FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: list[Any] = []
        self._taken = 0
        for _ in range(num_plans):
            self._add()

    @staticmethod
    def nbytes(num_plans: int) -> int:
        """Bytes of device memory that a workspace takes at first."""
        return FLOAT_WORKSPACE_BYTES + num_plans * INT_WORKSPACE_BYTES

    def _add(self) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        self._wrappers.append(BatchPrefillWithRaggedKVCacheWrapper(self._floats, "NHD"))

    def begin(self) -> None:
        """A new batch: plans of the last one are over."""
        self._taken = 0

    def take(self) -> Any:
        """A wrapper that no other plan of this batch uses."""
        if self._taken == len(self._wrappers):
            self._add()
        self._taken += 1
        return self._wrappers[self._taken - 1]


class RaggedAttention:
    """Attention of some requests' queries over their keys, planned once and run for every layer.

    Args:
        qo_indptr, kv_indptr: ``b + 1`` offsets into the queries and into the keys.
        causal: a request's last query sees all of its keys, earlier ones one less each; False: all
            see all.
        workspace: FlashInfer's buffers; None runs in torch.
    """

    def __init__(
        self,
        qo_indptr: Sequence[int],
        kv_indptr: Sequence[int],
        *,
        causal: bool,
        workspace: RaggedWorkspace | None = None,
    ) -> None:
        self.qo_indptr, self.kv_indptr, self.causal = qo_indptr, kv_indptr, causal
        self._workspace = workspace
        self._wrapper: Any = None
        self._planned: tuple[Any, ...] = ()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        sm_scale: float,
        logit_cap: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``out [n, h_q, d]`` and ``lse [n, h_q]`` float32, natural logarithm.

        ``out`` is in ``q.dtype`` where FlashInfer makes it and float32 from torch, which rounds
        only the merged result.

        Parameters
        ----------
        q: ``[n, h_q, d]``, k, v: ``[m, h_kv, d]``, any float dtype, all requests one after the
            other.
        sm_scale: factor on ``q @ k``.
        logit_cap: ``cap * tanh(logit / cap)`` when positive.

        A query without keys has ``out = 0`` and ``lse = -inf``.
        """
        workspace = self._workspace
        if workspace is None or not _flashinfer_takes(q, k):
            return _attend(q, k, v, self, sm_scale, logit_cap)
        key = (q.shape[1:], k.shape[1], q.dtype, sm_scale, logit_cap)
        if key != self._planned:
            self._wrapper = self._wrapper or workspace.take()
            self._wrapper.plan(
                torch.tensor(self.qo_indptr, dtype=torch.int32),
                torch.tensor(self.kv_indptr, dtype=torch.int32),
                q.shape[1],
                k.shape[1],
                q.shape[2],
                causal=self.causal,
                sm_scale=sm_scale,
                logits_soft_cap=logit_cap or None,
                q_data_type=q.dtype,
                kv_data_type=k.dtype,
            )
            self._planned = key
        out, lse = self._wrapper.run_return_lse(q, k, v)
        return out, lse.mul_(LN2)


def merge_states(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys, from that over each: ``out [n, h, d]`` and natural
    ``lse [n, h]`` as :class:`RaggedAttention` returns them. At least one state is not empty."""
    if out.is_cuda and out.dtype in FLASHINFER_DTYPES and _flashinfer_installed():
        from flashinfer import merge_state

        # Its logarithms have base 2.
        merged, merged_lse = merge_state(out, lse / LN2, other_out, other_lse / LN2)
        return merged, merged_lse.mul_(LN2)
    merged_lse = torch.logaddexp(lse, other_lse)
    weight, other = ((x - merged_lse).exp().unsqueeze(2) for x in (lse, other_lse))
    return (out.float() * weight + other_out.float() * other).to(out.dtype), merged_lse


def _flashinfer_takes(q: torch.Tensor, k: torch.Tensor) -> bool:
    return (
        q.dtype in FLASHINFER_DTYPES
        and k.dtype == q.dtype
        and q.shape[2] in FLASHINFER_HEAD_DIMS
        and len(q) > 0
    )


@functools.cache
def _flashinfer_installed() -> bool:
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        logger.warning("Prefill attention runs torch ops on the GPU, many times slower: %s", error)
        return False
    return True


def ragged_workspace(device: torch.device, num_plans: int) -> RaggedWorkspace | None:
    """FlashInfer's buffers on ``device``; None where torch must do: no GPU or no FlashInfer."""
    if device.type != "cuda" or not _flashinfer_installed():
        return None
    return RaggedWorkspace(device, num_plans)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: RaggedAttention,
    sm_scale: float,
    logit_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:class:`RaggedAttention` in torch; the arithmetic is float32."""
    out = torch.empty(q.shape, device=q.device)
    lse = torch.empty(q.shape[:2], device=q.device)
    qo, kv = plan.qo_indptr, plan.kv_indptr
    for i in range(len(qo) - 1):
        num_new, num_keys = qo[i + 1] - qo[i], kv[i + 1] - kv[i]
        keys, values = (x[kv[i] : kv[i + 1]].float().transpose(0, 1) for x in (k, v))
        for first in range(0, num_new, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, num_new)
            rows = slice(qo[i] + first, qo[i] + last)
            seen = num_keys - num_new + last if plan.causal else num_keys
            block, block_lse = _attend_block(
                q[rows].float().transpose(0, 1),
                keys[:, :seen],
                values[:, :seen],
                sm_scale,
                logit_cap,
                causal=plan.causal,
            )
            out[rows], lse[rows] = block.transpose(0, 1), block_lse.T
    return out, lse


def _attend_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    logit_cap: float,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention ``[h_q, n, d]`` over ``k``, ``v [h_kv, m, d]``, and its ``lse [h_q, n]``."""
    h_kv, (n, m) = k.shape[0], (q.shape[1], k.shape[1])
    rows = q.unflatten(0, (h_kv, -1)).flatten(1, 2)
    logits = torch.bmm(rows, k.transpose(1, 2)).mul_(sm_scale)
    if logit_cap > 0:
        logits.div_(logit_cap).tanh_().mul_(logit_cap)
    logits = logits.unflatten(1, (-1, n))
    if causal and n > 1:
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu_(m - n + 1)
        logits.masked_fill_(hidden, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = logits.sub_(lse.unsqueeze(-1)).exp_() if m else logits
    out = torch.bmm(weights.flatten(1, 2), v).unflatten(1, (-1, n))
    return out.flatten(0, 1), lse.flatten(0, 1)
