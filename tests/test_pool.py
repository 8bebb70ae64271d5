"""What the pool allocates is what sizing and start-up say it allocates."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from patternkv_sgl.config import PatternKVConfig, parse_bits
from patternkv_sgl.pool import (
    MAX_TABLES,
    MIN_TABLES,
    SLOTS_PER_PAGE,
    PatternKVPool,
    PoolGeometry,
)
from tests.fakes import make_pool

LLAMA_8B = (32, 8, 128)  # layers, KV heads, head dim


def geometry(bits: str, model: tuple[int, int, int], **options: Any) -> PoolGeometry:
    config = PatternKVConfig(*parse_bits(bits), **options)
    return PoolGeometry(config, *model, torch.bfloat16)


# Codes of K and V, two pattern ids of a byte, two scales of two bytes.
@pytest.mark.parametrize(
    ("bits", "head_dim", "per_head"),
    [
        ("4", 128, 64 + 64 + 2 + 4),
        ("4:2", 128, 64 + 32 + 2 + 4),
        ("2", 128, 32 + 32 + 2 + 4),
        ("4", 64, 32 + 32 + 2 + 4),
        ("2", 256, 64 + 64 + 2 + 4),
        ("2:4", 96, 24 + 48 + 2 + 4),
    ],
)
@pytest.mark.parametrize(("num_layers", "h_kv"), [(32, 8), (80, 1), (28, 2), (6, 2), (64, 32)])
def test_bytes_per_token(
    bits: str, head_dim: int, per_head: int, num_layers: int, h_kv: int
) -> None:
    sizes = geometry(bits, (num_layers, h_kv, head_dim), layer_bits=())
    assert sizes.bytes_per_token == num_layers * h_kv * per_head + 4  # and one table id
    assert sizes.dense_bytes_per_token == num_layers * h_kv * 2 * head_dim * 2


def test_the_last_layer_keeps_k_at_four_bits() -> None:
    sizes, uniform = (geometry("2", LLAMA_8B, **more) for more in ({}, {"layer_bits": ()}))
    assert sizes.bytes_per_token - uniform.bytes_per_token == 8 * 32
    pool = make_pool(PatternKVConfig(2, 2), num_layers=3, h_kv=2)
    assert [(fmt.k_bits, fmt.v_bits) for fmt in pool.slot_formats] == [(2, 2), (2, 2), (4, 2)]
    assert "bits K/V 2/2, 4/2 in layer 2, " in pool.describe()


def test_bytes_per_table_and_window() -> None:
    sizes = geometry("4", LLAMA_8B, patterns=64, window=32)
    # float16 patterns, channel scales and channel weights of K and V.
    assert sizes.bytes_per_table == 32 * 8 * 2 * 2 * (64 * 128 + 2 * 128)
    assert sizes.bytes_per_window == 32 * (2 * 32 * 8 * 128 * 2)
    assert geometry("4", LLAMA_8B, window=0).bytes_per_window == 0


@pytest.mark.parametrize(("bits", "growth"), [("4", 3.7), ("4:2", 4.9), ("2", 6.8)])
def test_capacity_grows_with_tables_and_windows_taken_off(bits: str, growth: float) -> None:
    budget, sizes = 100 * 10**9, geometry(bits, LLAMA_8B)
    dense = budget // sizes.dense_bytes_per_token
    packed = (budget - sizes.reserved_bytes(budget, 256)) // sizes.bytes_per_token
    assert packed / dense >= growth


def test_reserved_bytes_are_those_of_tables_and_windows() -> None:
    sizes = geometry("4", LLAMA_8B, tables=20)
    assert (
        sizes.reserved_bytes(10**12, 7) == 20 * sizes.bytes_per_table + 7 * sizes.bytes_per_window
    )
    assert sizes.reserved_bytes(10**12, 7, 999) == sizes.reserved_bytes(10**12, 7) + 999


def test_table_slots_follow_the_budget() -> None:
    sizes = geometry("4", LLAMA_8B)
    assert sizes.num_tables(0) == MIN_TABLES
    assert sizes.num_tables(10**15) == MAX_TABLES
    between = sizes.num_tables(50 * 10**9)
    assert MIN_TABLES < between < MAX_TABLES
    assert geometry("4", LLAMA_8B, tables=3).num_tables(10**15) == 3


def test_a_budget_without_room_for_slots_is_refused() -> None:
    sizes = geometry("4", LLAMA_8B, tables=100)
    needed = 100 * sizes.bytes_per_table + 2 * sizes.bytes_per_window
    assert sizes.reserved_bytes(needed + 1, 2) == needed
    with pytest.raises(ValueError, match="leave nothing"):
        sizes.reserved_bytes(needed + 1, 2, 1)
    with pytest.raises(ValueError, match="leave nothing of the KV memory") as error:
        sizes.reserved_bytes(needed, 2)
    message = str(error.value)
    for part in (
        "100 pattern tables",
        "2 windows",
        f"{needed / 2**20:.0f} MiB",
        "--kv-quant-patterns",
        "--kv-quant-tables",
        "--kv-quant-window",
        "--max-running-requests",
        "--mem-fraction-static",
    ):
        assert part in message


def tensors(value: object) -> dict[tuple[int, int], torch.Tensor]:
    """Every tensor reachable from ``value``, each allocation once."""
    if isinstance(value, torch.Tensor):
        return {(value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()): value}
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inside = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, PatternKVPool):
        inside = list(vars(value).values())
    else:
        return {}
    return {key: tensor for each in inside for key, tensor in tensors(each).items()}


def allocated_bytes(pool: PatternKVPool) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors(pool).values())


POOLS = [
    {"config": PatternKVConfig(patterns=8, window=4)},
    {"config": PatternKVConfig(4, 2, patterns=256, window=0), "h_kv": 3, "num_layers": 4},
    {"config": PatternKVConfig(2, 2), "page_size": 16, "head_dim": 128, "num_windows": 5},
    {"config": PatternKVConfig(2, 2), "h_kv": 2, "num_layers": 3, "size": 255},
    {"config": PatternKVConfig(2, 4), "page_size": 4, "size": 1024, "dtype": torch.float16},
]


@pytest.mark.parametrize("options", POOLS)
def test_reported_bytes_are_allocated_bytes(options: dict[str, object]) -> None:
    pool = make_pool(**options)  # type: ignore[arg-type]
    assert pool.get_kv_size_bytes() == allocated_bytes(pool)
    sizes, num_slots = pool.geometry, len(pool.slot_table)
    assert 0 <= num_slots - (pool.size + pool.page_size) < SLOTS_PER_PAGE
    assert pool.get_kv_size_bytes() == (
        num_slots * sizes.bytes_per_token
        + pool.num_tables * sizes.bytes_per_table
        + pool.num_windows * sizes.bytes_per_window
    )
    assert pool.table_bytes == pool.num_tables * sizes.bytes_per_table
    assert pool.window_bytes == pool.num_windows * sizes.bytes_per_window


def test_an_unreported_buffer_would_show() -> None:
    pool = make_pool(PatternKVConfig())
    pool.scratch = [{"spare": torch.zeros(10, dtype=torch.uint8)}]
    assert allocated_bytes(pool) == pool.get_kv_size_bytes() + 10


def test_buffers_have_their_documented_shapes() -> None:
    config = PatternKVConfig(4, 2, patterns=8, window=5)
    pool = make_pool(
        config, size=64, page_size=16, num_tables=3, num_windows=4, num_layers=2, h_kv=3
    )
    page_bytes = 16 * 3 * (32 + 16 + 2 + 4)
    assert [tuple(x.shape) for x in pool.packed] == [(5, page_bytes)] * 2
    assert pool.slot_table.shape == (80,) and pool.slot_table.dtype == torch.int32
    assert not pool.slot_table.any()
    for ring in (*pool.window_k, *pool.window_v):
        assert tuple(ring.shape) == (4, 5, 3, 64) and ring.dtype == torch.bfloat16
    assert [t.num_tables for t in pool.tables] == [3, 3]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("get_key_buffer", (0,)),
        ("get_value_buffer", (0,)),
        ("get_kv_buffer", (0,)),
        ("set_kv_buffer", (None, None, None, None)),
        ("move_kv_cache", (None, None)),
        ("get_cpu_copy", (None,)),
        ("load_cpu_copy", (None, None)),
        ("get_contiguous_buf_infos", ()),
    ],
)
def test_nobody_reads_the_pool_as_dense(name: str, arguments: tuple[object, ...]) -> None:
    pool = make_pool(PatternKVConfig())
    with pytest.raises(NotImplementedError, match="not available with --kv-quant patternkv"):
        getattr(pool, name)(*arguments)
    assert not pool.k_buffer and not pool.v_buffer


def test_a_pool_sized_for_another_model_is_an_error() -> None:
    sizes = PoolGeometry(PatternKVConfig(), 1, 2, 64, torch.bfloat16)
    with pytest.raises(AssertionError, match=r"pool of \(1, 64, 1\).*sized for \(2, 64, 1\)"):
        PatternKVPool(
            64,
            geometry=sizes,
            num_tables=2,
            num_windows=1,
            page_size=1,
            dtype=torch.bfloat16,
            head_num=1,
            head_dim=64,
            layer_num=1,
            device="cpu",
            enable_memory_saver=False,
        )


def test_the_start_up_line_states_what_was_chosen() -> None:
    config = PatternKVConfig(4, 2, patterns=8, window=5)
    pool = make_pool(config, num_tables=3, num_windows=4, num_layers=2, h_kv=3)
    line = pool.describe()
    for part in ("4/2", "328 bytes per token", "1536 in bfloat16", "4.68x", "256 tokens"):
        assert part in line
    assert "2 table slots of 8 patterns" in line
    assert "4 windows of 5 tokens" in line
