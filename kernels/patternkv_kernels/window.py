"""The exact recent tokens of running requests: what decode reads of them, and where a store keeps
its tokens as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """The exact recent tokens of every batch row, for one layer.

    Row ``i`` reads positions ``[start[i], end[i])``; position ``p`` is at index ``p % window`` of
    ring ``ring[i]``, but the last of them is read from ``new_k`` and ``new_v``, and decode puts it
    into the ring. ``start == end`` means none; ``end - start <= window``.
    """

    k: torch.Tensor
    """model dtype ``[num_rings, window, h_kv, d]``"""
    v: torch.Tensor
    """model dtype ``[num_rings, window, h_kv, d]``"""
    ring: torch.Tensor
    """int64 ``[b]``"""
    start: torch.Tensor
    """int64 ``[b]``"""
    end: torch.Tensor
    """int64 ``[b]``"""
    new_k: torch.Tensor
    """model dtype ``[b, h_kv, d]``; rows that read nothing may hold anything"""
    new_v: torch.Tensor
    """as ``new_k``"""

    def check(self, q: torch.Tensor) -> None:
        """Raises ``ValueError`` unless queries ``[b, h_q, d]`` can read this window."""
        expected = (len(q), *self.k.shape[2:])
        if self.new_k.shape != expected or self.new_v.shape != expected:
            raise ValueError(
                f"new_k is {list(self.new_k.shape)} and new_v {list(self.new_v.shape)}: {len(q)} "
                f"rows with rings {list(self.k.shape)} need {list(expected)}, both alike"
            )
        _check_rings((self.k, self.v), (self.new_k, self.new_v))
        for name in ("ring", "start", "end"):
            places = getattr(self, name)
            if places.shape != (len(q),) or places.dtype != torch.int64:
                raise ValueError(
                    f"{name} is {places.dtype} {list(places.shape)}: needs int64 [{len(q)}]"
                )


@dataclass(frozen=True)
class WindowWrite:
    """Entries of the windows that receive a store's tokens, K and V bit by bit.

    Token ``i`` at position ``p`` of the request of ring ``r`` belongs in row ``index[i] = r *
    window + p % window``. Rows that are listed more than once hold parts of their tokens
    afterwards.
    """

    k: torch.Tensor
    """``[num_rings, window, h_kv, d]`` in the dtype of the tokens, contiguous"""
    v: torch.Tensor
    """as ``k``"""
    index: torch.Tensor
    """int64 or int32 ``[n]``, rows of the rings taken together; negative: the token is kept
    nowhere"""

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raises ``ValueError`` unless tokens ``k``, ``v [n, h_kv, d]`` fit."""
        n = len(k)
        _check_rings((self.k, self.v), (k, v))
        if self.index.shape != (n,) or self.index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"index is {self.index.dtype} {list(self.index.shape)}: needs int64 or int32 [{n}]"
            )


def _check_rings(
    rings: tuple[torch.Tensor, torch.Tensor], tokens: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Raises ``ValueError`` unless the rings of K and V can hold their ``tokens [n, h_kv, d]``."""
    shape, (_, h_kv, d) = rings[0].shape, tokens[0].shape
    for ring, x in zip(rings, tokens, strict=True):
        if ring.dim() != 4 or ring.shape[2:] != (h_kv, d) or ring.shape != shape:
            raise ValueError(
                f"rings are k {list(shape)} and v {list(rings[1].shape)}: these tokens need "
                f"[num_rings, window, {h_kv}, {d}], both alike"
            )
        if ring.dtype != x.dtype:
            raise ValueError(
                f"rings are {ring.dtype} and tokens {x.dtype}: windows keep tokens exactly; "
                "allocate the rings in the model dtype"
            )
        if not ring.is_contiguous():
            raise ValueError(
                f"rings have strides {ring.stride()}: they must be contiguous, since rows are "
                "counted through all of them"
            )
