"""What the decode kernels are measured on, and the times they must reach.

Every case is one layer of a Llama-3.1-8B: 32 query and 8 KV heads of 128.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

H_Q, H_KV, HEAD_DIM = 32, 8, 128
BITS = ((4, 4), (4, 2), (2, 2))
"""Bits of K and V."""
PAGE = 16
"""Slots per page of the pool in serving (``patternkv_sgl.pool.SLOTS_PER_PAGE``)."""


@dataclass(frozen=True)
class Level:
    """One level of a tree of prefixes: ``nodes`` segments of ``tokens`` each."""

    nodes: int
    tokens: int


@dataclass(frozen=True)
class Case:
    """A decode batch.

    Attributes:
        levels: root first. The last level is the branches' own text, so it has a node per branch;
            every other node is shared by equally many branches.
    """

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        counts = [level.nodes for level in self.levels]
        if any(below % above for above, below in itertools.pairwise(counts)):
            raise ValueError(f"{counts} nodes per level: each must divide the next")

    @property
    def name(self) -> str:
        own = self.levels[-1]
        if len(self.levels) == 1:
            return f"{own.nodes}x{own.tokens}"
        if len(self.levels) == 2 and self.levels[0].nodes == 1:
            return f"{own.nodes}x({self.shared}+{own.tokens})"
        return "/".join(f"{level.nodes}x{level.tokens}" for level in self.levels)

    @property
    def branches(self) -> int:
        """Rows of the batch."""
        return self.levels[-1].nodes

    @property
    def shared(self) -> int:
        """Tokens of one branch that others may read too."""
        return self.context - self.own

    @property
    def own(self) -> int:
        """Tokens of one branch that only it reads."""
        return self.levels[-1].tokens

    @property
    def context(self) -> int:
        """Tokens one branch attends."""
        return sum(level.tokens for level in self.levels)

    @property
    def tokens(self) -> int:
        """Slots of the whole tree, each counted once."""
        return sum(level.nodes * level.tokens for level in self.levels)

    @property
    def tables(self) -> int:
        """Pattern tables: one per prefilled node; generated text uses the table above it."""
        levels = enumerate(self.levels)
        return sum(level.nodes for depth, level in levels if not self.is_generated(depth))

    def is_generated(self, depth: int) -> bool:
        """Whether the tokens of level ``depth`` were decoded, not prefilled: own text after a
        shared prefix."""
        return 0 < depth == len(self.levels) - 1


def flat(branches: int, shared: int, own: int) -> Case:
    """One prefix for all branches, then text of their own."""
    return Case((Level(1, shared), Level(branches, own)))


def private(branches: int, tokens: int) -> Case:
    """Unrelated prompts: nothing is shared."""
    return Case((Level(branches, tokens),))


TARGETS: dict[Case, dict[tuple[int, int], float]] = {
    flat(4, 32768, 512): {(4, 4): 20, (2, 2): 17},
    flat(8, 32768, 512): {(4, 4): 22, (2, 2): 19},
    flat(16, 32768, 512): {(4, 4): 26, (2, 2): 24},
    flat(32, 16384, 512): {(4, 4): 28, (2, 2): 26},
    flat(64, 32768, 1024): {(4, 4): 75, (2, 2): 70},
    private(16, 32768): {(4, 4): 190, (2, 2): 130},
    private(4, 32768): {(4, 4): 55, (2, 2): 40},
}
"""Microseconds per layer to reach on one H200, by bits of K and V. At the shared
points that is less than a bf16 kernel needs to read the cache once at copy bandwidth."""

TREES = (
    Case((Level(1, 16384), Level(4, 4096), Level(16, 512))),
    Case((Level(1, 32768), Level(8, 2048), Level(64, 512))),
    Case((Level(1, 16384), Level(2, 4096), Level(8, 2048), Level(32, 512))),
    Case((Level(1, 32768), Level(4, 4096), Level(16, 1024), Level(64, 256))),
)
"""Two and three levels of shared prefixes."""

PROMPTS = (Case((Level(8, 2048), Level(256, 512))),)
"""Several prompts, each with branches of its own: batches of many segments."""

PLAN_TARGET_US = 50
"""Microseconds to plan a step of :data:`PROMPTS`, once for all layers."""


def sweep(branches: tuple[int, ...], shared: tuple[int, ...], own: tuple[int, ...]) -> list[Case]:
    """The grid of flat cases, without those that have a target."""
    grid = [flat(b, s, o) for b in branches for s in shared for o in own]
    return [case for case in grid if case not in TARGETS]


SWEEP = sweep((1, 4, 16, 64, 128), (1024, 8192, 32768, 131072), (0, 512, 8192))
QUICK_SWEEP = sweep((1, 16, 128), (1024, 32768), (0, 512))


def suites(chosen: str, *, quick: bool) -> dict[str, list[Case]]:
    """Cases by suite, for ``chosen`` among design, trees, prompts, sweep and all."""
    every = {
        "design": list(TARGETS),
        "trees": list(TREES),
        "prompts": list(PROMPTS),
        "sweep": QUICK_SWEEP if quick else SWEEP,
    }
    return every if chosen == "all" else {chosen: every[chosen]}
