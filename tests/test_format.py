"""The slot format: byte tables, views, packing."""

from __future__ import annotations

import pytest
import torch

from patternkv_kernels import SlotFormat
from patternkv_kernels.format import BITS, HEAD_DIMS, pack, unpack
from tests.cases import BITS_KV, PAGE_SIZES


@pytest.mark.parametrize(
    ("bits", "head_dim", "expected"),
    [
        ((4, 4), 128, 134),
        ((4, 2), 128, 102),
        ((2, 4), 128, 102),
        ((2, 2), 128, 70),
        ((4, 4), 64, 70),
        ((2, 2), 64, 38),
        ((4, 4), 96, 102),
        ((4, 2), 256, 198),
    ],
)
def test_bytes_per_slot(bits: tuple[int, int], head_dim: int, expected: int) -> None:
    fmt = SlotFormat(*bits, head_dim)
    assert fmt.bytes_per_slot == expected
    assert fmt.allocate(12, 3, "cpu").numel() == 12 * 3 * expected


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS_KV)
def test_sections_tile_the_page(bits: tuple[int, int], head_dim: int, page_size: int) -> None:
    fmt = SlotFormat(*bits, head_dim, page_size)
    sizes = [
        page_size * fmt.k_code_bytes,
        page_size * fmt.v_code_bytes,
        page_size,
        page_size,
        2 * page_size,
        2 * page_size,
    ]
    offsets = [
        fmt.k_codes_offset,
        fmt.v_codes_offset,
        fmt.k_pattern_id_offset,
        fmt.v_pattern_id_offset,
        fmt.k_scale_offset,
        fmt.v_scale_offset,
    ]
    assert offsets == [sum(sizes[:i]) for i in range(6)]
    assert sum(sizes) == fmt.page_bytes == page_size * fmt.bytes_per_slot
    assert fmt.k_scale_offset % 2 == fmt.page_bytes % 2 == 0


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("bits", BITS_KV)
def test_views_write_through_and_do_not_overlap(bits: tuple[int, int], page_size: int) -> None:
    fmt = SlotFormat(*bits, 96, page_size)
    buffer = fmt.allocate(3 * page_size, 2, "cpu")
    for value, view in enumerate(fmt.views(buffer), start=1):
        assert view.shape[:3] == (3, 2, page_size)
        # The bytes of a float16 1.0 are 0x00, 0x3c: distinct from every integer written here.
        view.fill_(1.0 if view.dtype == torch.float16 else value)
    views = fmt.views(buffer)
    for value, view in enumerate(views, start=1):
        expected = 1.0 if view.dtype == torch.float16 else value
        assert (view == expected).all()
    flat = buffer[1, 1]
    assert (flat[: fmt.v_codes_offset] == 1).all()
    assert flat[fmt.v_codes_offset] == 2
    assert flat[fmt.k_pattern_id_offset] == 3
    assert flat[fmt.v_pattern_id_offset] == 4
    assert flat[fmt.k_scale_offset :].view(torch.float16).eq(1.0).all()


def test_views_refuse_a_buffer_of_another_format() -> None:
    buffer = SlotFormat(4, 4, 64).allocate(8, 2, "cpu")
    with pytest.raises(ValueError, match="70"):
        SlotFormat(2, 2, 64).views(buffer)
    with pytest.raises(ValueError, match="uint8"):
        SlotFormat(4, 4, 64).views(buffer.view(torch.int8))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_pack_round_trip(bits: int, d: int) -> None:
    codes = torch.randint(2**bits, (5, 3, d), dtype=torch.uint8, generator=torch.manual_seed(0))
    packed = pack(codes, bits)
    assert packed.shape == (5, 3, d * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_codes_are_little_end_first() -> None:
    assert pack(torch.tensor([0x1, 0xA], dtype=torch.uint8), 4).tolist() == [0xA1]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]


def test_unpack_reads_strided_rows() -> None:
    rows = torch.randint(256, (7, 40), dtype=torch.uint8, generator=torch.manual_seed(0))
    for bits in BITS:
        assert torch.equal(unpack(rows[:, 3:19], bits), unpack(rows[:, 3:19].clone(), bits))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 64), "k_bits=3"),
        ((4, 8, 64), "v_bits=8"),
        ((4, 4, 80), "head_dim=80"),
        ((4, 4, 64, 0), "page_size=0"),
    ],
)
def test_bad_formats_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlotFormat(*arguments)


@pytest.mark.parametrize(("num_slots", "h_kv"), [(0, 1), (17, 1), (-16, 1), (16, 0)])
def test_bad_allocations_are_refused(num_slots: int, h_kv: int) -> None:
    with pytest.raises(ValueError, match=f"num_slots={num_slots}|h_kv={h_kv}"):
        SlotFormat(4, 4, 64, 16).allocate(num_slots, h_kv, "cpu")
