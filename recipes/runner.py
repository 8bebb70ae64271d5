"""Draws the samples of one variant, several problems at a time, and grades them as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .cache import CacheInfo
from .config import RunConfig
from .engines import Client
from .metrics import maj_at_k
from .origin import Origin
from .problems import Problem, ProblemSet
from .records import Records, Sample, Session

# SGLang's own arguments that are worth keeping with a result.
SERVER_KEYS = (
    "model_path", "dtype", "kv_cache_dtype", "kv_quant", "kv_quant_bits", "attention_backend",
    "device", "tp_size", "dp_size", "page_size", "mem_fraction_static", "max_total_tokens",
    "max_total_num_tokens", "max_running_requests", "chunked_prefill_size", "random_seed",
    "schedule_policy", "disable_radix_cache", "disable_overlap_schedule", "disable_cuda_graph",
    "version",
)  # fmt: skip

# tqdm's own lock is shared between processes, which this program does not need, and its tracker
# process ends with the engine's.
tqdm.set_lock(threading.RLock())


class Tally:
    """Running accuracy over the problems that have all their samples."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._problems = 0
        self._right = 0.0
        self._votes = 0.0

    def add(self, group: Sequence[Sample]) -> None:
        correct = [sample.correct for sample in group]
        self._problems += 1
        self._right += sum(correct) / len(correct)
        self._votes += maj_at_k([sample.answer for sample in group], correct, len(group))

    def __str__(self) -> str:
        if not self._problems:
            return ""
        right, votes = self._right / self._problems, self._votes / self._problems
        return f"pass@1 {right:.1%}, maj@{self._n} {votes:.1%}"


class Run:
    """The samples of one variant in one folder, those of earlier sessions included.

    Attributes:
        samples: ``samples-<variant>.jsonl``.
        origin: file ``origin-<variant>.json``, there before the first sample.
        scores: file ``scores-<variant>.jsonl`` of what scorers think of the samples.
        sessions: ``sessions-<variant>.jsonl``, one line per engine that came to the end.
    """

    def __init__(self, folder: Path, slug: str, config: RunConfig, problems: ProblemSet) -> None:
        self.config = config
        self.problems = problems
        self.origin = folder / f"origin-{slug}.json"
        self.scores = folder / f"scores-{slug}.jsonl"
        self.samples = Records(folder / f"samples-{slug}.jsonl", Sample)
        self.sessions = Records(folder / f"sessions-{slug}.jsonl", Session)
        self._done: dict[str, list[Sample]] = {}
        self._tally = Tally(config.n)
        self._note(self.samples.items)

    @property
    def finished(self) -> bool:
        """Every sample is there, and so is what the engine had to say about its cache."""
        return bool(self.sessions.items) and not any(map(self._missing, self.problems.problems))

    @property
    def next_seed(self) -> int:
        """A seed that no earlier session of this variant has drawn with."""
        used = [sample.seed for sample in self.samples.items if sample.seed is not None]
        return max(used, default=self.config.seed - 1) + 1

    def claim(self, info: dict[str, Any]) -> None:
        """Make sure that the engine with this ``server_info`` may add to the samples there are.

        Raises:
            ValueError: they were drawn with another engine.
        """
        origin = Origin.of(info)
        if self.samples.items:
            origin.check(self.origin)
        else:
            origin.write(self.origin)

    def draw(self, client: Client, variant: str, seed: int | None) -> None:
        """Draw all samples that are missing.

        Effects: appends to ``samples`` as each problem completes, so that an interruption costs
        the problems in flight, and to ``sessions`` at the end.

        Raises:
            ValueError: earlier samples were drawn with another engine.
        """
        info = client.info()
        self.claim(info)
        start = CacheInfo.parse(info)
        known = len(self.samples.items)
        clock = time.perf_counter()
        try:
            client.run(self._draw_all(client, variant, seed))
        except ExceptionGroup as group:
            # One broken request ends all that are in flight; the first tells why.
            raise group.exceptions[0] from group
        seconds = time.perf_counter() - clock
        info = client.info()
        now = CacheInfo.parse(info)
        state = dataclasses.asdict(now) | now.since(start) | {"variant": variant}
        self.sessions.append(
            Session(
                seconds=seconds,
                completion_tokens=sum(s.completion_tokens for s in self.samples.items[known:]),
                server={key: info[key] for key in SERVER_KEYS if key in info},
                **state,
            )
        )

    def _missing(self, problem: Problem) -> list[int]:
        there = {sample.index for sample in self._done.get(problem.id, ())}
        return [index for index in range(self.config.n) if index not in there]

    def _note(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            group = self._done.setdefault(sample.problem, [])
            group.append(sample)
            if len(group) == self.config.n:
                self._tally.add(group)

    async def _draw_all(self, client: Client, variant: str, seed: int | None) -> None:
        room = asyncio.Semaphore(self.config.concurrency)
        pending = [problem for problem in self.problems.problems if self._missing(problem)]
        with tqdm(
            total=len(self.problems.problems),
            initial=len(self.problems.problems) - len(pending),
            desc=f"{variant:>5}",
            unit="problem",
            postfix=str(self._tally),
        ) as bar:

            async def solve(problem: Problem) -> None:
                try:
                    missing = self._missing(problem)
                    generations = await client.generate(
                        self.problems.prompt(problem),
                        self.config.sampling_params,
                        len(missing),
                        self.config.logprob_request,
                    )
                finally:
                    room.release()
                samples = []
                for index, generation in zip(missing, generations, strict=True):
                    answer, correct = self.problems.grade(problem, generation.text)
                    samples.append(
                        Sample(
                            problem=problem.id,
                            level=problem.level,
                            variant=variant,
                            index=index,
                            seed=seed,
                            answer=answer,
                            correct=correct,
                            **dataclasses.asdict(generation),
                        )
                    )
                self.samples.append(*samples)
                self._note(samples)
                bar.set_postfix_str(str(self._tally), refresh=False)
                bar.update()

            async with asyncio.TaskGroup() as tasks:
                for _, group in itertools.groupby(pending, key=self.problems.shared_prompt):
                    same = list(group)
                    shared = self.problems.shared_prompt(same[0])
                    if len(same) > 1 and shared:
                        # Requests that arrive together all prefill what they share; one
                        # request ahead of them puts it into the radix cache once.
                        await client.generate(shared, {"max_new_tokens": 0}, 1)
                    for problem in same:
                        await room.acquire()
                        tasks.create_task(solve(problem))
