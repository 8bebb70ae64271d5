"""Every recipe against one running server, with the demo model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import orjson
import pytest

from recipes import best_of_n, compare, self_consistency, tree_search
from recipes.frontend import frontend
from recipes.problems import load_problems
from recipes.records import Records, Sample
from tests.servers import DEMO, Server, environment

pytest_plugins = ["tests.fixtures"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DEMO / "config.json").exists(), reason="needs the demo model"),
]

ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 120


@pytest.fixture
def server(patternkv_server: Server) -> Server:
    return patternkv_server


def arguments(server: Server, recipe: str, *more: str) -> list[str]:
    """A recipe's own YAML file, on this server."""
    config = ROOT / "recipes" / "demo" / f"{recipe}.yaml"
    return ["--config", str(config), "--base-url", server.url, *more]


def test_best_of_n_and_compare(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--num-problems", "2", "--questions-per-context", "2", "--n", "4"]
    select = ["--select", "majority", "logprob", "self_certainty", "verifier"]
    verifier = ["--verifier", ".demo.verifier.sound_steps", "--output", str(tmp_path)]
    assert best_of_n.main(arguments(server, "best_of_n", *more, *select, *verifier)) == 0
    (folder,) = tmp_path.iterdir()
    metrics = orjson.loads((folder / "metrics.json").read_bytes())
    assert set(metrics["variants"]) == {"4/4"}
    row = metrics["variants"]["4/4"]
    assert (row["n_problems"], row["n_samples"], row["tables_mined"]) == (2, 8, 1)
    assert row["shared_reads"] > 0.5
    assert row["cached_tokens_mean"] > 1000
    for name in ("maj", "logprob", "self_certainty", "verifier"):
        assert set(row[f"{name}_at_k"]) == {"1", "2", "4"}
        assert row[f"{name}_at_k"]["1"] == pytest.approx(row["pass_at_1"])
    # Only a right answer gets 1 from this verifier, so it finds one where there is one.
    assert row["verifier_at_k"]["4"] == row["pass_at_k"]["4"]
    samples = Records(folder / "samples-4-4.jsonl", Sample).items
    assert len(samples) == 8
    for sample in samples:
        assert sample.mean_logprob is not None and sample.mean_logprob <= 0
        assert sample.self_certainty is not None and sample.self_certainty > 0
    assert (folder / "plot.png").stat().st_size > 0
    assert "self_certainty@4" in capsys.readouterr().out

    assert compare.main(["--results", str(folder)]) == 0
    curves = orjson.loads((folder / "equal_memory.json").read_bytes())["curves"]
    assert [point["k"] for point in curves] == [1, 2, 4]
    stats = server.stats()
    prompt, branch = samples[0].prompt_tokens, row["completion_tokens_mean"]
    pages = (prompt + 4 * branch) * stats["bytes_per_token"]
    extra = stats["table_bytes"] // (stats["table_slots"] + 1)
    extra += 4 * stats["window"] * stats["bf16_bytes_per_token"]
    assert curves[-1]["gb"] == pytest.approx((pages + extra) / 1e9)


def test_an_interrupted_run_goes_on(server: Server, tmp_path: Path) -> None:
    more = ["--num-problems", "8", "--level", "easy", "--n", "4", "--concurrency", "1"]
    options = arguments(server, "best_of_n", *more, "--output", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.best_of_n", *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell ignore interrupts, and so would this.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    limit = time.monotonic() + WAIT_SECONDS
    while not (found := list(tmp_path.glob("*/samples-4-4.jsonl"))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit, "no sample yet"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, errors
    assert "the same command goes on from here" in errors
    kept = found[0].read_bytes()
    assert 0 < len(kept.splitlines()) < 32

    assert best_of_n.main(options) == 0
    assert found[0].read_bytes().startswith(kept)
    keys = [(item.problem, item.index) for item in Records(found[0], Sample).items]
    assert len(keys) == len(set(keys)) == 32


def test_self_consistency(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--num-problems", "3", "--n", "6", "--output", str(tmp_path / "answers.jsonl")]
    more += ["--temperature", "1"]  # where four of ten answers are wrong
    assert self_consistency.main(arguments(server, "self_consistency", *more)) == 0
    samples = Records(tmp_path / "answers.jsonl", Sample).items
    assert len(samples) == 18
    assert all(sample.cached_tokens > 1000 for sample in samples)
    assert len({sample.text for sample in samples}) > 3
    assert sum(sample.answer is not None for sample in samples) > 9
    printed = capsys.readouterr().out
    assert "maj@6" in printed
    assert float(printed.rpartition("(")[2].partition("%")[0]) > 50


def test_tree_search_shares_at_two_depths(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--num-problems", "2", "--output", str(tmp_path / "leaves.jsonl")]
    config = tree_search.parse_config(arguments(server, "tree_search", *more))
    problems = load_problems(config)
    with frontend(config) as running:
        trees = tree_search.run(config, problems, running)
    assert "whole answers" in capsys.readouterr().out
    for tree, problem in zip(trees, problems.problems, strict=True):
        first, second = tree.levels
        assert len(first.answers) == 8
        assert len(tree.leaves) == len(second.answers) == 8
        assert first.saved_below_prompt is not None and second.saved_below_prompt is not None
        # A kept step of 56 tokens has 4 readers.
        assert second.saved_below_prompt > first.saved_below_prompt
        assert second.saved_below_prompt > 56
        steps = {step.text for step in first.answers}
        kept = {leaf.text[: len(step)] for leaf in tree.leaves for step in steps} & steps
        assert 1 <= len(kept) <= 2
        graded = [problems.grade(problem, leaf.text)[0] for leaf in tree.leaves]
        assert sum(answer is not None for answer in graded) > 4
    assert len(Records(tmp_path / "leaves.jsonl", Sample).items) == 16
