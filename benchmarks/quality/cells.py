"""One measurement: a method at one bit width on one batch of problems."""

from __future__ import annotations

from dataclasses import dataclass, field

CURVE_STEP = 32
"""Tokens of a chain over which a point of the KL curve is averaged."""


@dataclass(frozen=True)
class Cell:
    """What one batch gave. Lists over problems are in their order; other tasks leave them empty.

    Attributes:
        model, method, bits_k, bits_v: what ran. seed: of problems and sampling.
        task: ``forced LEVEL``, ``greedy LEVEL`` or ``sampled LEVEL``, or a file in LEVEL's place.
        problems: ids.
        context: prompt tokens. generated: tokens after it, of the longest branch.
        bits_per_element: everything stored at the end, for a branch on its own, mean over layers.
        seconds: of this cell.
        kl: mean KL(bf16 || method) in nats of each chain. kl_curve: of all, per CURVE_STEP tokens
            (None where nothing was scored).
        attn_err: relative error of attention per layer.
        flatness: per layer, k_range, k_variance, v_range, v_variance; empty without patterns.
        samples: branches of each problem. right: how many of them are correct, per problem.
        wrong: per problem, how often each wrong answer was given.
        no_answer, loops: completions that stated none; those among all that ended in a loop (each
            is counted as one or the other).
    """

    model: str
    method: str
    bits_k: int
    bits_v: int
    task: str
    seed: int
    commit: str | None
    problems: list[str]
    context: int
    generated: int
    bits_per_element: float
    seconds: float
    kl: list[float] = field(default_factory=list)
    kl_curve: list[float | None] = field(default_factory=list)
    attn_err: list[float] = field(default_factory=list)
    flatness: list[list[float]] = field(default_factory=list)
    samples: int = 0
    right: list[int] = field(default_factory=list)
    wrong: list[dict[str, int]] = field(default_factory=list)
    no_answer: int = 0
    loops: int = 0

    @property
    def key(self) -> tuple[str, str, int, int, str, int, tuple[str, ...]]:
        """What makes this measurement the same as another."""
        bits = (self.bits_k, self.bits_v)
        return (self.model, self.method, *bits, self.task, self.seed, tuple(self.problems))
