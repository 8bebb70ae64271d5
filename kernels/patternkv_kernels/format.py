"""The slot format: which bytes one token position takes in the packed KV pool.

Everything that reads or writes the pool derives its offsets from :class:`SlotFormat`;
`kernels/README.md` shows the same numbers as a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

BITS = (2, 4)
HEAD_DIMS = (64, 96, 128, 256)
MAX_PATTERNS = 256
"""Pattern ids are one byte."""

_PATTERN_ID_BYTES = 1
_SCALE_BYTES = 2


class SlotViews(NamedTuple):
    """Zero-copy views of the sections of a packed buffer."""

    k_codes: torch.Tensor
    """uint8 ``[num_pages, h_kv, page_size, k_code_bytes]``"""
    v_codes: torch.Tensor
    """uint8 ``[num_pages, h_kv, page_size, v_code_bytes]``"""
    k_pattern_id: torch.Tensor
    """uint8 ``[num_pages, h_kv, page_size]``"""
    v_pattern_id: torch.Tensor
    """uint8 ``[num_pages, h_kv, page_size]``"""
    k_scale: torch.Tensor
    """float16 ``[num_pages, h_kv, page_size]``"""
    v_scale: torch.Tensor
    """float16 ``[num_pages, h_kv, page_size]``"""


@dataclass(frozen=True)
class SlotFormat:
    """Byte layout of packed K/V slots.

    One page of one KV head is a contiguous block of ``page_bytes``, in sections
    ``[K codes][V codes][k_pattern_id][v_pattern_id][k_scale][v_scale]``, each section token-major.
    The codes of one token are in head-dim order, little-end first within a byte: dim ``j`` of a
    byte's dims sits at bit ``bits * j``. A stored vector means::

        x = pattern[pattern_id] + scale * channel_scale * (code - (2**bits - 1) / 2)

    Parameters
    ----------
    k_bits, v_bits: bits per code, 2 or 4, independent of each other.
    head_dim: 64, 96, 128 or 256.
    page_size: slots per page, >= 1.

    Raises ``ValueError`` for anything else.
    """

    k_bits: int
    v_bits: int
    head_dim: int
    page_size: int = 1

    def __post_init__(self) -> None:
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if bits not in BITS:
                raise ValueError(f"{name}={bits}: codes have 2 or 4 bits; choose one of {BITS}")
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"head_dim={self.head_dim}: supported head dims are {HEAD_DIMS}; "
                "serve this model with the bf16 cache"
            )
        if self.page_size < 1:
            raise ValueError(f"page_size={self.page_size}: a page holds at least 1 slot")

    @property
    def k_code_bytes(self) -> int:
        """Bytes of the K codes of one token and head."""
        return self.head_dim * self.k_bits // 8

    @property
    def v_code_bytes(self) -> int:
        """Bytes of the V codes of one token and head."""
        return self.head_dim * self.v_bits // 8

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one token and KV head: both codes, both pattern ids, both scales."""
        return self.k_code_bytes + self.v_code_bytes + 2 * (_PATTERN_ID_BYTES + _SCALE_BYTES)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one KV head; always even, so that the scales are aligned."""
        return self.page_size * self.bytes_per_slot

    @property
    def k_codes_offset(self) -> int:
        """Byte offset of the K codes inside a page of one head."""
        return 0

    @property
    def v_codes_offset(self) -> int:
        """Byte offset of the V codes inside a page of one head."""
        return self.page_size * self.k_code_bytes

    @property
    def k_pattern_id_offset(self) -> int:
        """Byte offset of the K pattern ids inside a page of one head."""
        return self.v_codes_offset + self.page_size * self.v_code_bytes

    @property
    def v_pattern_id_offset(self) -> int:
        """Byte offset of the V pattern ids inside a page of one head."""
        return self.k_pattern_id_offset + self.page_size * _PATTERN_ID_BYTES

    @property
    def k_scale_offset(self) -> int:
        """Byte offset of the K scales inside a page of one head."""
        return self.v_pattern_id_offset + self.page_size * _PATTERN_ID_BYTES

    @property
    def v_scale_offset(self) -> int:
        """Byte offset of the V scales inside a page of one head."""
        return self.k_scale_offset + self.page_size * _SCALE_BYTES

    def allocate(self, num_slots: int, h_kv: int, device: torch.device | str) -> torch.Tensor:
        """A zeroed packed buffer, uint8 ``[num_slots // page_size, h_kv, page_bytes]``."""
        if num_slots < 1 or num_slots % self.page_size:
            raise ValueError(
                f"num_slots={num_slots}: must be a positive multiple of page_size={self.page_size}"
            )
        if h_kv < 1:
            raise ValueError(f"h_kv={h_kv}: at least 1 KV head is needed")
        shape = (num_slots // self.page_size, h_kv, self.page_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def views(self, buffer: torch.Tensor) -> SlotViews:
        """The sections of ``buffer`` (as made by :meth:`allocate`) as zero-copy views."""
        k_codes, v_codes, k_pattern_id, v_pattern_id, k_scale, v_scale = self.sections(buffer)
        return SlotViews(
            k_codes=k_codes,
            v_codes=v_codes,
            k_pattern_id=k_pattern_id.squeeze(3),
            v_pattern_id=v_pattern_id.squeeze(3),
            k_scale=k_scale.view(torch.float16).squeeze(3),
            v_scale=v_scale.view(torch.float16).squeeze(3),
        )

    def sections(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The six sections as zero-copy uint8 ``[num_pages, h_kv, page_size, row_bytes]``."""
        self.check(buffer)
        row_bytes = (self.k_code_bytes, self.v_code_bytes, 1, 1, _SCALE_BYTES, _SCALE_BYTES)
        parts = buffer.split([self.page_size * size for size in row_bytes], dim=2)
        return [
            part.unflatten(2, (self.page_size, size))
            for part, size in zip(parts, row_bytes, strict=True)
        ]

    def check(self, buffer: torch.Tensor) -> None:
        """Raise ``ValueError`` unless ``buffer`` is contiguous and of this format."""
        if (
            buffer.dtype != torch.uint8
            or buffer.dim() != 3
            or buffer.shape[2] != self.page_bytes
            or not buffer.is_contiguous()
        ):
            raise ValueError(
                f"buffer is {buffer.dtype} {list(buffer.shape)}, strides {buffer.stride()}: "
                f"{self} needs a contiguous uint8 [num_pages, h_kv, {self.page_bytes}]"
            )


def read_slots(fmt: SlotFormat, buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The bytes of ``slots`` (int64 ``[w, length]``) for every head, each row as in a page of one
    slot.

    Returns uint8 ``[w, h_kv, length, bytes_per_slot]``.
    """
    h_kv = buffer.shape[1]
    heads = torch.arange(h_kv, device=buffer.device).view(1, h_kv, 1)
    if fmt.page_size == 1:
        # index_select copies whole rows; advanced indexing is ten times slower on the CPU.
        index = slots.unsqueeze(1) * h_kv + heads
        fmt.check(buffer)
        rows = buffer.view(-1, fmt.bytes_per_slot)
        return rows.index_select(0, index.flatten()).view(*index.shape, fmt.bytes_per_slot)
    page = torch.div(slots, fmt.page_size, rounding_mode="floor")
    at = (page.unsqueeze(1), heads, (slots - page * fmt.page_size).unsqueeze(1))
    return torch.cat([section[at] for section in fmt.sections(buffer)], dim=3)


def write_slots(
    fmt: SlotFormat, buffer: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor
) -> None:
    """Write ``rows`` to ``slots`` (int64 ``[n]``).

    ``rows`` is uint8 ``[n, h_kv, bytes_per_slot]``, each laid out as in a page of one slot.
    """
    fmt.check(buffer)
    if fmt.page_size == 1:
        buffer.index_copy_(0, slots, rows)
        return
    page = torch.div(slots, fmt.page_size, rounding_mode="floor")
    offset = slots - page * fmt.page_size
    first = 0
    for section in fmt.sections(buffer):
        last = first + section.shape[3]
        section[page, :, offset] = rows[:, :, first:last]
        first = last


def centre(bits: int) -> float:
    """The code value that stands for a residual of 0: mid-rise, so between two codes."""
    return (2**bits - 1) / 2


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes ``[..., d]``, below ``2**bits``, into uint8 ``[..., d * bits // 8]``."""
    per_byte = 8 // bits
    fields = codes.unflatten(-1, (-1, per_byte)).unbind(-1)
    packed = fields[0]
    for j in range(1, per_byte):
        packed = packed | (fields[j] << (bits * j))
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Invert :func:`pack`: uint8 ``[..., n]`` to codes, uint8 ``[..., n * 8 // bits]``.

    Every byte is spread over a wider little-endian word whose bytes are then the codes in order, so
    no interleaving copy is needed.
    """
    if bits == 4:
        half = packed.to(torch.int16)
        half.bitwise_or_(half << 4).bitwise_and_(0x0F0F)
        return half.view(torch.uint8)
    word = packed.to(torch.int32)
    word.bitwise_or_(word << 12).bitwise_and_(0x000F000F)
    word.bitwise_or_(word << 6).bitwise_and_(0x03030303)
    return word.view(torch.uint8)
