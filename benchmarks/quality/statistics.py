"""The test behind every comparison: paired by problem, two-sided, normal approximation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from recipes.metrics import mean_and_stderr

ALPHA = 0.05
POWER = 0.8
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Paired:
    """Mean difference over problems, in the unit of the values.

    Attributes:
        difference, stderr: of the mean over problems.
        p: two-sided p-value of no difference; 1 where no problem differs.
        detectable: the smallest true difference that this test, at ALPHA and the observed spread,
            finds with POWER.
        n: problems.
    """

    difference: float
    stderr: float
    p: float
    detectable: float
    n: int

    @classmethod
    def test(cls, ours: Sequence[float], theirs: Sequence[float]) -> Paired:
        """``ours`` minus ``theirs``, problem by problem.

        Raises:
            ValueError: fewer than two problems, or not the same number of each.
        """
        if len(ours) != len(theirs) or len(ours) < 2:
            raise ValueError(
                f"{len(ours)} and {len(theirs)} problems: a paired test needs the same two or more"
            )
        difference, stderr = mean_and_stderr([a - b for a, b in zip(ours, theirs, strict=True)])
        if stderr > 0:
            p = 2 * (1 - _NORMAL.cdf(abs(difference) / stderr))
        else:
            p = 1.0 if difference == 0 else 0.0
        reach = _NORMAL.inv_cdf(1 - ALPHA / 2) + _NORMAL.inv_cdf(POWER)
        return cls(difference, stderr, p, reach * stderr, len(ours))
