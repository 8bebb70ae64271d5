"""Stand-ins for the recipe's tests: an engine, a server, and what both would have said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson

from recipes.config import RunConfig
from recipes.engines import NOTHING
from recipes.generation import Generation
from recipes.records import Sample

STOCK = {
    "internal_states": [{}],
    "kv_cache_dtype": "auto",
    "model_path": "absent",
    "max_total_num_tokens": 1000,
    "random_seed": 7,
    "version": "0.5.23",
}
PATTERNKV = {
    "bits": "4/4",
    "bytes_per_token": 144,
    "bf16_bytes_per_token": 512,
    "kv_tokens": 3500,
    "bytes_allocated": 512_000,
    "table_bytes": 64_000,
    "window": 32,
    "tables_live": 3,
    "table_slots": 63,
    "tables_mined": 2,
    "tables_inherited": 9,
    "kv_reads": 100,
    "kv_reads_shared": 60,
}


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {"model": "m", "output": str(tmp_path), "num_problems": 6, "n": 2, "concurrency": 2}
    return RunConfig(**(values | {"questions_per_context": 3} | changes))


def write_model_config(folder: Path) -> None:
    """A model with 512 bytes of bf16 KV per token."""
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(orjson.dumps(config))


def sample(problem: str, index: int, correct: bool, **changes: Any) -> Sample:
    values = {
        "problem": problem, "level": None, "variant": "bf16", "index": index, "seed": 0,
        "text": "t", "answer": "right" if correct else "wrong", "correct": correct,
        "prompt_tokens": 100, "cached_tokens": 5, "completion_tokens": 10, "finish_reason": "stop",
        "mean_logprob": None, "self_certainty": None,
    }  # fmt: skip
    return Sample(**(values | changes))


class FakeClient:
    """Answers every prompt with ``answer 1``; notes the calls and may break after some."""

    def __init__(self, breaks_after: int | None = None, info: Mapping[str, Any] = NOTHING) -> None:
        self._info = info
        self.calls: list[tuple[str, int]] = []
        self.requests: list[Mapping[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self._breaks_after = breaks_after

    async def generate(
        self,
        prompt: str,
        sampling_params: dict[str, Any],
        n: int,
        request: Mapping[str, Any] = NOTHING,
    ) -> list[Generation]:
        self.requests.append(request)
        self.calls.append((prompt, 0 if sampling_params["max_new_tokens"] == 0 else n))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        if self._breaks_after is not None and self.sampled > self._breaks_after:
            raise RuntimeError("broken")
        return [Generation("answer 1", 100, 5, 10, "stop") for _ in range(n)]

    @property
    def sampled(self) -> int:
        return sum(n > 0 for _, n in self.calls)

    def info(self) -> dict[str, Any]:
        reads = 100 * self.sampled
        stats = PATTERNKV | {"kv_reads": 50 + reads, "kv_reads_shared": 10 + reads // 2}
        return STOCK | {"internal_states": [{"patternkv": stats}]} | self._info

    def run(self, work: Any) -> Any:
        return asyncio.run(work)

    def close(self) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    """Speaks as much of SGLang's native protocol as the recipe uses.

    ``answers`` has more paths: what a GET gives, or a function of what a POST brings.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.bodies: list[dict[str, Any]] = []
        self.info: dict[str, Any] = STOCK
        self.reply: Callable[[dict[str, Any]], tuple[int, Any]] = self.answer
        self.answers: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        meta = {"prompt_tokens": 9, "cached_tokens": 2, "completion_tokens": 3}
        meta |= {"finish_reason": {"type": "stop"}}
        n = body["sampling_params"]["n"]
        items = [{"text": f" answer {i % 2}", "meta_info": meta} for i in range(n)]
        return 200, items if n > 1 else items[0]


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A fake server that answers until the end."""
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever)
        thread.start()
        try:
            yield fake
        finally:
            fake.shutdown()
            thread.join()


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        answers = {"/server_info": self.server.info} | self.server.answers
        self._send(200 if self.path in answers else 404, answers.get(self.path))

    def do_POST(self) -> None:
        body = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.path in self.server.answers:
            self._send(200, self.server.answers[self.path](body))
        else:
            self._send(*(self.server.reply(body) if self.path == "/generate" else (404, {})))

    def _send(self, status: int, content: Any) -> None:
        payload = orjson.dumps(content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass
