"""Rotation and an optimal scalar code, as in TurboQuant (arXiv 2504.19874) without its QJL bit.

A vector's norm is stored in float16; its direction is rotated by a Hadamard matrix with random
signs, after which every coordinate is nearly normal with variance 1 / d, and each coordinate takes
the nearest level of the Lloyd-Max quantizer of that distribution.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from benchmarks.quality.cache import TokenCache

_NORM_BITS = 16
_LLOYD_STEPS = 2000


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """The ``2**bits`` levels of least squared error for a standard normal variable, float64.

    Lloyd's iteration with the closed form of the mean between two thresholds.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(_LLOYD_STEPS):
        edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = normal.cdf(edges).diff()
        levels = -density.diff() / mass
    return levels


@cache
def rotation(d: int) -> torch.Tensor:
    """Orthogonal float32 ``[d, d]``: Sylvester's Hadamard matrix with seeded column signs.

    Raises:
        ValueError: ``d`` is no power of two.
    """
    if d < 1 or d & (d - 1):
        raise ValueError(f"head_dim {d}: the Hadamard rotation needs a power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (d,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return matrix * signs / math.sqrt(d)


@cache
def code(bits: int, d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of a rotated coordinate of unit vectors, float32 ``[2**bits]``, and the rotation."""
    levels = lloyd_max(bits).float() / math.sqrt(d)
    return levels.to(device), rotation(d).to(device)


class HadamardLloyd(TokenCache):
    """Norm, rotated direction, Lloyd-Max codes; every token at once, no window."""

    name = "hadamard_lloyd"
    bit_widths = ((4, 4), (4, 2), (2, 2))

    def _round(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        levels, turn = code(bits, self.d, x.device)
        norm = x.norm(dim=-1, keepdim=True)
        direction = x / norm.clamp_min(1e-30) @ turn.T
        codes = torch.bucketize(direction, (levels[1:] + levels[:-1]) / 2)
        return levels[codes] @ turn * norm.half().float()

    def _token_bits(self) -> float:
        return sum(self.bits) * self.d + 2 * _NORM_BITS
