"""Two ranks on the CPU: tensor parallel over gloo, and data parallel."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.answers import cached
from tests.servers import LAUNCH_SERVER, Launcher, Model, Server, Spec

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

PROMPT, BRANCHES, TOKENS = 300, 8, 24
ARGUMENTS = (
    *("--kv-quant", "patternkv", "--kv-quant-bits", "4:2", "--kv-quant-check"),
    *("--max-total-tokens", "8192", "--max-running-requests", "32"),
    *("--kv-quant-tables", "64"),
)


def serve(launcher: Launcher, *arguments: str) -> Server:
    server = launcher.server(Spec(LAUNCH_SERVER, (*ARGUMENTS, *arguments)))
    server.flush()
    return server


@pytest.fixture
def tensor_parallel(launcher: Launcher) -> Iterator[Server]:
    server = serve(launcher, "--tp", "2", "--enable-metrics")
    yield server
    server.check()


@pytest.fixture
def data_parallel(launcher: Launcher) -> Iterator[Server]:
    server = serve(launcher, "--dp", "2")
    yield server
    server.check()


def test_tensor_parallel_ranks_hold_shards_and_agree(tensor_parallel: Server, model: Model) -> None:
    server = tensor_parallel
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
    # Each of the two start-up lines reports the shard of its rank.
    lines = re.findall(r"PatternKV cache: .* (\d+) bytes per token against (\d+)", server.text())
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0][1] == str(after["bf16_bytes_per_token"])


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
