"""Fixtures that start SGLang; slow test modules load this file as a pytest plug-in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.answers import greedy
from tests.engines import EngineRun
from tests.models import make_model, make_tokenizer
from tests.servers import DEMO, PATTERNKV, Launcher, Model, Server, environment

# Of the engines below.
CHUNK = 128  # chunked_prefill_size
LENGTHS = [1, 2, 127, 128, 129, 255, 256, 257, 500, 640]  # prompt tokens
BRANCHES, BRANCHED_PROMPT = 4, 300


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo model, or a tiny random one in a checkout without it."""
    if (DEMO / "config.json").exists():
        return Model.load(DEMO)
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    make_tokenizer(folder)
    return Model.load(folder)


@pytest.fixture(scope="session")
def launcher(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(model, tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.stop()


@pytest.fixture
def patternkv_server(launcher: Launcher) -> Iterator[Server]:
    """``--kv-quant patternkv`` at 4 bits with an empty cache; must be sound after every test."""
    server = launcher.server(PATTERNKV)
    server.flush()
    yield server
    server.check()


@pytest.fixture(scope="session")
def engines(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What three engines answered to greedy prompts of `LENGTHS`, with input logprobs.

    ``patternkv``: 4:2 bits, no prefix ever matched; its prompts come twice, then one with branches.
    ``plugged``: the plug-in is installed but ``kv_quant`` is not given.
    ``stock``: without the plug-in, in a process that SGLang loads nothing of ours into but the CPU
    platform.
    """
    kwargs = {
        "model_path": str(model.path),
        "device": "cpu",
        "dtype": "bfloat16",
        "mem_fraction_static": 0.6,
        "max_total_tokens": 8192,
        "chunked_prefill_size": CHUNK,
        "random_seed": 0,
        "log_level": "warning",
    }
    quantized = {
        "kv_quant": "patternkv",
        "kv_quant_bits": "4:2",
        "kv_quant_check": True,
        "kv_quant_tables": 64,
    }

    def body(num_tokens: int, **params: Any) -> dict[str, Any]:
        request = greedy(model.prompt(num_tokens, num_tokens), **params)
        return {"prompt": request.pop("text"), "logprob_start_len": 0, **request}

    prompts = [body(length) for length in LENGTHS]
    dense = {"kwargs": kwargs, "environment": {}, "requests": prompts}
    patternkv = {
        "kwargs": kwargs | quantized | {"kv_quant_mine_tokens": CHUNK // 2},
        "environment": {"SGLANG_RADIX_FORCE_MISS": "1"},
        "requests": [*prompts, *prompts, body(BRANCHED_PROMPT, n=BRANCHES)],
    }
    ours = EngineRun([patternkv, dense], tmp_path_factory.mktemp("ours"), environment())
    stock = EngineRun(
        [dense], tmp_path_factory.mktemp("stock"), environment(SGLANG_PLUGINS="patternkv_cpu")
    )
    names = ("stock", "patternkv", "plugged")
    return dict(zip(names, stock.results() + ours.results(), strict=True))
