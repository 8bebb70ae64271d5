"""One table's content for K or V of one layer, as mining makes it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class MinedTable(NamedTuple):
    """One table's content for K or V of one layer."""

    patterns: torch.Tensor
    """float16 ``[h, num_patterns, d]``"""
    channel_scale: torch.Tensor
    """float16 ``[h, d]``, root mean square 1 over ``d``, positive"""
    channel_weight: torch.Tensor | None = None
    """float16 ``[h, d]``, positive: how much an error in each channel counts; None: all alike"""

    def fill(self, other: MinedTable) -> None:
        """Copy ``other`` of at most as many patterns here; what is left repeats its pattern 0."""
        used = other.patterns.shape[1]
        if used > self.patterns.shape[1]:
            raise ValueError(
                f"a mined table of {used} patterns does not fit "
                f"num_patterns={self.patterns.shape[1]}; mine fewer or allocate larger tables"
            )
        self.patterns[:, :used] = other.patterns
        self.patterns[:, used:] = other.patterns[:, :1]
        self.channel_scale.copy_(other.channel_scale)
        if self.channel_weight is not None:
            weight = other.channel_weight
            self.channel_weight[:] = 1.0 if weight is None else weight
