"""The equal-memory curve: bytes by hand, what equal memory buys, and which runs are comparable."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from recipes import best_of_n
from recipes.compare import Comparison, Curve, curve_rows, equal_rows, load, main
from recipes.footprint import Footprint
from tests.recipe_fakes import PATTERNKV, STOCK, FakeServer, sample, serving, write_model_config


def test_bytes_of_branches_by_hand() -> None:
    footprint = Footprint(10, window_bytes=40, table_bytes=100, prompt_tokens=50, branch_tokens=6)
    assert footprint.bytes(0) == 50 * 10 + 100
    assert footprint.bytes(3) == (50 + 3 * 6) * 10 + 3 * 40 + 100
    assert [footprint.branches(footprint.bytes(k)) for k in (0, 1, 7)] == [0, 1, 7]
    assert footprint.branches(footprint.bytes(7) - 1) == 6
    assert footprint.branches(10) == 0


def curve(bytes_per_token: int, right: int) -> Curve:
    """A problem of 100 tokens and four branches of 10 tokens, ``right`` of them right."""
    group = [sample("p", i, correct=i < right) for i in range(4)]
    rows = {"kv_bytes_per_token": bytes_per_token, "window_bytes": 0, "table_bytes": 0}
    return Curve(Footprint.of("x", rows, [group]), [group], {})


def test_curves_and_equal_memory_by_hand() -> None:
    comparison = Comparison(4, {"4/4": curve(5, 3), "bf16": curve(10, 4), "2/2": curve(9, 1)}, {})
    points = {(row["variant"], row["k"]): row for row in curve_rows(comparison, parallel=1000)}
    assert points["bf16", 2]["gb"] == pytest.approx((100 + 2 * 10) * 10 * 1000 / 1e9)
    assert points["4/4", 4]["maj_at_k"] == 1
    assert points["4/4", 1]["maj_at_k"] == pytest.approx(3 / 4)

    equal = equal_rows(comparison, parallel=1)
    budgets = [1e9 * row["gb"] for row in equal[::3]]
    assert (budgets[0], budgets[-1]) == (pytest.approx(550), pytest.approx(1400))
    steps = [after / before for before, after in itertools.pairwise(budgets)]
    assert steps == pytest.approx([steps[0]] * 7)
    first, last = equal[:3], equal[-3:]
    # 550 bytes are one branch of 50 beside 500 at 4/4, and not even a prompt in the others.
    assert [row["k"] for row in first] == [1, None, None]
    assert first[0]["maj_at_k"] == pytest.approx(3 / 4)
    assert (first[1]["maj_at_k"], first[1]["stderr"]) == (None, None)
    # 1400 bytes are four branches in bf16 and more than that in the others.
    assert [(row["k"], row["capped"]) for row in last] == [(4, True), (4, False), (4, True)]
    assert [row["maj_at_k"] for row in last] == [1, 1, 0]
    between = {row["variant"]: row for row in equal[15:18]}  # 1072 bytes
    assert [between[name]["k"] for name in ("4/4", "bf16", "2/2")] == [4, None, 1]
    assert between["2/2"]["maj_at_k"] == pytest.approx(1 / 4)


def run(server: FakeServer, output: Path, *more: str) -> Path:
    """A best-of-n run of the cache that ``server`` has; gives its folder."""
    before = set(output.glob("*"))
    options = ["--base-url", server.url, "--output", str(output), "--num-problems", "4"]
    assert best_of_n.main([*options, "--n", "4", "--questions-per-context", "2", *more]) == 0
    (folder,) = set(output.glob("*")) - before or before
    return folder


def test_saved_runs_make_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    write_model_config(model)
    stock = STOCK | {"model_path": str(model)}
    caches: list[dict[str, Any]] = [
        stock,
        stock | {"kv_cache_dtype": "fp8_e4m3"},
        stock | {"internal_states": [{"patternkv": PATTERNKV}]},
    ]
    with serving() as server:
        for server.info in caches:
            folder = run(server, tmp_path / "results")
        other = run(server, tmp_path / "results2", "--temperature", "0.5")
    path = folder / "metrics.json"
    metrics = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(metrics | {"skipped": {"2/2": "no engine"}}))

    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["--results", str(folder), "--output", str(out), "--parallel", "10"]) == 0
    printed = capsys.readouterr().out
    assert "2/2 is missing: no engine" in printed
    document = orjson.loads((out / "equal_memory.json").read_bytes())
    assert list(document["footprints"]) == ["bf16", "fp8", "4/4"]
    sizes = [row["gb"] for row in document["curves"] if row["k"] == 4]
    # 9 tokens of prompt, four branches of 3; a table and four windows of 32 tokens at 4/4.
    pages = 10 * (9 + 4 * 3)
    windows = 10 * (64_000 // 64 + 4 * 32 * 512)
    assert sizes == pytest.approx([pages * 512e-9, pages * 256e-9, (pages * 144 + windows) * 1e-9])
    assert (out / "equal_memory.txt").read_text() in printed
    assert (out / "equal_memory.png").read_bytes().startswith(b"\x89PNG")

    assert main(["--results", str(folder), str(other)]) == 1
    assert "4/4 is in an earlier folder already" in capsys.readouterr().err
    for name in ("fp8", "4/4"):
        del metrics["variants"][name]
    path.write_bytes(orjson.dumps(metrics))
    assert main(["--results", str(folder), str(other)]) == 1
    message = "temperature is 0.5, in the first run 0.8; compare like runs"
    assert message in capsys.readouterr().err


def test_a_missing_package_is_told_before_runs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--results", str(tmp_path / "absent")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: plots need matplotlib") and ".[demo]" in line


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.json there; name folders of best-of-n runs"):
        load([tmp_path])
    rows = {"kv_bytes_per_token": None, "window_bytes": 0, "table_bytes": 0}
    with pytest.raises(ValueError, match="fp8: kv_bytes_per_token is not known"):
        Footprint.of("fp8", rows, [[sample("p", 0, True)]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "results is missing"),
        (["--results", "x", "--parallel", "0"], "parallel 0: expected at least 1"),
        (["--result", "x"], "unknown key 'result'; known keys: results, parallel, output"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
