"""Two-level tree search as a frontend program: branch, score, prune, branch again, vote.

    python -m recipes.tree_search --config recipes/demo/tree_search.yaml
    python -m recipes.tree_search --config … --base-url http://127.0.0.1:30000

Segments of the KV cache are shared at two depths: the prompt by all branches, a kept step by the
branches that go on from it. Counters of the server, read around each level, show how much.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sglang as sgl
from tqdm import tqdm

from .frontend import Frontend, FrontendConfig, Reads, generation, graded, run_program
from .generation import Generation
from .problems import Problem, ProblemSet
from .records import Records, Sample
from .report import UNKNOWN, aligned
from .runner import Tally
from .scoring import Verifier
from .settings import parse

Score = Callable[[Generation], float]


@dataclass(frozen=True)
class Level:
    """One level of a tree that is there.

    Attributes:
        prompt_tokens: length of the tree's root. answers: what the level's branches generated.
        reads: what decode read meanwhile.
    """

    prompt_tokens: int
    answers: list[Generation]
    reads: Reads

    @property
    def saved_below_prompt(self) -> int | None:
        """Reads that sharing the prompt alone cannot have saved, at least; None if not counted.

        With branches of t tokens, the longest at best reads the prompt for all others in each of
        its steps. That saves the prompt's tokens (sum of t - largest t) times; what is saved beyond
        comes from segments further down the tree.
        """
        if self.reads.saved is None or not self.answers:
            return self.reads.saved
        steps = [answer.completion_tokens for answer in self.answers]
        return max(0, self.reads.saved - self.prompt_tokens * (sum(steps) - max(steps)))


@dataclass(frozen=True)
class Tree:
    """A finished search.

    Attributes:
        levels: the first steps, and the branches that went on from the kept ones.
        leaves: keep × branches whole answers; a step that was one already counts for its branches.
    """

    levels: tuple[Level, Level]
    leaves: list[Generation]


@sgl.function  # type: ignore[untyped-decorator]
def tree_search(
    s: Any,
    prompt: str,
    config: TreeSearchConfig,
    score: Score,
    reads: Callable[[], Reads],
) -> Tree:
    """Search from ``prompt``. ``reads`` gives the KV reads since it was called last."""
    s += prompt
    s.text()  # programs run behind their caller; fork shares what has arrived
    reads()
    trunks = s.fork(config.width)
    trunks += sgl.gen("step", max_tokens=config.step_tokens, return_logprob=True)
    steps = [generation(trunk, "step") for trunk in trunks]
    first = Level(steps[0].prompt_tokens, steps, reads())

    best = sorted(range(config.width), key=lambda i: score(steps[i]), reverse=True)
    grown = []
    for i in best[: config.keep]:
        twigs = []
        if steps[i].finish_reason == "length":
            twigs = list(trunks[i].fork(config.branches))
            for twig in twigs:
                twig += sgl.gen("rest", max_tokens=config.max_new_tokens)
        grown.append((steps[i], twigs))

    leaves, rests = [], []
    for step, twigs in grown:
        if not twigs:
            leaves += [step] * config.branches
        for twig in twigs:
            rest = generation(twig, "rest")
            rests.append(rest)
            leaves.append(dataclasses.replace(rest, text=step.text + rest.text))
    return Tree((first, Level(first.prompt_tokens, rests, reads())), leaves)


@dataclass(frozen=True)
class TreeSearchConfig(FrontendConfig):
    """Every key of the recipe; ``max_new_tokens`` is the length of the second level.

    Attributes:
        width: first steps per problem. keep: how many of them go on.
        branches: answers from each kept step.
        step_tokens: length of a first step.
        verifier: ``package.module.function`` that scores a step's text; None takes its mean
            log-probability.
    """

    width: int = 8
    keep: int = 2
    branches: int = 4
    step_tokens: int = 64
    verifier: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("width", "keep", "branches", "step_tokens")
        self._branches_differ("width")
        self._branches_differ("branches")
        if self.keep > self.width:
            raise ValueError(f"keep {self.keep}: expected at most width {self.width}")


def parse_config(argv: Sequence[str] | None = None) -> TreeSearchConfig:
    """The configuration that ``argv`` describes."""
    return parse(TreeSearchConfig, "tree_search", "Search a tree of two levels.", argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what ``argv`` (default: the command line) describes; gives the exit status."""
    config = parse_config(argv)
    return run_program(config, config.width, partial(run, config))


def run(config: TreeSearchConfig, problems: ProblemSet, server: Frontend) -> list[Tree]:
    """Search all problems, one after the other so that reads belong to a tree, and print what was
    found and read.

    Effects: writes each problem's leaves to ``config.output`` as they are there.
    """
    records = Records(Path(config.output), Sample) if config.output else None
    verifier = Verifier(config.verifier) if config.verifier else None
    tally = Tally(config.keep * config.branches)
    trees = []
    bar = tqdm(problems.problems, unit="problem")
    for problem in bar:

        def score(step: Generation, problem: Problem = problem) -> float:
            if verifier is not None:
                return verifier(problem, step.text)
            assert step.mean_logprob is not None
            return step.mean_logprob

        state = tree_search.run(
            prompt=problems.prompt(problem),
            config=config,
            score=score,
            reads=server.reads,
            backend=server.backend,
            **config.sampling_params,
        )
        tree: Tree = state.ret_value
        samples = graded(problems, problem, tree.leaves, server)
        if records is not None:
            records.append(*samples)
        trees.append(tree)
        tally.add(samples)
        bar.set_postfix_str(str(tally), refresh=False)
    print(f"{server.cache.variant}: {tally} over {len(trees)} problems\n")
    print(table(trees))
    return trees


def table(trees: Sequence[Tree]) -> str:
    """What decode read at each level, summed over trees."""
    head = ("level", "branches", "KV tokens read", "saved by sharing", "below the prompt, at least")
    rows: list[tuple[str, ...]] = [head]
    for depth in (0, 1):
        levels = [tree.levels[depth] for tree in trees]
        branches = f"{sum(len(level.answers) for level in levels):,}"
        counts: list[str] = [UNKNOWN] * 3
        if all(level.reads.saved is not None for level in levels):
            total = sum(level.reads.total or 0 for level in levels)
            saved = sum(level.reads.saved or 0 for level in levels)
            below = sum(level.saved_below_prompt or 0 for level in levels)
            share = f" ({saved / total:.1%})" if total else ""
            counts = [f"{total - saved:,}", f"{saved:,}{share}", f"{below:,}"]
        rows.append((("first steps", "whole answers")[depth], branches, *counts))
    return aligned(rows)


if __name__ == "__main__":
    sys.exit(main())
