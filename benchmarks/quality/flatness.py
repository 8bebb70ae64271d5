"""How much flatter residuals are than the vectors they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Flatness:
    """Residuals of a prompt's tokens against its raw vectors; below 1 is a gain.

    ``*_range``: mean range over channels, residual over raw. ``*_variance``: the same of the
    variance over channels.
    """

    k_range: float
    k_variance: float
    v_range: float
    v_variance: float

    @classmethod
    def of(
        cls, k: torch.Tensor, k_residual: torch.Tensor, v: torch.Tensor, v_residual: torch.Tensor
    ) -> Flatness:
        """All ``[..., d]``, a vector with its residual."""
        return cls(*_ratios(k, k_residual), *_ratios(v, v_residual))


def _ratios(x: torch.Tensor, residual: torch.Tensor) -> tuple[float, float]:
    before, after = (y.amax(-1) - y.amin(-1) for y in (x, residual))
    return (
        (after.mean() / before.mean()).item(),
        (residual.var(-1).mean() / x.var(-1).mean()).item(),
    )
