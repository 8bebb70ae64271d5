"""Store: quantize K/V vectors against their tables and write them to their slots."""

from __future__ import annotations

import torch

from patternkv_kernels.dispatch import Impl, use_cuda
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.store_cuda import store_kv_cuda, unsupported
from patternkv_kernels.store_reference import store_kv_reference
from patternkv_kernels.tables import LayerTables
from patternkv_kernels.window import WindowWrite


def store_kv(
    fmt: SlotFormat,
    buffer: torch.Tensor,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: LayerTables,
    table_ids: torch.Tensor,
    *,
    impl: Impl = "auto",
    window: WindowWrite | None = None,
) -> None:
    """Quantize the ``n`` tokens ``k``, ``v`` and write them to ``slots``.

    The bytes of a token depend on its own K, V and table only, whatever it is batched with. The two
    implementations agree but for near ties between patterns, scales and codes.

    Parameters
    ----------
    buffer: uint8 ``[num_pages, page_bytes]``, written in place.
    slots: integer ``[n]``. A slot listed twice ends up with the bytes of one of its tokens, section
        by section.
    k, v: ``[n, h_kv, d]``, any float dtype. NaN is stored as 0, and values beyond the float16 range
        are clamped to it.
    table_ids: integer ``[n]``, the table of each token.
    window: where the tokens are also kept as they are; None: nowhere.

    Raises ``ValueError`` for arguments that do not fit the format and each other.
    """
    n, h_kv, d = len(slots), fmt.h_kv, fmt.head_dim
    fmt.check(buffer)
    tables.check(h_kv, d)
    if k.shape != (n, h_kv, d) or v.shape != (n, h_kv, d) or table_ids.shape != (n,):
        raise ValueError(
            f"k is {list(k.shape)}, v {list(v.shape)}, table_ids {list(table_ids.shape)}: "
            f"{n} slots of this pool need [{n}, {h_kv}, {d}], the same, and [{n}]"
        )
    if window is not None:
        window.check(k, v)
    store = store_kv_reference
    if use_cuda(impl, "store", fmt, buffer.device, unsupported(k, v, tables)):
        store = store_kv_cuda
    store(fmt, buffer, slots, k, v, tables, table_ids, window)
