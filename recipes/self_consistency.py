"""Self-consistency as a frontend program: fork a prompt, let the branches vote.

    python -m recipes.self_consistency --config recipes/demo/self_consistency.yaml
    python -m recipes.self_consistency --config … --base-url http://127.0.0.1:30000

Wang et al. 2022 (arXiv 2203.11171). The prompt is prefilled once and its KV is stored once, with
one pattern table; decode reads it once for all branches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from .runner import Tally
from .settings import parse


@sgl.function  # type: ignore[untyped-decorator]
def self_consistency(s: Any, prompt: str, num_branches: int) -> list[Generation]:
    """``num_branches`` answers to ``prompt``, each on a branch of its own."""
    s += prompt
    s.text()  # programs run behind their caller; fork shares what has arrived
    branches = s.fork(num_branches)
    branches += sgl.gen("answer")
    branches.join()
    return [generation(branch, "answer") for branch in branches]


@dataclass(frozen=True)
class SelfConsistencyConfig(FrontendConfig):
    """Every key of the recipe.

    Attributes:
        n: branches per problem. concurrency: problems in flight.
    """

    n: int = 8
    concurrency: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("n", "concurrency")
        self._branches_differ("n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what ``argv`` (default: the command line) describes; gives the exit status."""
    config = parse(SelfConsistencyConfig, "self_consistency", "Fork each prompt and vote.", argv)
    return run_program(config, config.n, partial(run, config))


def run(
    config: SelfConsistencyConfig, problems: ProblemSet, server: Frontend
) -> tuple[Tally, Reads]:
    """Answer all problems and print how often branches and votes are right.

    Effects: writes each problem's samples to ``config.output`` as they are there.
    """
    records = Records(Path(config.output), Sample) if config.output else None
    tally, tokens, clock = Tally(config.n), 0, time.perf_counter()

    def solve(problem: Problem) -> list[Generation]:
        state = self_consistency.run(
            prompt=problems.prompt(problem),
            num_branches=config.n,
            backend=server.backend,
            **config.sampling_params,
        )
        answers: list[Generation] = state.ret_value
        return answers

    with ThreadPoolExecutor(config.concurrency) as threads:
        answered = threads.map(solve, problems.problems)
        bar = tqdm(answered, total=len(problems.problems), unit="problem")
        for problem, answers in zip(problems.problems, bar, strict=True):
            samples = graded(problems, problem, answers, server)
            if records is not None:
                records.append(*samples)
            tokens += sum(sample.completion_tokens for sample in samples)
            tally.add(samples)
            bar.set_postfix_str(str(tally), refresh=False)
    seconds = time.perf_counter() - clock
    reads = server.reads()
    print(f"{server.cache.variant}: {tally} over {len(problems.problems)} problems")
    print(f"{tokens:,} tokens generated, {tokens / seconds:,.0f} per second")
    print(reads)
    return tally, reads


if __name__ == "__main__":
    sys.exit(main())
