"""Where a store also keeps its tokens exactly: entries of the windows of running requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
        n, h_kv, d = k.shape
        for ring, x in ((self.k, k), (self.v, v)):
            if ring.dim() != 4 or ring.shape[2:] != (h_kv, d) or ring.shape != self.k.shape:
                raise ValueError(
                    f"rings are k {list(self.k.shape)} and v {list(self.v.shape)}: these tokens "
                    f"need [num_rings, window, {h_kv}, {d}], both alike"
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
        if self.index.shape != (n,) or self.index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"index is {self.index.dtype} {list(self.index.shape)}: needs int64 or int32 [{n}]"
            )
