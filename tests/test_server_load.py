"""``sglang serve`` with a YAML file, in a pool that is too small, under forced retraction.

The server itself asserts after every release that the tables of all slots are those that their
owners name (``kv-quant-check``), and SGLang that no slot is lost (strict memory checks).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.answers import cached, greedy, outputs
from tests.servers import SERVE, Launcher, Model, Server, Spec

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

PAGE, CHUNK, CAPACITY, TABLES = 16, 48, 1024, 5
CONFIGURATION = {
    "kv-quant": "patternkv",
    "kv-quant-bits": 2,
    "kv-quant-mine-tokens": 32,
    "kv-quant-patterns": 32,
    "kv-quant-window": 8,
    "kv-quant-tables": TABLES,
    "kv-quant-check": True,
    "page-size": PAGE,
    "chunked-prefill-size": CHUNK,
    "max-total-tokens": CAPACITY,
    "max-running-requests": 16,
}
ENVIRONMENT = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "29",
    # Admit more requests than will fit, so that the pool fills up while they decode.
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "4",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
PROBES = [(30, 40), (31, 150), (32, 203)]  # seed, tokens
REQUESTS, THREADS = 48, 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "server.yaml"
    path.write_text(yaml.safe_dump(CONFIGURATION))
    return path


@pytest.fixture
def server(launcher: Launcher, config: Path) -> Iterator[Server]:
    """The server with an empty cache; must be sound after every test."""
    server = launcher.server(Spec(SERVE, ("--config", str(config)), (*ENVIRONMENT.items(),)))
    server.flush()
    yield server
    server.check()


def test_the_yaml_file_is_honoured(server: Server) -> None:
    stats = server.stats()
    assert stats["bits"] == "2/2"
    assert (stats["patterns"], stats["window"], stats["mine_tokens"]) == (32, 8, 32)
    assert (stats["table_slots"], stats["kv_tokens"]) == (TABLES - 1, CAPACITY)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 18, 47, 48, 49, 95, 96, 97, 98, 200])
def test_prompts_around_edges_of_pages_and_chunks(
    server: Server, model: Model, length: int
) -> None:
    text = model.prompt(length, length)
    cold, warm, again = (server.generate(text, 20) for _ in range(3))
    # The last token is prefilled again, and pages are shared whole.
    pages = (length - 1) // PAGE * PAGE
    assert [cached(answer) for answer in (cold, warm, again)] == [0, pages, pages]
    assert outputs(warm) == outputs(again)
    # Nothing differs where a warm prompt starts from the first token, as a cold one does.
    if not pages:
        assert outputs(warm) == outputs(cold)
    idle = server.settle()
    assert idle["tables_live"] <= TABLES - 1


def load(server: Server, model: Model, seed: int) -> list[dict[str, Any]]:
    """One random request: a shared stem, a private tail, sometimes two branches or an abort."""
    rng = random.Random(seed)
    stem = model.prompt(rng.choice([64, 150, 210]), 40 + rng.randrange(3))
    tail = model.prompt(rng.randrange(1, 60), 1000 + seed)
    num_tokens = rng.choice([16, 60, 150])
    if seed % 8 == 0:
        body = greedy(f"{stem} {tail}", 400) | {"stream": True}
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as stream:
            next(stream.iter_lines())
        return []
    n = 2 if seed % 5 == 0 else 1
    answer = server.generate(f"{stem} {tail}", num_tokens, n=n, temperature=0.8)
    answers = answer if n > 1 else [answer]
    for one in answers:
        assert one["meta_info"]["finish_reason"] == {"type": "length", "length": num_tokens}
        assert len(outputs(one)) == num_tokens
    return answers


def test_a_full_pool_serves_every_request_and_gives_everything_back(
    server: Server, model: Model
) -> None:
    before = [outputs(server.generate(model.prompt(length, seed), 32)) for seed, length in PROBES]
    server.flush()
    start = len(server.text())
    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(load, server, model, seed) for seed in range(REQUESTS)]
        answers = [answer for call in calls for answer in call.result()]
    assert any(cached(answer) for answer in answers)
    log = server.text()[start:]
    assert "KV cache pool is full. Retract requests." in log
    assert "Testing retraction." in log
    stats = server.settle()
    assert stats["tables_exhausted"] > 0
    assert stats["tables_live"] <= TABLES - 1

    server.flush()
    empty = server.stats()
    assert (empty["tables_live"], empty["table_refs"]) == (0, 1)
    after = [outputs(server.generate(model.prompt(length, seed), 32)) for seed, length in PROBES]
    assert after == before
