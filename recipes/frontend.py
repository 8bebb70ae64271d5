"""What the programs in SGLang's frontend language share: a server, answers, read counters."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import CacheInfo
from .config import TaskConfig
from .endpoint import Endpoint
from .engines import check_sampling, check_variant, engine_args, start_environment
from .generation import Generation
from .problems import Problem, ProblemSet, load_problems
from .records import Sample
from .variant import Variant


@dataclass(frozen=True)
class FrontendConfig(TaskConfig):
    """Keys of every frontend program, beside those of ``TaskConfig``.

    Attributes:
        variant: cache of the server that is started; a running one (``base_url``) has its own.
        output: JSONL file for the answers, not there yet; None writes none.
    """

    variant: str = "4/4"
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Variant.parse(self.variant)
        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"output {self.output}: the file is there; name another, or remove it")


@dataclass(frozen=True)
class Reads:
    """KV tokens that decode would have read, every branch on its own, and those saved by sharing.

    Both None where the server does not count them.
    """

    total: int | None
    saved: int | None

    def __str__(self) -> str:
        if self.total is None or self.saved is None:
            return "KV reads: not counted by this cache"
        share = self.saved / self.total if self.total else 0.0
        return f"KV tokens read: {self.total - self.saved:,} of {self.total:,} ({share:.1%} shared)"


class Frontend:
    """A server that frontend programs run on.

    Attributes:
        backend: what ``run`` of a program takes. info: its ``server_info`` at the start.
        cache: state of its cache when ``reads`` was called last, or at the start.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._server = Endpoint(url, timeout)
        self.info = self._server.ask("server_info")
        self.cache = CacheInfo.parse(self.info)

        import sglang

        self.backend = sglang.RuntimeEndpoint(self._server.url)

    def reads(self) -> Reads:
        """What decode read since this was called last, or since the start."""
        now = CacheInfo.parse(self._server.ask("server_info"))
        gone = now.since(self.cache)
        self.cache = now
        return Reads(gone["kv_reads"], gone["kv_reads_shared"])


@contextmanager
def frontend(config: FrontendConfig) -> Iterator[Frontend]:
    """The server at ``base_url``, or one of our own with ``variant``'s cache until the end.

    Raises:
        RuntimeError: there is no server, or not one with this cache.
    """
    if config.base_url is not None:
        yield Frontend(config.base_url, config.timeout)
        return
    variant = Variant.parse(config.variant)
    with start_environment(config):
        import sglang
        from sglang.srt.plugins import load_plugins

        load_plugins()  # sglang.Runtime, unlike Engine, does not load plug-ins itself
        runtime = sglang.Runtime(**engine_args(config, variant, config.seed))
    try:
        found = Frontend(runtime.url, config.timeout)
        check_variant(variant, found.info)
        yield found
    finally:
        runtime.shutdown()
        # Its __del__ imports, which fails in an interpreter that is half gone: let it run now.
        atexit.unregister(runtime.shutdown)
        del runtime


def run_program(
    config: FrontendConfig, branches: int, run: Callable[[ProblemSet, Frontend], object]
) -> int:
    """Run a program on the server that ``config`` names or starts; gives the exit status.

    Args:
        branches: of one prompt, which must differ.
        run: the program.
    """
    try:
        problems = load_problems(config)
        with frontend(config) as server:
            check_sampling(server.info, branches)
            run(problems, server)
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def generation(state: Any, name: str) -> Generation:
    """What variable ``name`` of a program's state was generated as.

    Raises:
        RuntimeError: the server failed the request.
    """
    meta = state.get_meta_info(name)
    if meta is None:
        raise RuntimeError(f"the server gave no {name!r}: {state.error()}")
    return Generation.parse({"text": state[name], "meta_info": meta})


def graded(
    problems: ProblemSet, problem: Problem, answers: list[Generation], frontend: Frontend
) -> list[Sample]:
    """The samples that ``answers`` to one problem are."""
    samples = []
    for index, generated in enumerate(answers):
        answer, correct = problems.grade(problem, generated.text)
        samples.append(
            Sample(
                problem=problem.id,
                level=problem.level,
                variant=frontend.cache.variant,
                index=index,
                seed=frontend.info["random_seed"],
                answer=answer,
                correct=correct,
                **vars(generated),
            )
        )
    return samples
