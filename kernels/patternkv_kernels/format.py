"""The slot format: which bytes one token position takes in the packed KV pool.

Everything that reads or writes the pool derives its offsets from :class:`SlotFormat`;
`kernels/README.md` shows the same numbers as a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

BITS = (2, 4)
HEAD_DIMS = (64, 96, 128, 256)
MAX_PATTERNS = 256
"""Pattern ids are one byte."""

METADATA_BYTES = 6
"""Two pattern ids of one byte and two float16 scales."""
PAGE_ALIGNMENT = 8
"""Bytes; pages are padded to a multiple, so code rows can be copied 8 bytes at a time."""


class SlotViews(NamedTuple):
    """Zero-copy views of what a packed buffer holds."""

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


class Sections(NamedTuple):
    """Zero-copy uint8 views of the sections of a packed buffer."""

    k_codes: torch.Tensor
    """``[num_pages, h_kv, page_size, k_code_bytes]``"""
    v_codes: torch.Tensor
    """``[num_pages, h_kv, page_size, v_code_bytes]``"""
    metadata: torch.Tensor
    """``[num_pages, h_kv, page_size, METADATA_BYTES]``: both pattern ids, then both scales"""


@dataclass(frozen=True)
class SlotFormat:
    """Byte layout of packed K/V slots.

    A page holds all KV heads of its slots in ``page_bytes`` contiguous bytes: for every head the K
    codes and then the V codes of its slots, for every head the metadata of its slots, and zero
    bytes up to a multiple of 8. Everything is token-major. The metadata of a token is
    ``k_pattern_id`` and ``v_pattern_id`` (uint8), ``k_scale`` and ``v_scale`` (float16). Its codes
    are in head-dim order, little-end first within a byte: dim ``j`` of a byte's dims sits at bit
    ``bits * j``. A stored vector means::

        x = pattern[pattern_id] + scale * channel_scale * (code - (2**bits - 1) / 2)

    Parameters
    ----------
    k_bits, v_bits: bits per code, 2 or 4, independent of each other.
    head_dim: 64, 96, 128 or 256.
    page_size: slots per page, >= 1.
    h_kv: KV heads, >= 1.

    Raises ``ValueError`` for anything else.
    """

    k_bits: int
    v_bits: int
    head_dim: int
    page_size: int = 1
    h_kv: int = field(kw_only=True)

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
        if self.h_kv < 1:
            raise ValueError(f"h_kv={self.h_kv}: a slot holds at least 1 KV head")

    @property
    def k_code_bytes(self) -> int:
        """Bytes of the K codes of one token and head."""
        return self.head_dim * self.k_bits // 8

    @property
    def v_code_bytes(self) -> int:
        """Bytes of the V codes of one token and head."""
        return self.head_dim * self.v_bits // 8

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one token and head, K and V."""
        return self.k_code_bytes + self.v_code_bytes

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one token and one KV head, without padding: codes and metadata."""
        return self.code_bytes + METADATA_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all heads, padding included; a multiple of 8."""
        used = self.h_kv * self.page_size * self.bytes_per_slot
        return -(-used // PAGE_ALIGNMENT) * PAGE_ALIGNMENT

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of all heads with its share of the padding, rounded up.

        Exact for the page sizes 1, 2 and multiples of 4.
        """
        return -(-self.page_bytes // self.page_size)

    def k_codes_offset(self, head: int) -> int:
        """Byte offset in a page of the K codes of ``head``; slots follow ``code_bytes`` apart."""
        return head * self.page_size * self.code_bytes

    def v_codes_offset(self, head: int) -> int:
        """Byte offset in a page of the V codes of ``head``; slots follow ``code_bytes`` apart."""
        return self.k_codes_offset(head) + self.k_code_bytes

    def metadata_offset(self, head: int) -> int:
        """Byte offset in a page of the metadata of ``head``."""
        return self.k_codes_offset(self.h_kv) + head * self.page_size * METADATA_BYTES

    @property
    def padding_offset(self) -> int:
        """Byte offset in a page of its padding, which may be empty."""
        return self.metadata_offset(self.h_kv)

    def allocate(self, num_slots: int, device: torch.device | str) -> torch.Tensor:
        """A zeroed packed buffer, uint8 ``[num_slots // page_size, page_bytes]``."""
        if num_slots < 1 or num_slots % self.page_size:
            raise ValueError(
                f"num_slots={num_slots}: must be a positive multiple of page_size={self.page_size}"
            )
        shape = (num_slots // self.page_size, self.page_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def views(self, buffer: torch.Tensor) -> SlotViews:
        """What ``buffer`` (as made by :meth:`allocate`) holds, as zero-copy views."""
        k_codes, v_codes, metadata = self.sections(buffer)
        k_scale, v_scale = metadata[..., 2:].view(torch.float16).unbind(3)
        return SlotViews(k_codes, v_codes, metadata[..., 0], metadata[..., 1], k_scale, v_scale)

    def sections(self, buffer: torch.Tensor) -> Sections:
        """The sections of ``buffer`` as zero-copy views of its bytes."""
        self.check(buffer)
        length, metadata_offset = self.page_size, self.metadata_offset(0)
        codes = buffer[:, :metadata_offset].unflatten(1, (self.h_kv, length, self.code_bytes))
        metadata = buffer[:, metadata_offset : self.padding_offset]
        k_codes, v_codes = codes.split([self.k_code_bytes, self.v_code_bytes], 3)
        return Sections(
            k_codes,
            v_codes,
            metadata.unflatten(1, (self.h_kv, length, METADATA_BYTES)),
        )

    def check(self, buffer: torch.Tensor) -> None:
        """Raise ``ValueError`` unless ``buffer`` is contiguous and of this format."""
        if (
            buffer.dtype != torch.uint8
            or buffer.dim() != 2
            or buffer.shape[1] != self.page_bytes
            or not buffer.is_contiguous()
        ):
            raise ValueError(
                f"buffer is {buffer.dtype} {list(buffer.shape)}, strides {buffer.stride()}: "
                f"{self} needs a contiguous uint8 [num_pages, {self.page_bytes}]"
            )


def read_slots(fmt: SlotFormat, buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The bytes of ``slots`` (int64 ``[w, length]``) for every head.

    Returns uint8 ``[w, h_kv, length, bytes_per_slot]``, each row as in a page of one slot and one
    head: K codes, V codes, metadata.
    """
    if fmt.page_size == 1:
        # index_select copies whole pages; advanced indexing is ten times slower on the CPU.
        fmt.check(buffer)
        pages = buffer.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        codes = pages[..., : fmt.metadata_offset(0)].unflatten(2, (fmt.h_kv, fmt.code_bytes))
        metadata = pages[..., fmt.metadata_offset(0) : fmt.padding_offset]
        metadata = metadata.unflatten(2, (fmt.h_kv, METADATA_BYTES))
        return torch.cat([codes.transpose(1, 2), metadata.transpose(1, 2)], dim=3)
    page = torch.div(slots, fmt.page_size, rounding_mode="floor")
    heads = torch.arange(fmt.h_kv, device=buffer.device).view(1, fmt.h_kv, 1)
    at = (page.unsqueeze(1), heads, (slots - page * fmt.page_size).unsqueeze(1))
    return torch.cat([section[at] for section in fmt.sections(buffer)], dim=3)


def write_slots(
    fmt: SlotFormat, buffer: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor
) -> None:
    """Write ``rows`` to ``slots`` (int64 ``[n]``); padding is left alone.

    ``rows`` is uint8 ``[n, h_kv, bytes_per_slot]``, each as in a page of one slot and one head.
    """
    if fmt.page_size == 1:
        fmt.check(buffer)
        codes, metadata = rows.split([fmt.code_bytes, METADATA_BYTES], dim=2)
        pages = torch.cat([codes.flatten(1), metadata.flatten(1)], dim=1)
        buffer[slots, : fmt.padding_offset] = pages
        return
    page = torch.div(slots, fmt.page_size, rounding_mode="floor")
    offset = slots - page * fmt.page_size
    parts = rows.split([fmt.k_code_bytes, fmt.v_code_bytes, METADATA_BYTES], dim=2)
    for section, part in zip(fmt.sections(buffer), parts, strict=True):
        section[page, :, offset] = part


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
