"""The store of many layers' window tokens at once: what the layers alone would store."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patternkv_kernels import SlotFormat, WindowedLayers, store_kv, store_windows
from tests.cases import DEVICES, random_tables

NUM_RINGS, WINDOW, NUM_LAYERS, NUM_TABLES = 40, 8, 3, 5


def random_layers(
    fmt: SlotFormat, dtype: torch.dtype, device: str, num_patterns: int = 16
) -> WindowedLayers:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * NUM_LAYERS, NUM_RINGS, WINDOW, fmt.h_kv, fmt.head_dim)
    rings = torch.randn(shape, generator=generator).to(device, dtype)
    return WindowedLayers(
        fmt,
        [fmt.allocate(400, device).fill_(0xAB) for _ in range(NUM_LAYERS)],
        [
            random_tables(fmt.h_kv, fmt.head_dim, seed, num_patterns).to(device)
            for seed in range(NUM_LAYERS)
        ],
        list(rings[:NUM_LAYERS]),
        list(rings[NUM_LAYERS:]),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("bits", "d", "dtype"),
    [
        ((4, 4), 128, torch.bfloat16),
        ((2, 2), 64, torch.float16),
        ((4, 2), 96, torch.bfloat16),
        ((2, 2), 256, torch.bfloat16),
        ((4, 4), 64, torch.float32),
    ],
)
@pytest.mark.parametrize("n", [1, 33, 320])
def test_layers_get_what_each_alone_would_store(
    bits: tuple[int, int], d: int, dtype: torch.dtype, n: int, device: str
) -> None:
    """Byte by byte, whether rows have one table or each its own."""
    fmt = SlotFormat(*bits, d, 16, h_kv=2)
    layers = random_layers(fmt, dtype, device)
    generator = torch.Generator().manual_seed(n)
    index = torch.randperm(NUM_RINGS * WINDOW, generator=generator)[:n].to(device)
    slots = torch.randperm(400, generator=generator)[:n].to(device)
    tables = torch.arange(n, device=device).int() % NUM_TABLES
    tables[: n // 2] = 3
    expected = [buffer.clone() for buffer in layers.buffers]
    for buffer, (_, own, *rings) in zip(expected, layers.each(), strict=True):
        k, v = (ring.flatten(0, 1)[index] for ring in rings)
        store_kv(fmt, buffer, slots, k, v, own, tables)
    store_windows(layers, slots, index, tables)
    for buffer, alone in zip(layers.buffers, expected, strict=True):
        assert torch.equal(buffer, alone)


def test_what_does_not_fit_is_refused() -> None:
    fmt = SlotFormat(4, 4, 64, 16, h_kv=2)
    layers = random_layers(fmt, torch.bfloat16, "cpu")
    slots = torch.arange(3)
    with pytest.raises(ValueError, match=r"index is \[2\] and table_ids \[3\]: 3 slots need"):
        store_windows(layers, slots, slots[:2], slots)
    with pytest.raises(ValueError, match=r"index is \[3\] and table_ids \[2\]: 3 slots need"):
        store_windows(layers, slots, slots, slots[:2])
    window_k, window_v = layers.window_k, layers.window_v
    every_other = random_tables(2, 128, 0, 16).patterns[..., ::2]
    for changes, message in (
        ({"tables": layers.tables[1:]}, "each layer needs one of each"),
        (
            {name: [] for name in ("buffers", "tables", "window_k", "window_v")},
            "each layer needs one of each",
        ),
        ({"buffers": [buffer[:, 1:] for buffer in layers.buffers]}, "needs a contiguous uint8"),
        ({"tables": [random_tables(1, 64, 0, 16)] * NUM_LAYERS}, "do not fit 2 KV heads of 64"),
        ({"window_k": [*window_k[1:], window_k[0].float()]}, "must be alike, contiguous"),
        ({"window_v": [ring[1:] for ring in window_v]}, "must be alike, contiguous"),
        (
            {
                name: [ring.transpose(0, 1).contiguous().transpose(0, 1) for ring in rings]
                for name, rings in (("window_k", window_k), ("window_v", window_v))
            },
            "must be alike, contiguous",
        ),
        (
            {
                name: [ring[..., :32].contiguous() for ring in rings]
                for name, rings in (("window_k", window_k), ("window_v", window_v))
            },
            r"and end in \[2, 64\]",
        ),
        (
            {"tables": [*layers.tables[1:], random_tables(2, 64, 0, 8)]},
            "has tables of 8 patterns, layer 0 of 16",
        ),
        (
            {"tables": [*layers.tables[1:], replace(layers.tables[0], patterns=every_other)]},
            "has tables that are not contiguous",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(layers, **changes)
