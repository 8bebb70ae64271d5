"""The CUDA kernels of the store without a GPU: their sources run on the CPU, thread by thread."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import pytest
import torch

from patternkv_kernels import LayerTables, SlotFormat, WindowWrite, store_kv
from tests.cases import chosen
from tests.simt_library import compile_library, fields, unavailable
from tests.test_store_cuda import (
    assert_as_good_as_the_reference,
    random_kv,
    random_slots,
    random_table_ids,
    random_tables,
)

REASON = unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

_POINTERS = [
    "buffer",
    "slots",
    "k",
    "v",
    "patterns",
    "channel_scale",
    "channel_weight",
    "table_ids",
    "window_k",
    "window_v",
    "window_rows",
]
_NUMBERS = ["n", "h_kv", "page_size", "num_patterns", "tokens_per_block", "in_windows"]
FEW = (-8, -4)
"""In place of tokens per block: `store_few` with blocks of as many warps."""


class Arguments(ctypes.Structure):
    """``Arguments`` of ``simt/store.cpp``."""

    _fields_ = fields(_POINTERS, _NUMBERS)


@functools.cache
def library(k_bits: int, v_bits: int, head_dim: int) -> ctypes.CDLL:
    return compile_library("store", k_bits, v_bits, head_dim)


@dataclass(frozen=True)
class Batch:
    """Random tokens to store, and an empty pool."""

    fmt: SlotFormat
    tables: LayerTables
    k: torch.Tensor
    v: torch.Tensor
    table_ids: torch.Tensor
    empty: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def make(cls, fmt: SlotFormat, n: int, num_patterns: int, dtype: torch.dtype) -> Batch:
        k, v = random_kv(n, fmt.h_kv, fmt.head_dim, dtype, device="cpu")
        return cls(
            fmt,
            random_tables(fmt.h_kv, num_patterns, fmt.head_dim, device="cpu"),
            k.contiguous(),
            v.contiguous(),
            random_table_ids(n, device="cpu"),
            *random_slots(fmt, n, device="cpu"),
        )

    def stored(self, tokens_per_block: int, window: WindowWrite | None = None) -> torch.Tensor:
        """The pool that the kernels fill."""
        pool = self.empty.clone()
        tensors = [pool, self.slots, self.k, self.v, self.tables.patterns]
        tensors += [self.tables.channel_scale, self.tables.channel_weight, self.table_ids]
        tensors += [] if window is None else [window.k, window.v, window.index]
        pointers = [x.data_ptr() for x in tensors] + [None] * (len(_POINTERS) - len(tensors))
        n, patterns = len(self.slots), self.tables.num_patterns
        numbers = n, self.fmt.h_kv, self.fmt.page_size, patterns, tokens_per_block, False
        self._call(Arguments(*pointers, *numbers))
        return pool

    def stored_from_windows(self, rings: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The pool that the kernel of all layers fills with tokens ``index`` of K's and V's
        ``rings``."""
        pool = self.empty.clone()
        tensors = [pool, self.slots, *rings, self.tables.patterns, self.tables.channel_scale]
        tensors += [self.tables.channel_weight, self.table_ids]
        pointers = [*(x.data_ptr() for x in tensors), None, None, index.data_ptr()]
        n, patterns = len(self.slots), self.tables.num_patterns
        self._call(
            Arguments(*pointers, n, self.fmt.h_kv, self.fmt.page_size, patterns, 64, in_windows=1)
        )
        return pool

    def _call(self, arguments: Arguments) -> None:
        of_format = library(self.fmt.k_bits, self.fmt.v_bits, self.fmt.head_dim)
        store = of_format.store_bf16 if self.k.dtype == torch.bfloat16 else of_format.store_fp16
        store(ctypes.byref(arguments))

    def stored_by_reference(self) -> torch.Tensor:
        pool = self.empty.clone()
        arguments = self.slots, self.k, self.v, self.tables, self.table_ids
        store_kv(self.fmt, pool, *arguments, impl="reference")
        return pool


@pytest.mark.parametrize(
    ("bits", "d", "page_size", "num_patterns", "dtype"),
    [
        ((4, 4), 128, 1, 64, torch.bfloat16),
        ((2, 2), 128, 16, 100, torch.float16),
        ((4, 2), 64, 3, 5, torch.bfloat16),
        ((2, 4), 96, 1, 64, torch.float16),
        ((4, 4), 256, 64, 256, torch.bfloat16),
    ],
)
def test_both_follow_the_reference(
    bits: tuple[int, int], d: int, page_size: int, num_patterns: int, dtype: torch.dtype
) -> None:
    """Tokens of several tables in a block; the last tile has a part of its tokens."""
    fmt = SlotFormat(*bits, d, page_size, h_kv=2)
    batch = Batch.make(fmt, 150, num_patterns, dtype)
    pool = batch.stored(tokens_per_block=96)
    for few in FEW:
        assert torch.equal(pool, batch.stored(few))
    others = batch.slots, batch.k, batch.v, batch.tables, batch.table_ids
    assert_as_good_as_the_reference(fmt, pool, batch.stored_by_reference(), *others)


@pytest.mark.parametrize("tokens_per_block", [*FEW, 64])
def test_tokens_that_equal_a_pattern_get_it(tokens_per_block: int) -> None:
    """Also when patterns are so alike that float32 scores cannot tell them apart."""
    fmt = SlotFormat(4, 4, 128, h_kv=2)
    batch = Batch.make(fmt, 80, 64, torch.float16)
    patterns = batch.tables.patterns[:-1]
    patterns *= 20
    patterns[:, :, :, 1::2] = patterns[:, :, :, ::2]
    patterns[:, :, :, 1::2, 7] *= 1 + 2.0**-7
    ids = torch.arange(80) * 5 % 64
    for side, x in enumerate((batch.k, batch.v)):
        x.copy_(patterns[batch.table_ids.long(), side, :, ids])
    pool = batch.stored(tokens_per_block)
    for side in range(2):
        assert (chosen(fmt, pool, batch.slots, side) == ids.unsqueeze(1)).all()


@pytest.mark.parametrize("tokens_per_block", [*FEW, 64])
def test_the_window_gets_tokens_as_they_are(tokens_per_block: int) -> None:
    fmt = SlotFormat(4, 2, 64, h_kv=3)
    batch = Batch.make(fmt, 70, 16, torch.bfloat16)
    index = torch.randperm(100)[:70]
    index[::7] = -1
    rings = torch.zeros(2, 5, 20, 3, 64, dtype=torch.bfloat16)
    pool = batch.stored(tokens_per_block, WindowWrite(rings[0], rings[1], index))
    assert torch.equal(pool, batch.stored(tokens_per_block))
    kept = index >= 0
    for ring, x in zip(rings.flatten(1, 2), (batch.k, batch.v), strict=True):
        assert torch.equal(ring[index[kept]], x[kept])
        ring[index[kept]] = 0
        assert not ring.any()


def test_tokens_in_windows_are_stored_as_others() -> None:
    fmt = SlotFormat(4, 2, 64, h_kv=3)
    batch = Batch.make(fmt, 70, 16, torch.bfloat16)
    index = torch.randperm(100)[:70]
    rings = torch.full((2, 100, 3, 64), torch.nan, dtype=torch.bfloat16)
    rings[0, index], rings[1, index] = batch.k, batch.v
    assert torch.equal(batch.stored_from_windows(rings, index), batch.stored(64))
