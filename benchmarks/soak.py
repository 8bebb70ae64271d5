"""Hours of mixed load on one server: nothing may leak, drift or change.

    python -m benchmarks.soak --minutes 30 --model recipes/demo/model --out soak.jsonl \\
        -- --max-total-tokens 100000

What follows ``--`` are more arguments of ``sglang.launch_server``. The load runs in rounds. After
each the server must be idle, give every token and table back, hold no more memory than after the
second round, and answer the pinned greedy probes as it did at first. ``--kill-in N`` kills it
under load in round N and starts it again. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.rows import Row
from benchmarks.server_process import ServerProcess
from benchmarks.soak_load import Load, Scale
from recipes.environment import git_commit, hardware, versions

PROBES = 5
PROBE_TOKENS = 48
IDLE_SECONDS = 120
SETTLED_ROUND = 2
"""Round whose memory later ones are compared with: by then every path has run."""
CRASHES = ("Traceback (most recent call last)", "AssertionError", "memory leak detected")
# Retract requests that run, and admit more than fit, so that the pool overflows too.
STRESS = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "97",
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (%(default)s)")
    parser.add_argument("--round-seconds", type=float, default=60.0, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="at least (%(default)s)")
    parser.add_argument("--model", help="model folder")
    parser.add_argument("--bits", default="4", help="--kv-quant-bits (%(default)s)")
    parser.add_argument("--base-url", help="soak this server instead of one of its own")
    parser.add_argument("--kill-in", type=int, metavar="N", help="kill it once, in round N")
    parser.add_argument("--concurrency", type=int, default=48, help="requests (%(default)s)")
    parser.add_argument("--stem", type=int, default=1024, help="longest shared prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="most of a usual request")
    parser.add_argument("--branches", type=int, default=12, help="most of one prompt")
    parser.add_argument(
        "--drift-mib", type=float, default=256.0, help="growth of memory allowed (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, a row per round")
    parser.add_argument("server", nargs="*", metavar="-- ARGUMENT", help="of the server")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.base_url is None):
        parser.error("name either --model or --base-url")
    if args.base_url and (args.kill_in or args.server):
        parser.error("--base-url: only a server of its own is killed or takes arguments")
    return args


class Soak:
    """One server under load, and what is known of it.

    Args:
        args: see `parse_args`.
        log: the server's.
    """

    def __init__(self, args: argparse.Namespace, log: Path) -> None:
        self._args, self._log = args, log
        self._process: ServerProcess | None = None
        self.url = args.base_url
        if self.url is None:
            self.start()
        info = self._get("model_info")
        self._scale = Scale(
            vocab_size=self._vocab_size(info["model_path"]),
            stem=args.stem,
            tail=max(1, args.stem // 4),
            new_tokens=args.new_tokens,
            branches=args.branches,
        )
        self._seed = 0
        self._first_probes: list[list[int]] | None = None
        self._settled: dict[str, float] = {}

    def start(self) -> None:
        arguments = [
            *("--model-path", self._args.model, "--dtype", "bfloat16", "--skip-tokenizer-init"),
            *("--kv-quant", "patternkv", "--kv-quant-bits", self._args.bits, "--kv-quant-check"),
            *("--grammar-backend", "none", "--random-seed", "0", *self._args.server),
        ]
        self._process = ServerProcess(arguments, self._log, STRESS)
        self.url = self._process.url

    def stop(self) -> list[str]:
        """End the server. What is wrong with how it ended."""
        if self._process is None:
            return []
        code = self._process.stop()
        return [] if code == 0 else [f"the server ended with {code}: {self._process.tail()}"]

    def round(self, number: int) -> Row:
        """Load, then a check of the idle server; ``problems`` says what was wrong."""
        start = time.monotonic()
        load = Load(self.url, self._scale, self._args.concurrency, self._seed)
        time.sleep(self._args.round_seconds)
        killed = self._process is not None and number == self._args.kill_in
        busy = self._stats()
        if killed:
            assert self._process is not None
            load.abandon()
            self._process.kill()
        load.stop()
        seconds = time.monotonic() - start
        self._seed = load.next_seed
        if killed:
            self.start()
        problems = [*load.problems[:20], *self._check_idle()]
        memory = self._memory()
        if number == SETTLED_ROUND or killed:
            self._settled = memory
        problems += self._check_memory(memory)
        return {
            "round": number,
            "seconds": seconds,
            "killed": killed,
            "done": dict(load.done),
            "samples_per_minute": 60 * load.samples / seconds,
            "tok_s": load.new_tokens / seconds,
            "busy": busy,
            "memory_mib": memory,
            "problems": problems,
        }

    def _check_idle(self) -> list[str]:
        limit = time.monotonic() + IDLE_SECONDS
        while self._stats()["running_requests"]:
            if time.monotonic() > limit:
                return [f"requests still run {IDLE_SECONDS} s after the last answer"]
            time.sleep(0.2)
        self._flush()
        empty, problems = self._stats(), []
        if empty["kv_tokens_free"] != empty["kv_tokens"]:
            problems.append(
                f"{empty['kv_tokens'] - empty['kv_tokens_free']} tokens are not free when flushed"
            )
        if (empty["tables_live"], empty["table_refs"]) != (0, 1):
            problems.append(
                f"{empty['tables_live']} tables live with {empty['table_refs']} references when "
                "flushed, expected 0 with 1"
            )
        probes = self._probe()
        self._first_probes = self._first_probes or probes
        changed = sum(a != b for a, b in zip(probes, self._first_probes, strict=True))
        if changed:
            problems.append(f"{changed} of {len(probes)} pinned probes answer otherwise than first")
        if self._process is not None:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            problems += [f"{crash!r} in the server's log" for crash in CRASHES if crash in text]
        return problems

    def _probe(self) -> list[list[int]]:
        """Greedy answers to pinned prompts, each prefilled and then found in the cache."""
        answers = []
        self._flush()
        for index in range(PROBES):
            length = 1 + index * self._scale.stem // (PROBES - 1)
            ids = random.Random(f"probe {index}").choices(range(self._scale.vocab_size), k=length)
            params = {"temperature": 0.0, "max_new_tokens": PROBE_TOKENS, "ignore_eos": True}
            for _ in range(2):
                answer = self._post("generate", {"input_ids": ids, "sampling_params": params})
                answers.append(answer["output_ids"])
        self._flush()
        return answers

    def _check_memory(self, memory: dict[str, float]) -> list[str]:
        return [
            f"{name} grew from {settled:.0f} to {memory[name]:.0f} MiB, more than "
            f"{self._args.drift_mib:g} MiB"
            for name, settled in self._settled.items()
            if memory[name] - settled > self._args.drift_mib
        ]

    def _memory(self) -> dict[str, float]:
        """MiB that the server holds: of the GPU, and of each process's main memory together."""
        stats = self._stats()
        names = ("device_bytes", "device_bytes_reserved", "device_bytes_peak")
        memory = {name: stats[name] / 2**20 for name in names if name in stats}
        if self._process is not None:
            parent = psutil.Process(self._process.pid)
            family = [parent, *parent.children(recursive=True)]
            memory["resident"] = sum(process.memory_info().rss for process in family) / 2**20
        return memory

    def _stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self._get("server_info")["internal_states"][0]["patternkv"]
        return stats

    def _flush(self) -> None:
        self._post("flush_cache?timeout=30", None, is_json=False)

    def _get(self, path: str) -> Any:
        response = requests.get(f"{self.url}/{path}", timeout=IDLE_SECONDS)
        response.raise_for_status()
        return response.json()

    def _post(self, path: str, body: Any, *, is_json: bool = True) -> Any:
        response = requests.post(f"{self.url}/{path}", json=body, timeout=IDLE_SECONDS)
        response.raise_for_status()
        return response.json() if is_json else None

    @staticmethod
    def _vocab_size(model_path: str) -> int:
        config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"])


