"""Tree decode: one query token per branch over shared and private segments of packed KV."""

from __future__ import annotations

import torch

from patternkv_kernels.decode_cuda import DecodeWorkspace, tree_decode_cuda, unsupported
from patternkv_kernels.decode_reference import tree_decode_reference
from patternkv_kernels.dispatch import Impl, use_cuda
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.plan import DecodePlan
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import Window


def tree_decode(
    q: torch.Tensor,
    fmt: SlotFormat,
    buffer: torch.Tensor,
    tables: LayerTables,
    plan: DecodePlan,
    *,
    window: Window | None,
    sm_scale: float,
    logit_cap: float = 0.0,
    workspace: DecodeWorkspace | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Attention output of every row, ``[b, h_q, d]`` in ``q.dtype``; see
    :func:`tree_decode_with_lse`."""
    return tree_decode_with_lse(
        q,
        fmt,
        buffer,
        tables,
        plan,
        window=window,
        sm_scale=sm_scale,
        logit_cap=logit_cap,
        workspace=workspace,
        impl=impl,
    )[0]


def tree_decode_with_lse(
    q: torch.Tensor,
    fmt: SlotFormat,
    buffer: torch.Tensor,
    tables: LayerTables,
    plan: DecodePlan,
    *,
    window: Window | None,
    sm_scale: float,
    logit_cap: float = 0.0,
    workspace: DecodeWorkspace | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode attention over the segments of ``plan`` and the exact tokens of ``window``, which
    keeps the newest of them from here on.

    Parameters
    ----------
    q: ``[b, h_q, d]``, any float dtype; query head ``i`` reads KV head ``i // (h_q // h_kv)``.
    buffer: uint8 ``[num_pages, page_bytes]``.
    sm_scale: factor on ``q @ k``.
    logit_cap: ``cap * tanh(logit / cap)`` when positive, as SGLang's attention backends do.
    workspace: holds the work list of ``plan``, written by
        :func:`~patternkv_kernels.decode_cuda.plan_decode` once for all layers; None allocates and
        writes one for this call. The torch reference needs none.
    impl: the CUDA kernels round queries and probabilities to float16.

    Returns ``out [b, h_q, d]`` in ``q.dtype`` and ``lse [b, h_q]`` float32, natural logarithm. A
    row without any token has ``out = 0`` and ``lse = -inf``.

    Raises ``ValueError`` for shapes and dtypes that do not fit the format or each other. For a plan
    of more rows than ``q`` the reference raises it, too; the CUDA planner, which the host does not
    wait for, traps, and also for a plan that ``workspace`` has no room for.
    """
    d, h_kv = fmt.head_dim, fmt.h_kv
    fmt.check(buffer)
    tables.check(h_kv, d)
    if q.dim() != 3 or q.shape[1] % h_kv or q.shape[2] != d:
        raise ValueError(f"q is {list(q.shape)}: needs head_dim={d} and a multiple of {h_kv} heads")
    if window is not None:
        window.check(q)
    arguments = (q, fmt, buffer, tables, plan, window, sm_scale, logit_cap)
    if use_cuda(impl, "decode", fmt, q.device, unsupported(q, fmt, tables, window, plan)):
        return tree_decode_cuda(*arguments, workspace)
    return tree_decode_reference(*arguments)
