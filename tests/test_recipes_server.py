"""The best-of-n recipe: what engines and servers are asked, and what is read from their answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from recipes.best_of_n import main
from recipes.cache import CacheInfo
from recipes.config import RunConfig
from recipes.engines import ServerClient, check_sampling, check_variant, engine_args
from recipes.variant import Variant
from tests.recipe_fakes import (
    PATTERNKV,
    STOCK,
    FakeClient,
    FakeServer,
    config_of,
    serving,
    write_model_config,
)


def test_variant_bits_reach_the_engine(tmp_path: Path) -> None:
    config = config_of(tmp_path, engine_args={"kv_quant_window": 8, "page_size": 16})
    quantized = engine_args(config, Variant.parse("4/2"), seed=3)
    assert quantized["kv_quant"] == "patternkv"
    assert quantized["kv_quant_bits"] == "4:2"
    assert (quantized["kv_quant_window"], quantized["random_seed"]) == (8, 3)
    plain = engine_args(config, Variant.parse("bf16"), seed=3)
    assert not [name for name in plain if name.startswith("kv_quant")]
    assert plain["page_size"] == 16


def test_an_engine_with_another_cache_is_refused() -> None:
    check_variant(Variant.parse("bf16"), STOCK)
    check_variant(Variant.parse("4/4"), STOCK | {"internal_states": [{"patternkv": PATTERNKV}]})
    with pytest.raises(RuntimeError, match="stores KV as bf16, not as 2/2"):
        check_variant(Variant.parse("2/2"), STOCK)
    check_sampling(STOCK, 8)
    with pytest.raises(RuntimeError, match="same random numbers"):
        check_sampling(STOCK | {"enable_deterministic_inference": True}, 8)


def test_cache_of_a_stock_engine(tmp_path: Path) -> None:
    write_model_config(tmp_path)
    cache = CacheInfo.parse(STOCK | {"model_path": str(tmp_path)})
    assert (cache.variant, cache.bytes_per_token, cache.kv_tokens) == ("bf16", 512, 1000)
    assert (cache.tables_live, cache.kv_reads) == (None, None)
    fp8 = CacheInfo.parse(STOCK | {"model_path": str(tmp_path), "kv_cache_dtype": "fp8_e4m3"})
    assert (fp8.variant, fp8.bytes_per_token, fp8.bf16_bytes_per_token) == ("fp8", 256, 512)
    assert CacheInfo.parse(STOCK).bytes_per_token is None


def test_cache_of_patternkv_sums_over_data_parallel_ranks() -> None:
    states = [{"patternkv": PATTERNKV}, {"patternkv": PATTERNKV | {"kv_reads": 11}}]
    cache = CacheInfo.parse(STOCK | {"internal_states": states})
    assert (cache.variant, cache.bytes_per_token) == ("4/4", 144)
    assert (cache.kv_tokens, cache.tables_live, cache.kv_reads) == (7000, 6, 111)
    start = CacheInfo.parse(STOCK | {"internal_states": states[:1]})
    assert cache.since(start)["kv_reads"] == 11
    assert start.since(start)["tables_mined"] == 0


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


def test_server_client_speaks_the_native_protocol(server: FakeServer, tmp_path: Path) -> None:
    client = ServerClient(config_of(tmp_path, base_url=server.url + "/"))
    assert client.info()["version"] == "0.5.23"
    four = client.run(client.generate("hello", {"temperature": 0.5}, 4))
    assert [item.text for item in four] == [" answer 0", " answer 1"] * 2
    assert (four[0].completion_tokens, four[0].cached_tokens, four[0].finish_reason) == (
        3,
        2,
        "stop",
    )
    assert server.bodies == [{"text": "hello", "sampling_params": {"temperature": 0.5, "n": 4}}]
    assert len(client.run(client.generate("hello", {}, 1))) == 1
    client.close()


def test_server_errors_are_told(server: FakeServer, tmp_path: Path) -> None:
    client = ServerClient(config_of(tmp_path, base_url=server.url))
    server.reply = lambda body: (400, {"error": "too long"})
    with pytest.raises(RuntimeError, match=r"/generate: HTTP 400: .*too long"):
        client.run(client.generate("hello", {}, 2))
    meta: dict[str, Any] = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 0}
    meta["finish_reason"] = {"type": "abort", "message": "out of memory"}
    server.reply = lambda body: (200, {"text": "", "meta_info": meta})
    with pytest.raises(RuntimeError, match="aborted a request: out of memory"):
        client.run(client.generate("hello", {}, 1))
    client.close()


def test_no_server_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base-url", "http://127.0.0.1:9", "--output", str(tmp_path)]
    assert main(arguments) == 1
    assert "is an SGLang server running there?" in capsys.readouterr().err


def test_plots_need_a_package_before_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--base-url", "http://127.0.0.1:9", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: plots need matplotlib, which does not import (")
    assert line.endswith("in a checkout by pip install '.[demo]'")


def test_best_of_n_against_servers(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_model_config(model)
    server.info = STOCK | {"model_path": str(model)}
    arguments = [
        "--base-url",
        server.url,
        "--output",
        str(tmp_path / "results"),
        "--num-problems",
        "4",
    ]
    arguments += ["--n", "4", "--questions-per-context", "2"]
    assert main(arguments) == 0
    assert "4 problems, 4 samples each" in capsys.readouterr().out
    (folder,) = (tmp_path / "results").iterdir()
    lines = (folder / "samples-bf16.jsonl").read_bytes().splitlines()
    assert len(lines) == 16
    first = orjson.loads(lines[0])
    assert (first["seed"], first["answer"], first["cached_tokens"]) == (7, "0", 2)
    metrics = orjson.loads((folder / "metrics.json").read_bytes())
    assert metrics["config"]["model"] == str(model)
    row = metrics["variants"]["bf16"]
    assert row["origin"]["versions"]["sglang"] == "0.5.23"
    assert set(row["maj_at_k"]) == {"1", "2", "4"}
    assert (row["kv_tokens"], row["decoded_tokens"], row["partial"]) == (1000, 48, False)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    asked = len(server.bodies)
    assert main(arguments) == 0
    assert len(server.bodies) == asked

    server.info = server.info | {"internal_states": [{"patternkv": PATTERNKV}]}
    assert main(arguments) == 0
    assert len(server.bodies) == 2 * asked
    metrics = orjson.loads((folder / "metrics.json").read_bytes())
    assert list(metrics["variants"]) == ["bf16", "4/4"]
    assert "3,500 (3.50×)" in capsys.readouterr().out


class FakeEngine(FakeClient):
    """Stands for ``EngineClient``; there is no fp8 on this machine, and no 2/2 either."""

    def __init__(self, config: RunConfig, variant: Variant, seed: int) -> None:
        super().__init__()
        if variant.name in ("fp8", "2/2"):
            raise RuntimeError(f"no {variant.name} here")


def test_fp8_is_left_out_where_it_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recipes.best_of_n.EngineClient", FakeEngine)
    options = ["--model", "m", "--output", str(tmp_path), "--num-problems", "2", "--n", "2"]
    assert main([*options, "--variants", "fp8", "4/4"]) == 0
    assert "==> fp8: left out: no fp8 here" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    metrics = orjson.loads((folder / "metrics.json").read_bytes())
    assert (list(metrics["variants"]), metrics["skipped"]) == (["4/4"], {"fp8": "no fp8 here"})
    assert main([*options, "--variants", "4/4", "2/2"]) == 1
    assert "error: no 2/2 here" in capsys.readouterr().err
    assert main([*options, "--variants", "fp8"]) == 1
    assert "no variant could run" in capsys.readouterr().err


def test_a_finished_run_is_no_other_servers(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--base-url", server.url, "--output", str(tmp_path), "--num-problems", "2"]
    assert main([*options, "--n", "2"]) == 0
    server.info = STOCK | {"version": "0.5.24"}
    assert main([*options, "--n", "2"]) == 1
    assert "version was '0.5.23' and is '0.5.24'" in capsys.readouterr().err
