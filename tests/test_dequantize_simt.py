"""The CUDA kernel of dequantize without a GPU: its source runs on the CPU, thread by thread."""

from __future__ import annotations

import ctypes

import pytest
import torch

from patternkv_kernels import SlotFormat
from tests.cases import NUM_TABLES, fill_slots, formula, random_tables
from tests.simt_library import compile_library, fields, unavailable

REASON = unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

_POINTERS = ["buffer", "slots", "table_ids", "patterns", "channel_scale", "k", "v"]
_NUMBERS = ["n", "h_kv", "page_size", "num_patterns", "slots_are_int64", "blocks"]


class Arguments(ctypes.Structure):
    """``Arguments`` of ``simt/dequantize.cpp``."""

    _fields_ = fields(_POINTERS, _NUMBERS)


@pytest.mark.parametrize(
    ("bits", "d", "page_size"),
    [((4, 4), 128, 1), ((4, 2), 96, 3), ((2, 2), 256, 16), ((2, 4), 64, 1)],
)
def test_rounds_the_formula(bits: tuple[int, int], d: int, page_size: int) -> None:
    """Whole runs of tokens and a part of one, fewer blocks than runs and more."""
    h_kv = 3
    fmt = SlotFormat(*bits, d, page_size, h_kv=h_kv)
    library = compile_library("dequantize", *bits, d)
    tables = random_tables(h_kv, d, seed=0)
    for n, blocks, dtype, name in (
        (333, 2, torch.bfloat16, "bf16"),
        (7, 1, torch.float16, "fp16"),
        (256, 6, torch.float32, "fp32"),
    ):
        buffer = fmt.allocate(-(-n // page_size) * page_size, "cpu").fill_(0xFF)
        slots = torch.randperm(n)
        slots = slots if n % 2 else slots.int()
        fill_slots(fmt, buffer, slots.long(), 16, seed=1)
        table_ids = torch.randint(NUM_TABLES, (n,), dtype=torch.int32)
        k, v = (torch.full((n, h_kv, d), torch.nan, dtype=dtype) for _ in range(2))
        tensors = [buffer, slots, table_ids, tables.patterns, tables.channel_scale, k, v]
        pointers = [x.data_ptr() for x in tensors]
        numbers = (n, h_kv, page_size, tables.num_patterns, slots.dtype == torch.int64, blocks)
        library[f"dequantize_{name}"](ctypes.byref(Arguments(*pointers, *numbers)))
        for x, exact in zip((k, v), formula(fmt, buffer, slots, tables, table_ids), strict=True):
            assert torch.equal(x, exact.float().to(dtype))
