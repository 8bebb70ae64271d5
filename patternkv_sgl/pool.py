"""Device memory of the PatternKV cache: packed slots, table slots, bf16 windows.

SGLang asks for bytes per token before the pool exists; `PoolGeometry` answers from the same
numbers that `PatternKVPool` allocates, so the reported capacity is the allocated one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from patternkv_kernels import LayerTables, SlotFormat, WindowedLayers

if TYPE_CHECKING:
    from patternkv_sgl.config import PatternKVConfig

TABLE_MEMORY_SHARE = 0.01  # of the KV memory, for table slots, when --kv-quant-tables is unset
MIN_TABLES, MAX_TABLES = 16, 1024
SLOTS_PER_PAGE = 16
"""Slots whose bytes lie together, whatever SGLang's page size: slots are numbers to it. Codes of
one head are then aligned to sectors of the L2 cache, and metadata of neighbouring tokens share
them, which is a quarter of the time of private attention."""
TABLE_ID_BYTES = torch.int32.itemsize


@contextmanager
def explained_memory(what: str, *flags: str) -> Iterator[None]:
    """Say what did not fit and which ``flags`` to lower, where allocating ``what`` fails.

    Raises:
        RuntimeError: in place of PyTorch's out-of-memory error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"no GPU memory for {what} of --kv-quant patternkv: lower {', '.join(flags)}, or free "
            f"the memory that other processes hold. PyTorch says: {error}"
        ) from error


@dataclass(frozen=True)
class PoolGeometry:
    """Sizes of one rank's pool.

    Attributes:
        config: the user's options.
        num_layers, h_kv, head_dim: of this rank's shard of the model.
        dtype: model dtype, kept by the windows.
    """

    config: PatternKVConfig
    num_layers: int
    h_kv: int
    head_dim: int
    dtype: torch.dtype

    @cached_property
    def slot_formats(self) -> list[SlotFormat]:
        """Of every layer."""
        return self.config.slot_formats(self.num_layers, self.h_kv, self.head_dim, SLOTS_PER_PAGE)

    @property
    def bytes_per_token(self) -> int:
        """All layers of one slot, and its table id."""
        return sum(fmt.bytes_per_token for fmt in self.slot_formats) + TABLE_ID_BYTES

    @property
    def dense_bytes_per_token(self) -> int:
        """The same token in the model dtype: what stock SGLang stores, and a window entry."""
        return 2 * self.num_layers * self.h_kv * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_table(self) -> int:
        one = LayerTables.allocate(1, self.h_kv, self.config.patterns, self.head_dim, "meta")
        return self.num_layers * one.nbytes

    @property
    def bytes_per_window(self) -> int:
        return self.config.window * self.dense_bytes_per_token

    def num_tables(self, kv_bytes: int) -> int:
        """Table slots for a KV budget of ``kv_bytes``, the zero table included."""
        if self.config.tables is not None:
            return self.config.tables
        affordable = int(kv_bytes * TABLE_MEMORY_SHARE) // self.bytes_per_table
        return max(MIN_TABLES, min(MAX_TABLES, affordable))

    def reserved_bytes(self, kv_bytes: int, num_windows: int, scratch_bytes: int = 0) -> int:
        """Bytes of ``kv_bytes`` that tables, windows and the backend's scratch take from slots.

        Raises:
            ValueError: nothing would be left for slots.
        """
        tables = self.num_tables(kv_bytes) * self.bytes_per_table
        windows = num_windows * self.bytes_per_window
        if tables + windows + scratch_bytes >= kv_bytes:
            raise ValueError(
                f"{self.num_tables(kv_bytes)} pattern tables ({tables / 2**20:.0f} MiB), "
                f"{num_windows} windows ({windows / 2**20:.0f} MiB) and kernel scratch "
                f"({scratch_bytes / 2**20:.0f} MiB) leave nothing of the KV memory "
                f"of {kv_bytes / 2**20:.0f} MiB: lower --kv-quant-patterns, --kv-quant-tables, "
                "--kv-quant-window or --max-running-requests, or raise --mem-fraction-static"
            )
        return tables + windows + scratch_bytes


class PatternKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """KV pool of SGLang (mem_cache/memory_pool.py) that holds packed slots.

    Attributes:
        slot_formats: per layer.
        packed: per layer, uint8 [num_pages, page_bytes] in its format, pages of `SLOTS_PER_PAGE`.
        slot_table: int32 [num_slots]: the table each slot was quantized with, for all layers.
        tables: per layer, the patterns and channel scales of every table slot.
        window_k, window_v: per layer, [num_windows, window, h_kv, head_dim]; the ring of request
            row ``r`` holds position ``p`` at ``p % window``.

    SGLang's page 0, of its own page size, is its padding sink: dummy tokens write there, with the
    zero table.
    """

    def __init__(
        self, size: int, *, geometry: PoolGeometry, num_tables: int, num_windows: int, **kwargs: Any
    ) -> None:
        self.geometry = geometry
        self.slot_formats = geometry.slot_formats
        self.num_tables, self.num_windows = num_tables, num_windows
        super().__init__(size, **kwargs)

    def _create_buffers(self) -> None:
        if self.post_capture_active:
            raise NotImplementedError(
                "--kv-quant patternkv needs its memory before graph capture: unset "
                "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
            )
        geometry = self.geometry
        rows = -(-(self.size + self.page_size) // SLOTS_PER_PAGE) * SLOTS_PER_PAGE
        h_kv, head_dim, layers = self.head_num, self.head_dim, range(self.layer_num)
        expected = (geometry.h_kv, geometry.head_dim, geometry.num_layers)
        actual = (h_kv, head_dim, self.layer_num)
        assert actual == expected, f"pool of {actual} (heads, dim, layers), sized for {expected}"

        self.packed = [fmt.allocate(rows, self.device) for fmt in self.slot_formats]
        self.slot_table = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self.tables = [
            LayerTables.allocate(
                self.num_tables, h_kv, geometry.config.patterns, head_dim, self.device
            )
            for _ in layers
        ]
        ring = (self.num_windows, geometry.config.window, h_kv, head_dim)
        self.window_k = [torch.zeros(ring, dtype=self.dtype, device=self.device) for _ in layers]
        self.window_v = [torch.zeros_like(k) for k in self.window_k]
        # Stock code that walks the dense buffers finds none: nobody may read this pool as dense.
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []

    def windowed_layers(self) -> list[WindowedLayers]:
        """The layers of each format."""
        alike: dict[SlotFormat, list[int]] = defaultdict(list)
        for layer, fmt in enumerate(self.slot_formats):
            alike[fmt].append(layer)
        return [
            WindowedLayers(
                fmt,
                [self.packed[layer] for layer in layers],
                [self.tables[layer] for layer in layers],
                [self.window_k[layer] for layer in layers],
                [self.window_v[layer] for layer in layers],
            )
            for fmt, layers in alike.items()
        ]

    def get_kv_size_bytes(self) -> int:
        """Every byte this pool allocated: slots, table ids, tables, windows."""
        slots = sum(packed.nbytes for packed in self.packed) + self.slot_table.nbytes
        return slots + self.table_bytes + self.window_bytes

    @property
    def table_bytes(self) -> int:
        return sum(tables.nbytes for tables in self.tables)

    @property
    def window_bytes(self) -> int:
        return sum(ring.nbytes for ring in (*self.window_k, *self.window_v))

    def describe(self) -> str:
        """The start-up line: what the pool is made of and what it saves."""
        geometry, mib = self.geometry, 2**20
        bits = [geometry.config.bits]
        for layer, (k_bits, v_bits) in geometry.config.exceptions(geometry.num_layers).items():
            bits.append(f"{k_bits}/{v_bits} in layer {layer}")
        ratio = geometry.dense_bytes_per_token / geometry.bytes_per_token
        return (
            f"PatternKV cache: bits K/V {', '.join(bits)}, "
            f"{geometry.bytes_per_token} bytes per token against "
            f"{geometry.dense_bytes_per_token} in {str(self.dtype).removeprefix('torch.')} "
            f"({ratio:.2f}x), {self.size} tokens, {self.num_tables - 1} table slots of "
            f"{geometry.config.patterns} patterns ({self.table_bytes / mib:.1f} MiB), "
            f"{self.num_windows} windows of {geometry.config.window} tokens "
            f"({self.window_bytes / mib:.1f} MiB)"
        )

    def _refuse(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{what} is not available with --kv-quant patternkv: the cache holds packed residuals, "
            "not dense K and V"
        )

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        raise self._refuse("get_key_buffer")

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        raise self._refuse("get_value_buffer")

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> None:
        raise self._refuse("set_kv_buffer (the attention backend stores through store_kv)")

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        raise self._refuse("move_kv_cache")

    def get_cpu_copy(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse("get_cpu_copy")

    def load_cpu_copy(self, *args: Any, **kwargs: Any) -> None:
        raise self._refuse("load_cpu_copy")

    def get_contiguous_buf_infos(self) -> Any:
        raise self._refuse("get_contiguous_buf_infos")
