"""Metadata of an extend batch: which tokens read which stored prefix, and by what kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from patternkv_kernels import DecodePlan, DecodeWorkspace, RaggedAttention, RaggedWorkspace
from patternkv_sgl.batch import ExtendBatch


class Span(NamedTuple):
    """Stored tokens ``[start, end)`` of one request of the batch."""

    request: int
    start: int
    end: int


@dataclass(frozen=True)
class PrefixPiece:
    """Some requests' stored tokens that are dequantized together, and the new tokens that read
    them."""

    tokens: slice | torch.Tensor  # of the batch's new tokens
    slots: torch.Tensor  # int64 [m]
    tables: torch.Tensor  # int32 [m]
    attention: RaggedAttention


@dataclass(frozen=True)
class PackedPrefix:
    """New tokens that read their prefixes from the packed slots, as a decode batch does."""

    tokens: slice | torch.Tensor  # of the batch's new tokens
    plan: DecodePlan
    workspace: DecodeWorkspace | None


@dataclass(frozen=True)
class ExtendMetadata:
    """Metadata of an extend batch, shared by all layers."""

    batch: ExtendBatch
    token_tables: torch.Tensor  # int32 [n]
    window_index: torch.Tensor | None  # int64 [n], entries of the flattened rings, -1: none
    new: RaggedAttention
    tree: PackedPrefix | None
    pieces: list[PrefixPiece]


def window_index(batch: ExtendBatch, window: int) -> np.ndarray | None:
    """int64 [n]: each new token's entry of the flattened rings, -1 for those that the window does
    not keep; None if it keeps none."""
    if not any(extend.num_exact for extend in batch.extends):
        return None
    index = np.full(batch.token_indptr[-1], -1, dtype=np.int64)
    for extend, row, stop in zip(
        batch.extends, batch.req_pool_indices, batch.token_indptr[1:], strict=True
    ):
        end = extend.prefix_len + extend.num_tokens
        positions = np.arange(end - extend.num_exact, end)
        index[stop - extend.num_exact : stop] = row * window + positions % window
    return index


def plan_pieces(
    batch: ExtendBatch,
    req_to_token: torch.Tensor,
    slot_table: torch.Tensor,
    *,
    max_tokens: int,
    workspace: RaggedWorkspace | None,
) -> list[PrefixPiece]:
    """The dequantized part of the batch's prefixes in pieces of at most ``max_tokens``."""
    starts = batch.token_indptr
    pieces = []
    for spans in _pack(batch, max_tokens):
        slots = torch.cat(
            [req_to_token[batch.req_pool_indices[s.request], s.start : s.end] for s in spans]
        ).long()
        ranges = [(starts[s.request], starts[s.request + 1]) for s in spans]
        pieces.append(
            PrefixPiece(
                token_index(ranges, slots.device),
                slots,
                slot_table[slots],
                RaggedAttention(
                    list(accumulate((end - start for start, end in ranges), initial=0)),
                    list(accumulate((s.end - s.start for s in spans), initial=0)),
                    causal=False,
                    workspace=workspace,
                ),
            )
        )
    return pieces


def _pack(batch: ExtendBatch, max_tokens: int) -> Iterator[list[Span]]:
    """The prefixes to dequantize, in order, each piece as full as it gets."""
    piece: list[Span] = []
    room = max_tokens
    for request, extend in enumerate(batch.extends):
        if request in batch.tree_requests:
            continue
        start = 0
        while start < extend.prefix_len:
            end = min(start + room, extend.prefix_len)
            piece.append(Span(request, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield piece
                piece, room = [], max_tokens
    if piece:
        yield piece


def token_index(ranges: Sequence[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    """What indexes the tokens of ascending ``ranges``: a slice where they are one run."""
    if all(end == start for (_, end), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)
