"""Two ranks: tensor parallel over gloo on the CPU or NCCL on GPUs, and data parallel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch

from recipes.config import TaskConfig
from recipes.problems import load_problems
from tests.answers import assert_close, cached
from tests.servers import DEMO, LAUNCH_SERVER, STOP_SECONDS, Launcher, Model, Server, Spec

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

PROMPT, BRANCHES, TOKENS = 300, 8, 24
ARGUMENTS = (
    *("--kv-quant", "patternkv", "--kv-quant-check", "--enable-metrics"),
    *("--max-total-tokens", "8192", "--max-running-requests", "32"),
    *("--kv-quant-tables", "64"),
)
GPU_BITS = ("4", "2")
# Nats between answers of one rank and of two, which round otherwise: 0.02 on the CPU.
SHARDED = 0.25
# SGLang's own all-reduce is compiled at start-up, and NVLink multicast belongs to the whole host:
# the ranks' sums need neither.
NCCL_ALONE = (("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"), ("NCCL_NVLS_ENABLE", "0"))


def serve(launcher: Launcher, *arguments: str) -> Server:
    spec = Spec(LAUNCH_SERVER, (*ARGUMENTS, "--kv-quant-bits", "4:2", *arguments))
    server = launcher.server(spec)
    server.flush()
    return server


@pytest.fixture
def tensor_parallel(launcher: Launcher) -> Iterator[Server]:
    server = serve(launcher, "--tp", "2")
    yield server
    server.check()


@pytest.fixture
def data_parallel(launcher: Launcher) -> Iterator[Server]:
    server = serve(launcher, "--dp", "2")
    yield server
    server.check()


@pytest.fixture(scope="module")
def gpu_servers(
    model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[int, str], Server]]:
    """Servers by number of GPUs and bits, started side by side."""
    logs = tmp_path_factory.mktemp("gpus")
    keys = list(product((1, 2), GPU_BITS))
    with ExitStack() as stack:

        def start(key: tuple[int, str]) -> Server:
            ranks, bits = key
            arguments = ("--tp", str(ranks), "--kv-quant-bits", bits, "--disable-custom-all-reduce")
            spec = Spec(LAUNCH_SERVER, (*ARGUMENTS, *arguments), NCCL_ALONE)
            server = Server(spec, model, logs / f"{ranks}x{bits}.log")
            stack.callback(server.stop)
            return server

        with ThreadPoolExecutor() as pool:
            servers = dict(zip(keys, pool.map(start, keys), strict=True))
        yield servers


def check_ranks(server: Server, model: Model) -> None:
    """Assert that two ranks hold shards, share prompts, and agree on tokens and tables."""
    server.flush()
    assert len(server.get("server_info").json()["internal_states"]) == 1
    before = server.stats()
    answers = server.generate(model.prompt(PROMPT, 50), TOKENS, n=BRANCHES, temperature=0.8)
    assert [cached(answer) for answer in answers] == [PROMPT - 1] * BRANCHES
    # A second prompt without sharing, so that ranks decide about tables more than once.
    server.generate(model.prompt(PROMPT, 51), TOKENS)
    after = server.settle()
    assert after["tables_mined"] - before["tables_mined"] == 2
    assert after["tables_live"] == 2
    assert after["max_branches"] == BRANCHES

    def idle() -> bool:
        return not any(shown["running_requests"] for shown in server.gauges().values())

    # Each rank ends requests in its own time.
    server.wait(idle, STOP_SECONDS, "idle on every rank")
    first, second = server.gauges().values()
    # All that a rank decides by; of the logits each measures heads of its own.
    del first["logit_error_percent"], second["logit_error_percent"]
    assert first == second
    # Each of the two start-up lines reports the shard of its rank.
    lines = re.findall(r"PatternKV cache: .* (\d+) bytes per token against (\d+)", server.text())
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0][1] == str(after["bf16_bytes_per_token"])


def greedy_answers(server: Server) -> list[dict[str, Any]]:
    """To problems over a stored context, each prefilled and then found in the cache.

    The model was trained on such: random words leave it so unsure that rounding is worth several
    nats.
    """
    task = load_problems(TaskConfig(model=str(DEMO), num_problems=6, level="demo"))
    server.generate(task.shared_prompt(task.problems[0]), 1)
    texts = [task.prompt(problem) for problem in task.problems]
    return [server.generate(text, TOKENS) for text in texts for _ in range(2)]


def test_tensor_parallel_ranks_hold_shards_and_agree(tensor_parallel: Server, model: Model) -> None:
    check_ranks(tensor_parallel, model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.skipif(not (DEMO / "config.json").exists(), reason="needs the demo model")
@pytest.mark.parametrize("bits", GPU_BITS)
def test_two_gpus_answer_as_one(
    gpu_servers: dict[tuple[int, str], Server], bits: str, model: Model
) -> None:
    one, two = (gpu_servers[ranks, bits] for ranks in (1, 2))
    pairs = zip(greedy_answers(one), greedy_answers(two), strict=True)
    for alone, sharded in pairs:
        assert cached(alone) == cached(sharded)
        assert_close(alone, sharded, SHARDED)
    check_ranks(two, model)


def test_data_parallel_ranks_count_for_themselves(data_parallel: Server, model: Model) -> None:
    server = data_parallel
    ranks = range(2)
    before = [server.stats(rank) for rank in ranks]
    text = model.prompt(PROMPT, 52)
    answers = server.generate(text, TOKENS, n=BRANCHES, temperature=0.8)
    assert len(answers) == BRANCHES
    after = [server.settle(rank) for rank in ranks]
    # Branches are dealt in turn, so each rank prefills the prompt itself. Those that reach a rank
    # while it still prefills may mine once more, and end up on the slots of the first.
    for rank in ranks:
        mined = after[rank]["tables_mined"] - before[rank]["tables_mined"]
        assert 1 <= after[rank]["tables_live"] <= mined <= BRANCHES // 2
        assert after[rank]["kv_reads_shared"] > before[rank]["kv_reads_shared"]
        assert 2 <= after[rank]["max_branches"] < BRANCHES
