"""One engine in a process of its own: cells in on standard input, rows out, a JSON object a line.

    python -m benchmarks.serving_worker '{"engine_args": {…}, "vocab_size": 128256}'

The parent is ``bench_serving``. Standard output belongs to rows, so the engine's own goes to
standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np

from benchmarks.rows import Row
from benchmarks.serving_cases import Cell, mixed_requests

T = TypeVar("T")
READY = "ready"
WARM_PROMPT, WARM_TOKENS = 1024, 8
IDLE_S = 0.02
"""Before a call whose time is taken, so that the engine has done with the one before."""
STREAMED_TOKENS = 64
"""Most tokens per branch in the run whose latencies are measured: streaming costs host time, so
throughput comes from a run without it."""


class Worker:
    """Measures cells with one engine.

    Args:
        engine_args: keyword arguments of ``sglang.Engine``.
        vocab_size: prompts are random ids below it.
    """

    def __init__(self, engine_args: dict[str, Any], vocab_size: int) -> None:
        import sglang

        self._engine = sglang.Engine(**engine_args)
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        # What compiles at the first prompt must not count as anyone's latency.
        self._timed([self._tokens(WARM_PROMPT)], 2, WARM_TOKENS)

    def close(self) -> None:
        self._engine.shutdown()

    def kv_tokens(self) -> int:
        return int(self._engine.get_server_info()["max_total_num_tokens"])

    def measure(self, cell: Cell) -> Row:
        """Latency of a fresh prompt, then throughput and token latencies over cached ones, each of
        an engine that was idle; of a mixed stream, throughput alone."""
        self._engine.flush_cache()
        if cell.workload == "saturation":
            return self._measure_stream(cell)
        shared = self._tokens(cell.prompt)
        ttft = self._run(self._stream(shared, 1))[1]
        prompts = [shared]
        if cell.prompts > 1:
            # A tree's second level goes on from one prompt, several prompts share nothing.
            prompts = [
                shared + self._tokens(cell.own) if cell.own else self._tokens(cell.prompt)
                for _ in range(cell.prompts)
            ]
        self._timed(prompts, 1, 1)
        each = cell.branches // cell.prompts
        self._timed(prompts, each, min(WARM_TOKENS, cell.new_tokens))
        time.sleep(IDLE_S)
        seconds = self._timed(prompts, each, cell.new_tokens)
        new_tokens = min(STREAMED_TOKENS, cell.new_tokens)
        streams = self._run(
            _gather([self._stream(ids, new_tokens) for ids in prompts for _ in range(each)])
        )
        gaps = [1e3 * gap for times in streams for gap in np.diff(times[1:])]
        return _described(cell) | {
            "tok_s": cell.branches * cell.new_tokens / seconds,
            "samples_min": 60 * cell.branches / seconds,
            "step_ms": 1e3 * seconds / cell.new_tokens,
            "ttft_ms": 1e3 * ttft,
            "itl_ms_p50": float(np.percentile(gaps, 50)) if gaps else None,
            "itl_ms_p99": float(np.percentile(gaps, 99)) if gaps else None,
            "peak_running": _peak(
                [(times[0] + times[1], times[0] + times[-1]) for times in streams]
            ),
        }

    def _measure_stream(self, cell: Cell) -> Row:
        """Completed samples of requests that all wait at once, the queue's last ones included."""
        requests = mixed_requests(cell)
        sent = [(self._tokens(request.prompt), request) for request in requests]
        start = time.perf_counter()
        answers = self._run(_gather([self._generate(ids, r.n, r.new_tokens) for ids, r in sent]))
        seconds = time.perf_counter() - start
        for answer, request in zip(answers, requests, strict=True):
            _check(answer, request.new_tokens)
        return _described(cell) | {
            "tok_s": sum(request.n * request.new_tokens for request in requests) / seconds,
            "samples_min": 60 * cell.branches / seconds,
            **dict.fromkeys(("step_ms", "ttft_ms", "itl_ms_p50", "itl_ms_p99", "peak_running")),
        }

    def _generate(self, ids: list[int], n: int, new_tokens: int) -> Coroutine[Any, Any, Any]:
        params = {"n": n, "max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 1.0}
        work: Coroutine[Any, Any, Any] = self._engine.async_generate(
            input_ids=ids, sampling_params=params
        )
        return work

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]

    def _timed(self, prompts: list[list[int]], n: int, new_tokens: int) -> float:
        """Seconds until ``n`` branches of every prompt have ``new_tokens`` each."""
        start = time.perf_counter()
        answers = self._run(_gather([self._generate(ids, n, new_tokens) for ids in prompts]))
        seconds = time.perf_counter() - start
        for answer in answers:
            _check(answer, new_tokens)
        return seconds

    async def _stream(self, ids: list[int], new_tokens: int) -> list[float]:
        """When the request was sent (absolute), then each answer, in seconds after that."""
        params = {"max_new_tokens": new_tokens, "ignore_eos": True, "temperature": 1.0}
        start = time.perf_counter()
        times = [start]
        chunks = await self._engine.async_generate(
            input_ids=ids, sampling_params=params, stream=True
        )
        async for _ in chunks:
            times.append(time.perf_counter() - start)
        return times

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        # The engine's sockets are bound to the loop it was made with.
        result: T = self._engine.loop.run_until_complete(work)
        return result


def _described(cell: Cell) -> Row:
    return {
        "workload": cell.workload,
        "case": cell.name,
        "prompt": cell.prompt,
        "prompts": cell.prompts,
        "own": cell.own,
        "branches": cell.branches,
        "new_tokens": cell.new_tokens,
    }


def _check(answer: Any, new_tokens: int) -> None:
    """Assert that every branch of an answer has all of its tokens."""
    for branch in answer if isinstance(answer, list) else [answer]:
        done = branch["meta_info"]["completion_tokens"]
        assert done == new_tokens, f"{done} of {new_tokens} tokens: {branch['meta_info']}"


async def _gather(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    return await asyncio.gather(*work)


def _peak(spans: list[tuple[float, float]]) -> int:
    """Most spans that overlap at one time."""
    events = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return int(np.cumsum([change for _, change in events]).max())


def main() -> None:
    options = json.loads(sys.argv[1])
    rows = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(options["engine_args"], options["vocab_size"])
    print(json.dumps({READY: worker.kv_tokens()}), file=rows)
    for text in sys.stdin:
        print(json.dumps(worker.measure(Cell(**json.loads(text)))), file=rows)
    worker.close()


if __name__ == "__main__":
    main()
