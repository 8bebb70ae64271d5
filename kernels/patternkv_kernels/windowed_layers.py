"""Layers whose new tokens wait in windows, and the store of these tokens for all layers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from patternkv_kernels.dispatch import Impl, use_cuda
from patternkv_kernels.format import SlotFormat
from patternkv_kernels.store import store_kv
from patternkv_kernels.store_cuda import store_windows_cuda, unsupported
from patternkv_kernels.tables import LayerTables


@dataclass(frozen=True, eq=False)
class WindowedLayers:
    """Where layers of one format have their pools, tables and windows, all on one device.

    Raises ``ValueError`` where they are not alike, or not contiguous.
    """

    fmt: SlotFormat
    buffers: Sequence[torch.Tensor]
    """uint8 ``[num_pages, page_bytes]`` each, written in place"""
    tables: Sequence[LayerTables]
    window_k: Sequence[torch.Tensor]
    """model dtype ``[num_rings, window, h_kv, d]`` each, contiguous"""
    window_v: Sequence[torch.Tensor]
    """as ``window_k``"""
    addresses: torch.Tensor = field(init=False)
    """int64 ``[num_layers, 6]`` on the device: ``StoreLayer`` of ``store_table.cuh``"""

    def __post_init__(self) -> None:
        counts = [len(x) for x in (self.buffers, self.tables, self.window_k, self.window_v)]
        if len(set(counts)) > 1 or not counts[0]:
            raise ValueError(
                f"{counts} pools, tables and windows of K and V: each layer needs one of each"
            )
        first, num_patterns = self.window_k[0], self.tables[0].num_patterns
        for layer, (buffer, tables, *_) in enumerate(self.each()):
            self.fmt.check(buffer)
            tables.check(self.fmt.h_kv, self.fmt.head_dim)
            if tables.num_patterns != num_patterns:
                raise ValueError(
                    f"layer {layer} of these has tables of {tables.num_patterns} patterns, layer 0 "
                    f"of {num_patterns}: allocate all with one num_patterns"
                )
            if not tables.is_contiguous():
                raise ValueError(
                    f"layer {layer} of these has tables that are not contiguous: kernels address "
                    "them by shape alone"
                )
        needed = (self.fmt.h_kv, self.fmt.head_dim)
        for ring in (*self.window_k, *self.window_v):
            alike = ring.shape == first.shape and ring.dtype == first.dtype
            if not alike or ring.shape[2:] != needed or not ring.is_contiguous():
                raise ValueError(
                    f"windows are {first.dtype} {list(first.shape)} and {ring.dtype} "
                    f"{list(ring.shape)}: they must be alike, contiguous and end in {list(needed)}"
                )

        parts = [
            (buffer, own.patterns, own.channel_scale, own.channel_weight, window_k, window_v)
            for buffer, own, window_k, window_v in self.each()
        ]
        rows = [[part.data_ptr() for part in layer] for layer in parts]
        # Ahead of any graph capture, which allows no copy from the host.
        addresses = torch.tensor(rows, dtype=torch.int64, device=self.buffers[0].device)
        object.__setattr__(self, "addresses", addresses)

    def each(self) -> Iterator[tuple[torch.Tensor, LayerTables, torch.Tensor, torch.Tensor]]:
        """Pool, tables and windows of K and of V of every layer."""
        return zip(self.buffers, self.tables, self.window_k, self.window_v, strict=True)


def store_windows(
    layers: WindowedLayers,
    slots: torch.Tensor,
    index: torch.Tensor,
    table_ids: torch.Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Quantize ``n`` tokens that the windows of every layer hold and write them to ``slots``, as
    :func:`~patternkv_kernels.store.store_kv` does for one layer.

    Parameters
    ----------
    slots: int64 or int32 ``[n]``.
    index: int64 or int32 ``[n]``, rows of the rings taken together, as in ``WindowWrite``; none is
        negative.
    table_ids: integer ``[n]``.

    Raises ``ValueError`` for arguments that do not fit each other.
    """
    n = len(slots)
    if index.shape != (n,) or table_ids.shape != (n,):
        raise ValueError(
            f"index is {list(index.shape)} and table_ids {list(table_ids.shape)}: {n} slots need "
            f"[{n}] of each"
        )
    fmt, first, tables = layers.fmt, layers.window_k[0], layers.tables[0]
    if use_cuda(impl, "store", fmt, slots.device, unsupported(first, layers.window_v[0], tables)):
        arguments = layers.addresses, tables.num_patterns, first.dtype, slots, index, table_ids
        store_windows_cuda(fmt, *arguments)
        return
    for buffer, tables, *rings in layers.each():
        k, v = (ring.flatten(0, 1)[index.long()] for ring in rings)
        store_kv(fmt, buffer, slots, k, v, tables, table_ids, impl="reference")
