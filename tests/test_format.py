"""The slot format: byte tables, views, packing."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest
import torch

from patternkv_kernels import SlotFormat
from patternkv_kernels.format import (
    BITS,
    HEAD_DIMS,
    METADATA_BYTES,
    pack,
    read_slots,
    unpack,
    write_slots,
)
from tests.cases import BITS_KV, PAGE_SIZES

H_KV = (1, 2, 3, 8)


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
    fmt = SlotFormat(*bits, head_dim, h_kv=4)
    assert fmt.bytes_per_slot == expected
    assert fmt.allocate(12, "cpu").numel() == 12 * 4 * expected


@pytest.mark.parametrize(
    ("h_kv", "page_size", "page_bytes", "bytes_per_token"),
    [
        (1, 1, 40, 40),
        (2, 1, 80, 80),
        (3, 1, 120, 120),
        (8, 1, 304, 304),
        (1, 2, 80, 40),
        (1, 3, 120, 40),
        (2, 3, 232, 78),
        (1, 4, 152, 38),
        (3, 16, 1824, 114),
        (2, 64, 4864, 76),
    ],
)
def test_pages_are_padded_to_8_bytes(
    h_kv: int, page_size: int, page_bytes: int, bytes_per_token: int
) -> None:
    fmt = SlotFormat(2, 2, 64, page_size, h_kv=h_kv)  # 38 bytes of a token and head
    assert (fmt.page_bytes, fmt.bytes_per_token) == (page_bytes, bytes_per_token)


def formats() -> Iterator[SlotFormat]:
    for bits, d, page_size, h_kv in itertools.product(BITS_KV, HEAD_DIMS, PAGE_SIZES, H_KV):
        yield SlotFormat(*bits, d, page_size, h_kv=h_kv)


def test_sections_tile_the_page() -> None:
    for fmt in formats():
        length, heads = fmt.page_size, range(fmt.h_kv)
        parts = []
        for head, i in itertools.product(heads, range(length)):
            row = i * fmt.code_bytes
            parts.append((fmt.k_codes_offset(head) + row, fmt.k_code_bytes))
            parts.append((fmt.v_codes_offset(head) + row, fmt.v_code_bytes))
        parts += [(fmt.metadata_offset(head), length * METADATA_BYTES) for head in heads]
        offset = 0
        for start, size in parts:
            assert start == offset, fmt
            offset += size
        assert offset == fmt.padding_offset, fmt
        assert 0 <= fmt.page_bytes - offset < 8 and fmt.page_bytes % 8 == 0, fmt
        assert offset == fmt.h_kv * length * fmt.bytes_per_slot, fmt


def test_rows_are_aligned() -> None:
    """Codes for copies of 8 bytes, of 16 where pages and head dims allow it, metadata for 2."""
    for fmt in formats():
        for head in range(fmt.h_kv):
            wide = fmt.page_bytes % 16 == 0 and fmt.head_dim in (64, 128, 256)
            for i in range(fmt.page_size):
                for row in (
                    fmt.k_codes_offset(head) + i * fmt.code_bytes,
                    fmt.v_codes_offset(head) + i * fmt.code_bytes,
                ):
                    assert row % (16 if wide else 8) == fmt.page_bytes % 8 == 0, fmt
                assert (fmt.metadata_offset(head) + i * METADATA_BYTES) % 2 == 0, fmt
    assert SlotFormat(2, 2, 96, h_kv=1).v_codes_offset(0) == 24  # 8 bytes are not always 16


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("h_kv", H_KV)
@pytest.mark.parametrize("bits", BITS_KV)
def test_views_are_the_bytes_at_the_offsets(
    bits: tuple[int, int], h_kv: int, page_size: int
) -> None:
    fmt = SlotFormat(*bits, 96, page_size, h_kv=h_kv)
    buffer = fmt.allocate(3 * page_size, "cpu")
    buffer.copy_(torch.randint(256, buffer.shape, generator=torch.manual_seed(0)))
    views = fmt.views(buffer)
    assert views.k_codes.shape == (3, h_kv, page_size, fmt.k_code_bytes)
    assert views.v_codes.shape == (3, h_kv, page_size, fmt.v_code_bytes)
    assert all(view.shape == (3, h_kv, page_size) for view in views[2:])
    raw = buffer.numpy().tobytes()
    for page, head, i in itertools.product(range(3), range(h_kv), {0, page_size - 1}):
        at, start = (page, head, i), page * fmt.page_bytes
        k = start + fmt.k_codes_offset(head) + i * fmt.code_bytes
        v = start + fmt.v_codes_offset(head) + i * fmt.code_bytes
        assert bytes(views.k_codes[at].tolist()) == raw[k : k + fmt.k_code_bytes]
        assert bytes(views.v_codes[at].tolist()) == raw[v : v + fmt.v_code_bytes]
        metadata = start + fmt.metadata_offset(head) + i * METADATA_BYTES
        ids_and_scales = struct.unpack_from("<BBee", raw, metadata)
        expected = torch.tensor(ids_and_scales)
        found = torch.stack([view[at].float() for view in views[2:]])
        assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("h_kv", H_KV)
@pytest.mark.parametrize("bits", BITS_KV)
def test_views_write_through_and_do_not_overlap(
    bits: tuple[int, int], h_kv: int, page_size: int
) -> None:
    fmt = SlotFormat(*bits, 96, page_size, h_kv=h_kv)
    buffer = fmt.allocate(3 * page_size, "cpu")
    for value, view in enumerate(fmt.views(buffer), start=1):
        view.fill_(value)
    for value, view in enumerate(fmt.views(buffer), start=1):
        assert (view == value).all()
    assert not buffer[:, fmt.padding_offset :].any()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("h_kv", H_KV)
def test_rows_of_slots_round_trip(h_kv: int, page_size: int) -> None:
    fmt = SlotFormat(4, 2, 96, page_size, h_kv=h_kv)
    buffer = fmt.allocate(4 * page_size, "cpu").fill_(0xAB)
    generator = torch.manual_seed(0)
    slots = torch.randperm(4 * page_size, generator=generator)[: 2 * page_size]
    shape = (2 * page_size, h_kv, fmt.bytes_per_slot)
    rows = torch.randint(256, shape, generator=generator).to(torch.uint8)
    write_slots(fmt, buffer, slots, rows)
    back = read_slots(fmt, buffer, slots.view(2, page_size))
    assert torch.equal(back.transpose(1, 2).flatten(0, 1), rows)
    views, page, offset = fmt.views(buffer), slots // page_size, slots % page_size
    k_end, end = fmt.k_code_bytes, fmt.code_bytes
    assert torch.equal(views.k_codes[page, :, offset], rows[..., :k_end])
    assert torch.equal(views.v_codes[page, :, offset], rows[..., k_end:end])
    assert torch.equal(views.k_pattern_id[page, :, offset], rows[..., end])
    assert torch.equal(views.v_pattern_id[page, :, offset], rows[..., end + 1])
    scales = torch.stack([views.k_scale[page, :, offset], views.v_scale[page, :, offset]], 2)
    assert torch.equal(scales.view(torch.uint8), rows[..., end + 2 :])
    assert (buffer[:, fmt.padding_offset :] == 0xAB).all()


def test_views_refuse_a_buffer_of_another_format() -> None:
    fmt = SlotFormat(4, 4, 64, h_kv=2)
    buffer = fmt.allocate(8, "cpu")
    with pytest.raises(ValueError, match=r"\[8, 144\].*needs a contiguous uint8 \[num_pages, 80\]"):
        SlotFormat(2, 2, 64, h_kv=2).views(buffer)
    for other in (buffer.view(torch.int8), buffer.unsqueeze(1), buffer.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"contiguous uint8 \[num_pages, 144\]"):
            fmt.views(other)


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
        ((3, 4, 64, 1, 1), "k_bits=3"),
        ((4, 8, 64, 1, 1), "v_bits=8"),
        ((4, 4, 80, 1, 1), "head_dim=80"),
        ((4, 4, 64, 0, 1), "page_size=0"),
        ((4, 4, 64, 1, 0), "h_kv=0"),
        ((4, 4, 64, 1, -2), "h_kv=-2"),
    ],
)
def test_bad_formats_are_refused(arguments: tuple[int, ...], message: str) -> None:
    *positional, h_kv = arguments
    with pytest.raises(ValueError, match=message):
        SlotFormat(*positional, h_kv=h_kv)


@pytest.mark.parametrize("num_slots", [0, 17, -16])
def test_bad_allocations_are_refused(num_slots: int) -> None:
    with pytest.raises(ValueError, match=f"num_slots={num_slots}: .*page_size=16"):
        SlotFormat(4, 4, 64, 16, h_kv=1).allocate(num_slots, "cpu")