def line(row: Row) -> str:
    memory = ", ".join(f"{name} {mib:.0f}" for name, mib in row["memory_mib"].items())
    return (
        f"round {row['round']}{' (killed)' if row['killed'] else ''}: {sum(row['done'].values())} "
        f"requests, {row['samples_per_minute']:.0f} samples/min, {row['tok_s']:.0f} tok/s; MiB: "
        f"{memory or '–'}; {len(row['problems'])} problems"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    made_with = {**hardware(), "versions": versions(), "commit": git_commit()}
    log = Path(tempfile.mkdtemp(prefix="soak-")) / "server.log"
    soak = Soak(args, log)
    problems: list[str] = []
    try:
        with args.out.open("w", encoding="utf-8") as file:
            end = time.monotonic() + 60 * args.minutes
            number = 0
            while number < args.rounds or time.monotonic() < end:
                number += 1
                row = soak.round(number)
                print(json.dumps(row | made_with), file=file, flush=True)
                print("\n".join([line(row), *row["problems"]]), flush=True)
                problems += row["problems"]
    except (requests.RequestException, RuntimeError) as error:
        problems.append(f"the server is gone: {error}")
        print(problems[-1], flush=True)
    finally:
        problems += soak.stop()
    verdict = f"FAILED: {len(problems)} problems; log: {log}" if problems else "passed"
    print(f"{number} rounds: {verdict}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
