"""Merged results, published rows and the page's tables, from cells made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.cells import Cell
from benchmarks.quality.plots import plot_curves, plot_storage
from benchmarks.quality.summary import compare, results, rows
from benchmarks.quality.tables import FEWER_BITS, Report

KEYS = [
    "model",
    "method",
    "bits_k",
    "bits_v",
    "bits_per_element",
    "context",
    "task",
    "k",
    "pass_at_1",
    "pass_at_k",
    "maj_at_k",
    "stderr",
    "kl",
    "attn_err",
    "n_problems",
    "seed",
    "commit",
]


def cell(task: str, problems: list[str], method: str = "bf16", bits: int = 16, **more: Any) -> Cell:
    return Cell(
        model="demo",
        method=method,
        bits_k=bits,
        bits_v=bits,
        task=task,
        seed=1,
        commit="c0ffee",
        problems=problems,
        context=100,
        generated=50,
        bits_per_element=bits + len(problems) / 10,
        seconds=1.0,
        **more,
    )


def answered(problems: list[str], correct: list[list[bool]], **more: Any) -> Cell:
    right = [sum(group) for group in correct]
    votes = {"samples": len(correct[0]), "right": right, "wrong": [{} for _ in correct]}
    return cell("sampled 12x4", problems, **votes, **more)


def test_cells_of_one_task_merge_and_pair_by_problem() -> None:
    first = answered(["b"], [[True, True]])
    second = answered(["a"], [[True, False]], no_answer=1)
    other = answered(["a", "b"], [[False, False], [True, False]], method="int_pth", bits=2, loops=3)
    exact, coarse = results([first, other, second])
    assert (exact.problems, exact.passes(1)) == (["a", "b"], [50.0, 100.0])
    assert (exact.no_answer, exact.loops, coarse.loops) == (25.0, 0.0, 75.0)
    assert exact.majorities(2) == [100.0, 100.0]  # who gives no answer does not vote
    test = compare(coarse, exact, "passes", 1)
    assert (test.difference, test.stderr, test.n) == (-50.0, 0.0, 2)


def test_curves_average_over_the_chains_that_get_there() -> None:
    long = cell("forced 12x4", ["a", "b"], kl=[0.1, 0.3], kl_curve=[0.2, None, 0.6])
    short = cell("forced 12x4", ["c"], kl=[0.5], kl_curve=[0.5])
    (merged,) = results([long, short])
    assert merged.kl_curve == [pytest.approx(0.3), None, pytest.approx(0.6)]


def test_published_rows_have_the_agreed_keys_and_percent() -> None:
    chains = cell("forced 12x4", ["c", "d"], kl=[0.1, 0.3], attn_err=[0.2, 0.4])
    longer = cell("forced 48x4", ["e", "f"], kl=[1.0, 1.0], attn_err=[1.0])
    found = results([answered(["a", "b"], [[True, True], [True, False]]), chains, longer])
    *sampled, forced, _ = rows(found)
    assert all(list(row) == KEYS for row in [*sampled, forced])
    assert [(row["k"], row["pass_at_1"], row["pass_at_k"], row["maj_at_k"]) for row in sampled] == [
        (1, 75.0, 75.0, 75.0),
        (2, 75.0, 100.0, 100.0),
    ]
    assert sampled[0]["stderr"] == pytest.approx(25.0)
    assert sampled[0]["kl"] == pytest.approx(0.2) and sampled[0]["attn_err"] == pytest.approx(0.3)
    assert (forced["k"], forced["stderr"], forced["n_problems"]) == (None, pytest.approx(0.1), 2)


def test_the_page_says_who_differs_and_which_target_is_met() -> None:
    names = [f"p{i}" for i in range(4)]
    right = [[True, True]] * 4
    wrong = [{"1": 1}, {"1": 1, "2": 1}, {"1": 1}, {"3": 1, "1": 1}]
    bad = {"samples": 2, "right": [1, 0, 0, 0], "wrong": wrong}
    chain = {"kl": [0.1, 0.3], "kl_curve": [0.1, 0.3], "attn_err": [0.5]}
    cells = [
        answered(names, right),
        answered(names, right, method="patternkv_sgl", bits=4),
        cell("sampled 12x4", names, "patternkv_sgl", 2, **bad),
        answered(names, right, method="kivi_g32", bits=2),
        cell("forced 12x4", ["c", "d"], "kivi_g32", 2, **chain),
        cell("forced 12x4", ["c", "d"], "patternkv_sgl", 2, flatness=[[0.5] * 4], **chain),
        cell("forced 12x4", ["c", "d"], "patternkv_sgl[window=0]", 2, **chain),
        cell("forced 12x4", ["c", "d"], "patternkv_sgl[rotate=0,window=0]", 2, **chain),
        cell("forced 12x4", ["c", "d"], "patternkv_sgl[protect=0]", 2, **chain),
        cell("forced 12x4", ["c", "d"], "patternkv_sgl[protect=0,window=0]", 2, **chain),
    ]
    report = Report(results(cells))
    open_, missed = report.targets().splitlines()[2:]
    # Four problems without a difference exclude nothing below 75 points.
    assert "patternkv_sgl 4/4" in open_ and "| -75.0 to +75.0 | open |" in open_
    assert "patternkv_sgl 2/2" in missed and "| missed |" in missed
    assert "kivi_g32 2/2" in report.contests() and "p < 0.001" in report.contests()
    assert "0.2000 ± 0.1000" in report.chains()
    assert report.flatness().count("0.500") == 4
    # Tried options have a table of their own, against the default if that was measured too.
    assert "window" not in report.chains()
    assert sorted(line.split(" | ")[2:6] for line in report.choices().splitlines()[2:]) == [
        ["yes", "", "protect", "**1**"],
        ["yes", "", "protect", "0"],
        ["yes", "no", "window", "**32**"],
        ["yes", "no", "window", "0"],
        ["yes", "yes", "window", "**32**"],
        ["yes", "yes", "window", "0"],
    ]


def test_losses_and_curves_have_a_column_per_level_and_k() -> None:
    names = ["a", "b"]
    exact = answered(names, [[True, True], [True, True]])
    ours = answered(names, [[True, False], [True, True]], method="patternkv_sgl", bits=4)
    longer = [replace(c, task="sampled 96x4", context=200) for c in (exact, ours)]
    other = replace(exact, model="demo_outliers_8", method="fp8", bits_k=8, bits_v=8)
    single = answered(names, [[True], [False]], method="kivi_g32", bits=2)
    report = Report(results([*longer, exact, ours, other, single]))
    head, _, *lines = report.losses().splitlines()
    assert head.split(" | ")[2:] == ["12x4, 100 tokens", "96x4, 200 tokens |"]
    assert [line.split(" | ") for line in lines] == [
        ["| demo", "kivi_g32 2/2", "-50.0 ± 50.0", "– |"],
        ["| demo", "patternkv_sgl 4/4", "+0.0 ± 0.0", "+0.0 ± 0.0 |"],
        ["| demo_outliers_8", "fp8 8/8", "+0.0 ± 0.0", "– |"],
    ]
    curves = report.by_samples()
    assert "| patternkv_sgl 4/4 | 12x4 | 75.0 ± 25.0 · 75.0 ± 25.0 | 100.0 ± 0.0 · 100.0" in curves
    assert "| kivi_g32 2/2 | 12x4 | 50.0 ± 50.0 · 50.0 ± 50.0 | – |" in curves


def test_models_of_one_function_are_compared_with_its_exact_answers() -> None:
    demo = answered(["a", "b"], [[True, True], [True, True]])
    other = answered(["b", "a"], [[True, True], [False, False]], method="patternkv_sgl", bits=4)
    report = Report(results([demo, replace(other, model="demo_outliers_8")]))
    (line,) = report.targets().splitlines()[2:]
    assert "demo_outliers_8" in line and "| -148.0 to +48.0 |" in line


def test_fewer_bits_are_compared_on_the_problems_that_all_of_ours_were_asked() -> None:
    first, second = (method.split()[0] for method in FEWER_BITS)
    right, wrong = [True, True], [False, False]
    ours = answered(["a", "b"], [right, wrong], method=first, bits=2)
    other = answered(["a", "b", "c"], [right, right, wrong], method=second, bits=2)
    exact = answered(["a", "b", "c"], [right, right, wrong])
    theirs = replace(answered(["a", "b", "c"], [wrong, wrong, right]), method="ott", bits_k=2)
    theirs = replace(theirs, bits_v=2, bits_per_element=2.25)
    elsewhere = replace(theirs, task="sampled 96x4")
    report = Report(results([exact, ours, other, theirs, elsewhere]))
    _, _, *lines = report.fewer_bits().splitlines()
    half, none, all_ = "50.0 ± 50.0", "0.0 ± 0.0", "100.0 ± 0.0"
    alike = "+0.0 ± 0.0"
    assert [line.split(" | ")[2:7] for line in lines] == [
        ["2", FEWER_BITS[0], "2.20", half, half],
        ["2", FEWER_BITS[1], "2.30", all_, all_],
        ["2", "bf16 16/16", "16.30", all_, all_],
        ["2", "ott 2/2", "2.25", none, none],
    ]
    # Bold only where ours takes no more bits.
    *_, to_exact, to_theirs = [line.split(" | ")[7:] for line in lines]
    assert to_exact[0] == "**-50.0 ± 50.0 (p = 0.32)**" and to_exact[1].startswith(f"**{alike}")
    assert to_theirs[0] == "**+50.0 ± 50.0 (p = 0.32)**"
    assert to_theirs[1].startswith("+100.0 ± 0.0")


def test_plots_are_drawn(tmp_path: Path) -> None:
    chain = {"kl": [0.1, 0.3], "kl_curve": [0.1, 0.3], "attn_err": [0.5]}
    report = Report(results([cell("forced 12x4", ["c", "d"], "patternkv_sgl", 2, **chain)]))
    for plot in (plot_curves, plot_storage):
        plot(report, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
