"""The serving benchmark's cells, rows and processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_kernels, bench_serving, kernel_counters
from benchmarks.bench_serving import (
    KINDS,
    LLAMA_8B,
    EngineProcess,
    engine_args,
    is_chosen,
    limited,
    main,
    parse_args,
)
from benchmarks.rows import read_rows
from benchmarks.serving_cases import (
    SUITES,
    TARGETS,
    Cell,
    best_of_n,
    cells,
    mixed_requests,
)
from benchmarks.serving_results import headline, line, markdown, misses
from benchmarks.serving_worker import _peak


def row(cell: Cell, kv: str, tok_s: float, **values: Any) -> dict[str, Any]:
    return {
        "engine": "stock" if kv in ("bf16", "fp8") else "patternkv",
        "kv": kv,
        "workload": cell.workload,
        "case": cell.name,
        "prompt": cell.prompt,
        "branches": cell.branches,
        "new_tokens": cell.new_tokens,
        "tok_s": tok_s,
        "samples_min": 600.0,
        "step_ms": 10.0,
        "ttft_ms": 50.0,
        "itl_ms_p50": 9.0,
        "itl_ms_p99": 12.0,
        "kv_tokens": 1000,
        "peak_running": cell.branches,
        "gpu": "GPU",
        "versions": {"sglang": "1", "torch": None},
        "commit": "abc",
    } | values


def reached(factor: float = 1.0) -> list[dict[str, Any]]:
    """Rows that are ``factor`` times their targets."""
    return [
        found
        for cell, target in TARGETS.items()
        for found in (row(cell, "bf16", 1000), row(cell, "4/4", 1000 * target * factor))
    ]


def test_every_target_is_a_cell_of_its_suite_and_of_all() -> None:
    assert set(TARGETS) == set(SUITES["design"]) <= set(cells("all"))
    assert len(cells("all")) == len(set(cells("all")))
    assert len({cell.name for cell in cells("all")}) == len(cells("all"))
    assert all(cell.branches % cell.prompts == 0 for suite in SUITES.values() for cell in suite)


def test_reached_targets_are_no_misses() -> None:
    assert misses(reached()) == []


def test_each_missed_target_is_named_with_its_gain() -> None:
    missed = misses(reached(0.5))
    assert len(missed) == len(TARGETS)
    assert missed[0] == (
        "best_of_n 16384 n=32 new=128: 1.10 x the tokens per second of stock, target 2.2"
    )


def test_a_target_that_was_not_measured_is_a_miss() -> None:
    assert len(misses(reached()[2:])) == 1
    assert "not measured, target 2.2 x" in misses(reached()[2:])[0]


def test_other_cells_must_not_lose() -> None:
    cell = best_of_n(2048, 1)
    slower = [*reached(), row(cell, "bf16", 100), row(cell, "4/4", 96)]
    assert misses(slower) == [f"{cell.name}: 0.96 x the tokens per second of stock, target 0.97"]
    assert misses([*reached(), row(cell, "bf16", 100), row(cell, "4/4", 98)]) == []


def test_a_table_has_a_line_per_case_and_says_what_is_missing() -> None:
    cell = best_of_n(2048, 8)
    rows = [row(cell, "bf16", 100), row(cell, "4/4", 150), row(best_of_n(2048, 1), "bf16", 10)]
    table = markdown(rows).splitlines()
    assert table[2] == f"| {cell.name} | 100 | 150 | 1.50 | 50 · 50 |"
    assert table[3].endswith("| 10 | – | – | 50 · – |")
    assert table[-1] == "GPU; sglang 1; commit abc."
    rows[1] |= {"commit": "def"}
    assert markdown(rows).endswith("; commits abc, def.")
    assert line(rows[0] | {"itl_ms_p50": None}).split()[:3] == ["best_of_n", "2048", "n=8"]


@pytest.mark.parametrize("cell", [c for c in SUITES["others"] if c.workload == "saturation"])
def test_a_mixed_stream_has_a_floor_of_its_own_and_no_latencies(cell: Cell) -> None:
    latencies = dict.fromkeys(("step_ms", "ttft_ms", "itl_ms_p50", "itl_ms_p99", "peak_running"))
    rows = [row(cell, "bf16", 100, **latencies), row(cell, "4/4", 299, **latencies)]
    assert misses([*reached(), *rows]) == [
        f"{cell.name}: 2.99 x the tokens per second of stock, target 3"
    ]
    assert line(rows[0]).split()[-2:] == ["1000", "600"]
    assert markdown(rows).splitlines()[2].endswith("| 2.99 | – · – |")


def test_a_mixed_stream_is_always_the_same() -> None:
    for cell in (SUITES["others"][-1], SUITES["smoke"][-1]):
        requests = mixed_requests(cell)
        assert requests == mixed_requests(cell)
        assert sum(request.n for request in requests) == cell.branches
        assert all(0 < request.prompt <= cell.prompt for request in requests)
        assert all(0 < request.new_tokens <= cell.new_tokens for request in requests)
        assert len({request.n for request in requests}) > 1


def test_equal_memory_holds_more_tokens_of_ours() -> None:
    found = {kv: limited(kv, 4.0, LLAMA_8B, 256)["max_total_tokens"] for kv in KINDS}
    assert (found["bf16"], found["fp8"]) == (4 * 2**30 // 2**17, 4 * 2**30 // 2**16)
    # Windows of 256 requests take a quarter of so little memory.
    assert 2.7 < found["4/4"] / found["bf16"] < 3.82
    assert found["4/4"] < found["4/2"] < found["2/2"]
    large = {kv: limited(kv, 96.0, LLAMA_8B, 256)["max_total_tokens"] for kv in KINDS}
    gains = [large[kv] / large["bf16"] for kv in ("4/4", "4/2", "2/2")]
    assert gains[0] > 3.7 and gains[1] > 4.9 and gains[2] > 6.8


def test_peak_counts_what_overlaps() -> None:
    assert _peak([(0, 2), (1, 3), (2.5, 4)]) == 2
    assert _peak([(0, 1)]) == 1


def test_arguments_of_each_kind() -> None:
    args = parse_args(["--kv", "bf16,fp8,4/2", "--engine-args", '{"tp_size": 2}'])
    bf16, fp8, ours = (engine_args(args, kv, "m") for kv in args.kv)
    assert bf16["attention_backend"] == fp8["attention_backend"] == "flashinfer"
    assert "kv_cache_dtype" not in bf16 and fp8["kv_cache_dtype"] == "fp8_e4m3"
    assert (ours["kv_quant"], ours["kv_quant_bits"]) == ("patternkv", "4:2")
    assert "attention_backend" not in ours
    assert all(found["tp_size"] == 2 and found["load_format"] == "dummy" for found in (bf16, ours))
    with pytest.raises(SystemExit):
        parse_args(["--kv", "3/3"])


def test_cells_are_chosen_by_all_filters() -> None:
    args = parse_args(["--prompts", "2048,8192", "--branches", "1,640"])
    chosen = [cell.name for cell in cells("all") if is_chosen(cell, args)]
    assert chosen == [best_of_n(2048, 1).name, "saturation 8192 n=640 new=1024"]
    args = parse_args(["--workloads", "tree"])
    assert {cell.workload for cell in cells("all") if is_chosen(cell, args)} == {"tree"}


def worker(folder: Path, code: str) -> Path:
    """A package whose ``benchmarks.serving_worker`` runs ``code``."""
    package = folder / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "serving_worker.py").write_text(code, encoding="utf-8")
    return folder


def test_a_process_answers_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import json, sys
print(json.dumps({"ready": 77}), flush=True)
for text in sys.stdin:
    print(json.dumps({"asked": json.loads(text)}), flush=True)
"""
    monkeypatch.chdir(worker(tmp_path, code))
    process = EngineProcess("4/4", {}, tmp_path / "log")
    assert process.ready() == 77
    for cell in cells("smoke"):
        assert process.measure(cell) == {"asked": vars(cell)}
    process.close()


