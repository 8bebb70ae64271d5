"""Real SGLang servers for the tests: a model, start and stop, stats, and what must hold of a log.

One server runs at a time; tests that ask for the same one share it, so the modules of such tests
are neighbours in alphabetical order.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.answers import greedy

DEMO = Path(__file__).parents[1] / "recipes" / "demo" / "model"
START_SECONDS = 600  # three imports of SGLang on a busy machine
STOP_SECONDS = 60
REQUEST_SECONDS = 120
TAIL_LINES = 60
CRASHES = ("Traceback", "AssertionError", "memory leak detected")
GAUGE = re.compile(r"^sglang:patternkv_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
# The share of memory leaves room for what other processes take while a server starts; each test
# caps the pool with --max-total-tokens.
COMMON = (
    *("--dtype", "bfloat16", "--mem-fraction-static", "0.6", "--random-seed", "0"),
    "--sleep-on-idle",
)

LAUNCH_SERVER = (sys.executable, "-m", "sglang.launch_server")
SERVE = (str(Path(sys.executable).parent / "sglang"), "serve")


@dataclass(frozen=True)
class Model:
    """A model folder whose tokenizer has one token per word."""

    path: Path
    words: list[str]

    @classmethod
    def load(cls, path: Path) -> Model:
        vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        return cls(path, sorted(word for word in vocabulary if not word.startswith("<")))

    def prompt(self, num_tokens: int, seed: int) -> str:
        """``num_tokens`` random words; a shorter prompt of the same seed is a prefix."""
        return " ".join(random.Random(seed).choices(self.words, k=num_tokens))


def environment(**extra: str) -> dict[str, str]:
    """The environment of a test's subprocess: CPU defaults and ``extra``."""
    defaults = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **defaults, **extra}


def tail(log: Path) -> str:
    """The end of a log, for failure messages."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Spec:
    """How a server is started; equal specs share one server."""

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


PATTERNKV = Spec(
    LAUNCH_SERVER,
    (
        *("--kv-quant", "patternkv", "--kv-quant-bits", "4", "--kv-quant-check"),
        *("--enable-metrics", "--max-total-tokens", "20000", "--kv-quant-tables", "64"),
    ),
)


class Server:
    """A server process on loopback, ready to serve.

    Raises:
        AssertionError: it did not become ready; shows the end of its log.
    """

    def __init__(self, spec: Spec, model: Model, log: Path) -> None:
        self.spec, self.log = spec, log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        address = ["--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen(
            [*spec.command, "--model-path", str(model.path), *COMMON, *address, *spec.arguments],
            env=environment(**dict(spec.environment)),
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.wait(self._healthy, START_SECONDS, "ready")
        except BaseException:
            self._kill()
            raise

    def _healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=10).ok
        except requests.RequestException:
            return False

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll until ``condition``; fail with the log when the server ends or time is up."""
        limit = time.monotonic() + seconds
        while not condition():
            code = self._process.poll()
            assert code is None, f"the server ended with {code}:\n{tail(self.log)}"
            assert time.monotonic() < limit, f"not {what} in {seconds} s:\n{tail(self.log)}"
            time.sleep(0.2)

    def check(self) -> None:
        """Assert that the server lives and that nothing crashed in any of its processes."""
        self.wait(self._healthy, STOP_SECONDS, "healthy")
        found = [crash for crash in CRASHES if crash in self.text()]
        assert not found, f"{found} in the log:\n{tail(self.log)}"

    def stop(self) -> None:
        """End the server as a user would and assert that it ends well."""
        try:
            self.check()
            # The main process alone: it ends the others, and a signal to them would look like a
            # crash to its watchdog.
            self._process.send_signal(signal.SIGTERM)
            code = self._process.wait(STOP_SECONDS)
            assert code == 0, f"the server ended with {code}:\n{tail(self.log)}"
        finally:
            self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    # Requests

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> requests.Response:
        return requests.get(f"{self.url}/{path}", timeout=REQUEST_SECONDS)

    def post(self, path: str, body: Any = None) -> requests.Response:
        return requests.post(f"{self.url}/{path}", json=body, timeout=REQUEST_SECONDS)

    def generate(self, text: str | list[str], num_tokens: int = 16, **params: Any) -> Any:
        """Answer of a `greedy` request; a list of them for ``n`` > 1 or several texts."""
        response = self.post("generate", greedy(text, num_tokens, **params))
        assert response.ok, f"HTTP {response.status_code}: {response.text}"
        return response.json()

    def stats(self, rank: int = 0) -> dict[str, Any]:
        """The PatternKV numbers of one data-parallel rank."""
        stats: dict[str, Any] = self.get("server_info").json()["internal_states"][rank]["patternkv"]
        return stats

    def gauges(self) -> dict[str, dict[str, float]]:
        """The PatternKV numbers that Prometheus shows of each rank, by the labels of the rank."""
        found: dict[str, dict[str, float]] = {}
        for name, labels, value in GAUGE.findall(self.get("metrics").text):
            found.setdefault(labels, {})[name] = float(value)
        return found

    def flush(self) -> None:
        response = self.post("flush_cache?timeout=30")
        assert response.ok, response.text

    def settle(self, rank: int = 0) -> dict[str, Any]:
        """Stats of a rank once no request holds a table any more."""
        self.wait(lambda: self.stats(rank)["running_requests"] == 0, STOP_SECONDS, "idle")
        return self.stats(rank)


class Launcher:
    """Starts servers and keeps the last one for the next test that asks for it."""

    def __init__(self, model: Model, logs: Path) -> None:
        self._model, self._logs = model, logs
        self._server: Server | None = None
        self._started = 0
        self._failed: dict[Spec, AssertionError] = {}

    def server(self, spec: Spec) -> Server:
        """The server of ``spec``; one that failed to start is not tried again."""
        if spec in self._failed:
            raise self._failed[spec]
        if self._server is None or self._server.spec != spec:
            self.stop()
            self._started += 1
            log = self._logs / f"server{self._started}.log"
            try:
                self._server = Server(spec, self._model, log)
            except AssertionError as error:
                self._failed[spec] = error
                raise
        return self._server

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.stop()
