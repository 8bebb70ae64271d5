"""The best-of-n recipe: pass@k and maj@k by hand, the table and the plot."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from recipes.cache import CacheInfo
from recipes.metrics import (
    maj_at_each_k,
    maj_at_k,
    mean_and_stderr,
    pass_at_k,
    powers_of_two,
    summarise,
)
from recipes.problems import load_problems
from recipes.records import Session
from recipes.report import plot, table, variant_metrics, with_same_memory
from recipes.runner import Run
from tests.recipe_fakes import PATTERNKV, STOCK, config_of, sample


def metrics_of(
    folder: Path, name: str, select: tuple[str, ...] = ("majority",), **changes: Any
) -> dict[str, Any]:
    """Metrics of two problems with four samples each, and two sessions of one engine."""
    session = {"variant": name, "seconds": 2.0, "completion_tokens": 40, "server": {}}
    state = {} if name == "bf16" else {"patternkv": PATTERNKV}
    numbers = asdict(CacheInfo.parse(STOCK | {"internal_states": [state]}))
    if name == "bf16":
        numbers |= {"bytes_per_token": 512, "kv_bytes": 512_000}
    made = Session(**(numbers | session | changes))
    config = config_of(folder, num_problems=2, n=4, select=select)
    drawn = Run(folder, name.replace("/", "-"), config, load_problems(config))
    drawn.claim(STOCK)
    drawn.samples.items[:] = [
        sample(p, i, correct=p == "p" or i == 0, mean_logprob=-float(i))
        for p in "pq"
        for i in range(4)
    ]
    drawn.sessions.items[:] = [made, made]
    return variant_metrics(drawn, {})


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 2, 1) == pytest.approx(1 / 2)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # only the one wrong pair of six fails
    assert pass_at_k(4, 2, 3) == 1
    assert pass_at_k(4, 0, 4) == 0


def test_maj_at_k_by_hand() -> None:
    answers, correct = ["a", "b", "b", None], [True, False, False, False]
    assert maj_at_k(answers, correct, 1) == pytest.approx(1 / 4)
    # ab ½, ab ½, a- 1, bb 0, b- 0, b- 0
    assert maj_at_k(answers, correct, 2) == pytest.approx(2 / 6)
    assert maj_at_k(answers, correct, 4) == 0
    assert maj_at_k(["a", "a", "b", "b"], [True, True, False, False], 4) == pytest.approx(1 / 2)
    assert maj_at_k(["a", "b", "c"], [True, False, False], 3) == pytest.approx(1 / 3)
    assert maj_at_k([None, None], [False, False], 2) == 0


def test_correct_answers_vote_as_one() -> None:
    assert maj_at_k(["1/2", "0.5", "3", "3"], [True, True, False, False], 4) == pytest.approx(1 / 2)
    assert maj_at_k(["1/2", "0.5", "3"], [True, True, False], 3) == 1


@pytest.mark.parametrize("answers", ["abbcc-aab", "abcdefg-", "aaaaabbbb", "-bbbcccd"])
def test_maj_at_k_is_the_mean_over_all_subsets(answers: str) -> None:
    votes = [None if letter == "-" else letter for letter in answers]
    correct = [letter == "a" for letter in answers]
    ks = range(1, len(votes) + 1)
    for k, credit in zip(ks, maj_at_each_k(votes, correct, ks), strict=True):
        credits = []
        for subset in itertools.combinations(votes, k):
            counts = {vote: subset.count(vote) for vote in subset if vote is not None}
            best = [vote for vote, count in counts.items() if count == max(counts.values())]
            credits.append(1 / len(best) if "a" in best else 0)
        assert credit == pytest.approx(sum(credits) / len(credits))
        assert maj_at_k(votes, correct, k) == pytest.approx(credit)


def test_maj_at_k_of_hundreds_of_samples() -> None:
    """Two answers that are given equally often win equally often."""
    votes, correct = ["1"] * 100 + ["2"] * 100, [True] * 100 + [False] * 100
    assert maj_at_k(votes, correct, 99) == pytest.approx(1 / 2)
    assert maj_at_k(votes, correct, 100) == pytest.approx(1 / 2)


def test_standard_error_is_over_problems() -> None:
    mean, error = mean_and_stderr([1.0, 0.0, 0.5])
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.5 / math.sqrt(3)))
    assert math.isnan(mean_and_stderr([1.0])[1])


def test_summarise_counts_whole_problems_only() -> None:
    samples = [sample("p", 0, True), sample("p", 1, False, answer=None, finish_reason="length")]
    samples += [sample("q", i, False) for i in range(2)] + [sample("r", 0, True)]
    result = summarise(samples, 2)
    assert (result["n_problems"], result["n_samples"]) == (2, 4)
    assert result["pass_at_1"] == pytest.approx(1 / 4)
    assert result["stderr"] == pytest.approx(1 / 4)
    assert result["pass_at_k"] == {"1": pytest.approx(1 / 4), "2": pytest.approx(1 / 2)}
    assert result["maj_at_k"] == {"1": pytest.approx(1 / 4), "2": pytest.approx(1 / 2)}
    assert (result["no_answer"], result["truncated"]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no problem has all of its 3 samples"):
        summarise(samples, 3)


def test_powers_of_two_end_in_n() -> None:
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(1) == [1]


def test_sessions_add_up(tmp_path: Path) -> None:
    row = metrics_of(tmp_path, "4/4")
    assert (row["wall_seconds"], row["decoded_tokens"], row["sessions"]) == (4.0, 80, 2)
    assert row["decoded_tokens_per_second"] == pytest.approx(20)
    assert (row["kv_reads"], row["kv_reads_shared"]) == (200, 120)
    assert row["shared_reads"] == pytest.approx(0.6)
    assert (row["tables_live"], row["kv_bytes"]) == (3, 512_000)
    assert metrics_of(tmp_path, "bf16")["shared_reads"] is None


def test_table_has_a_line_per_variant(tmp_path: Path) -> None:
    lines = table(
        with_same_memory(
            {"bf16": metrics_of(tmp_path, "bf16"), "4/4": metrics_of(tmp_path, "4/4")}
        ),
        4,
    ).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "cache"
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells[2] == ["bf16", "62.5 ± 37.5 %", "50.0 ± 50.0 %", "512", "1,000", "20", "–", "–"]
    assert cells[3][3:] == ["144", "3,500 (3.50×)", "20", "3", "60.0%"]


def test_tokens_are_compared_at_the_same_memory(tmp_path: Path) -> None:
    twice = metrics_of(tmp_path, "2/2", kv_tokens=14000, kv_bytes=1_024_000)
    rows = with_same_memory(
        {"bf16": metrics_of(tmp_path, "bf16"), "4/4": metrics_of(tmp_path, "4/4"), "2/2": twice}
    )
    assert [row["kv_tokens_same_memory"] for row in rows.values()] == [1000, 3500, 7000]
    assert rows["2/2"]["kv_tokens"] == 14000
    unknown = with_same_memory({"bf16": metrics_of(tmp_path, "bf16", kv_bytes=None)})
    assert unknown["bf16"]["kv_tokens_same_memory"] is None


def test_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot(
        with_same_memory(
            {"bf16": metrics_of(tmp_path, "bf16"), "4/4": metrics_of(tmp_path, "4/4")}
        ),
        "title",
        path,
    )
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