def test_an_engine_that_ends_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys\nprint('out of memory', file=sys.stderr)\nsys.exit(3)\n"
    monkeypatch.chdir(worker(tmp_path, code))
    process = EngineProcess("fp8", {}, tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)engine with fp8 ended: .*out of memory"):
        process.ready()
    process.close()


def test_results_are_checked_printed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    out.write_text("\n".join(map(json.dumps, reached())), encoding="utf-8")
    assert main(["--check", "--out", str(out)]) == 0
    assert capsys.readouterr().out == "every target is reached\n"
    assert main(["--markdown", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2] == "| 16384 | – | 2200 (2.20×) | – |"
    assert len(printed) == 2 + 2 + 1 + 2 + len(TARGETS) + 2
    assert main(["--plot", str(figure), "--out", str(out)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", [bench_kernels, bench_serving, kernel_counters])
def test_a_missing_file_of_results_is_told(script: Any, tmp_path: Path) -> None:
    absent = tmp_path / "absent.jsonl"
    with pytest.raises(SystemExit, match=r"^error: .*absent\.jsonl: there is no such file"):
        script.main(["--markdown", "--out", str(absent)])


def test_the_default_model_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serving, "hardware", lambda: {"gpu": None})
    monkeypatch.setattr(bench_serving, "measure_all", lambda args: 0)
    with pytest.raises(SystemExit, match=r"^error: no GPU here, .* --model \S+ --suite smoke"):
        main([])
    assert main(["--model", "m"]) == 0


def test_the_readme_shows_the_committed_results() -> None:
    rows = read_rows(bench_serving.RESULTS)
    root = Path(bench_serving.__file__).parents[1]
    assert headline(rows) in (root / "README.md").read_text(encoding="utf-8")
    assert markdown(rows) in (root / "benchmarks/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_engine_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    options = {"device": "cpu", "dtype": "bfloat16", "max_total_tokens": 5000}
    model = Path(bench_serving.__file__).parents[1] / "recipes/demo/model"
    arguments = ["--suite", "smoke", "--kv", "4/4", "--model", str(model), "--mem-fraction", "0.6"]
    arguments += ["--engine-args", json.dumps(options), "--out", str(out)]
    assert main(arguments) == 0, capsys.readouterr().out
    rows = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert [found["case"] for found in rows] == [cell.name for cell in SUITES["smoke"]]
    *measured, stream = rows
    assert stream["samples_min"] > 0 and stream["itl_ms_p50"] is None
    for found in measured:
        assert found["kv_tokens"] == 5000 and found["peak_running"] == found["branches"]
        assert min(found["tok_s"], found["ttft_ms"], found["itl_ms_p50"]) > 0
        assert found["itl_ms_p50"] <= found["itl_ms_p99"]
