"""The requests of a soak: shared stems, private tails, branches, trees of two levels, aborts.

What a request is follows from its seed alone. Prompts are token ids, so any model will do.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import requests

Kind = Literal["single", "long", "branches", "tree", "disconnect", "abort"]
KINDS: dict[Kind, int] = {
    "single": 30,
    "long": 10,
    "branches": 25,
    "tree": 15,
    "disconnect": 10,
    "abort": 10,
}
"""How often each occurs, in parts of their sum."""
STEMS = 6
"""Prompts that requests go on from; which ones changes over time, so that the tree evicts."""
STEM_LIFE = 200
"""Seeds that share their stems."""
REQUEST_SECONDS = 600


@dataclass(frozen=True)
class Scale:
    """Sizes of requests, in tokens.

    Attributes:
        vocab_size: prompts are random ids below it.
        stem: longest shared prompt.
        tail: longest private one.
        new_tokens: most that a usual request generates; a long one four times as many.
        branches: most of one prompt.
    """

    vocab_size: int
    stem: int
    tail: int
    new_tokens: int
    branches: int


@dataclass(frozen=True)
class Request:
    """One call of ``/generate``: ``n`` branches of each prompt, ``new_tokens`` each."""

    kind: Kind
    prompts: list[list[int]]
    n: int
    new_tokens: int

    def body(self, **more: Any) -> dict[str, Any]:
        params = {
            "n": self.n,
            "max_new_tokens": self.new_tokens,
            "temperature": 0.8,
            "ignore_eos": True,
        }
        return {"input_ids": self.prompts, "sampling_params": params, **more}


def make_request(seed: int, scale: Scale) -> Request:
    """The request of ``seed``."""
    rng = random.Random(seed)
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    era = seed // STEM_LIFE
    # A few short stems too, that do not repay a table.
    stem_rng = random.Random(f"stem {era} {rng.randrange(STEMS)}")
    stem = _tokens(stem_rng, stem_rng.choice([scale.stem // 8, scale.stem // 2, scale.stem]), scale)
    new_tokens = rng.randint(max(1, scale.new_tokens // 8), scale.new_tokens)
    if kind == "tree":
        twigs = [stem + _tokens(rng, rng.randint(1, scale.tail), scale) for _ in range(3)]
        return Request(kind, twigs, rng.randint(2, max(2, scale.branches // 3)), new_tokens)
    prompt = stem + _tokens(rng, rng.randint(0, scale.tail), scale)
    n = rng.randint(2, scale.branches) if kind == "branches" else 1
    if kind in ("long", "disconnect", "abort"):
        new_tokens = 4 * scale.new_tokens
    return Request(kind, [prompt], n, new_tokens)


def _tokens(rng: random.Random, count: int, scale: Scale) -> list[int]:
    return rng.choices(range(scale.vocab_size), k=count)


class Load:
    """Threads that keep ``concurrency`` requests in flight until told to stop.

    Attributes:
        done: finished requests by kind. samples: finished branches. new_tokens: of these.
        problems: what went wrong, a line each.
    """

    def __init__(self, url: str, scale: Scale, concurrency: int, first_seed: int) -> None:
        self._url, self._scale = url, scale
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._next_seed = first_seed
        self.done: Counter[str] = Counter()
        self.samples = self.new_tokens = 0
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(concurrency)]
        for thread in self._threads:
            thread.start()

    @property
    def next_seed(self) -> int:
        return self._next_seed

    def stop(self) -> None:
        """Send nothing new, and wait for what is in flight."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def abandon(self) -> None:
        """The server is about to die: what fails from now on is no problem."""
        self._stop.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                seed, self._next_seed = self._next_seed, self._next_seed + 1
            request = make_request(seed, self._scale)
            try:
                answers = self._send(seed, request)
                problems = check_answers(request, answers)
            except (requests.RequestException, ValueError) as error:
                answers, problems = [], [f"{type(error).__name__}: {str(error)[:200]}"]
                # A server that is gone answers at once.
                time.sleep(0.1)
            if problems and self._stop.is_set():
                return
            with self._lock:
                self.done[request.kind] += not problems
                self.samples += len(answers)
                self.new_tokens += len(answers) * request.new_tokens
                self.problems += [f"request {seed} ({request.kind}): {text}" for text in problems]

    def _send(self, seed: int, request: Request) -> list[dict[str, Any]]:
        """What the server answered; nothing for a request that is given up."""
        url = f"{self._url}/generate"
        if request.kind == "disconnect":
            body = request.body(stream=True)
            with requests.post(url, json=body, stream=True, timeout=REQUEST_SECONDS) as stream:
                _raise(stream)
                next(stream.iter_lines(), None)
            return []
        if request.kind == "abort":
            name = f"soak {seed} {time.monotonic_ns()}"
            delay = random.Random(seed).uniform(0.05, 1.5)
            timer = threading.Timer(delay, self._abort, [name])
            timer.daemon = True
            timer.start()
            # The answer is cut short, or whole where the abort came late.
            _raise(requests.post(url, json=request.body(rid=[name]), timeout=REQUEST_SECONDS))
            return []
        response = requests.post(url, json=request.body(), timeout=REQUEST_SECONDS)
        _raise(response)
        answers: list[dict[str, Any]] = response.json()
        return answers

    def _abort(self, name: str) -> None:
        # A server that dies meanwhile is seen by the request itself.
        with suppress(requests.RequestException):
            url = f"{self._url}/abort_request"
            requests.post(url, json={"rid": name}, timeout=REQUEST_SECONDS)


def _raise(response: requests.Response) -> None:
    if not response.ok:
        raise ValueError(f"HTTP {response.status_code}: {response.text[:200]}")


def check_answers(request: Request, answers: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the answers to ``request``, a line each; an aborted one has none."""
    if request.kind in ("disconnect", "abort"):
        return []
    expected = request.n * len(request.prompts)
    if len(answers) != expected:
        return [f"{len(answers)} answers instead of {expected}"]
    return [
        f"ended by {answer['meta_info']['finish_reason']} after "
        f"{answer['meta_info']['completion_tokens']} of {request.new_tokens} tokens"
        for answer in answers
        if answer["meta_info"]["finish_reason"]["type"] != "length"
        or answer["meta_info"]["completion_tokens"] != request.new_tokens
    ]
