"""The soak: what it sends, what it finds wrong, and two short rounds of it on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak
from benchmarks.rows import read_rows
from benchmarks.soak_load import KINDS, Request, Scale, check_answers, make_request
from tests.servers import Server

pytest_plugins = ["tests.fixtures"]

SCALE = Scale(vocab_size=50, stem=64, tail=16, new_tokens=24, branches=6)


def test_a_seed_is_a_request_and_all_kinds_come_up() -> None:
    requests = [make_request(seed, SCALE) for seed in range(200)]
    assert requests == [make_request(seed, SCALE) for seed in range(200)]
    assert {request.kind for request in requests} == set(KINDS)
    prompts = [prompt for request in requests for prompt in request.prompts]
    assert all(0 <= token < SCALE.vocab_size for prompt in prompts for token in prompt)
    assert max(map(len, prompts)) <= SCALE.stem + SCALE.tail
    # Many requests go on from few stems.
    assert len({tuple(prompt[: SCALE.stem // 8]) for prompt in prompts}) <= 6


def finished(tokens: int, reason: str = "length") -> dict[str, Any]:
    return {"meta_info": {"completion_tokens": tokens, "finish_reason": {"type": reason}}}


def test_answers_must_be_whole_unless_given_up() -> None:
    request = Request("branches", [[1, 2], [3]], n=2, new_tokens=4)
    assert check_answers(request, [finished(4)] * 4) == []
    assert check_answers(request, [finished(4)] * 3) == ["3 answers instead of 4"]
    (problem,) = check_answers(request, [*[finished(4)] * 3, finished(2, "abort")])
    assert problem == "ended by {'type': 'abort'} after 2 of 4 tokens"
    assert check_answers(Request("abort", [[1]], 1, 4), []) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--out", "x"], "name either --model or --base-url"),
        (["--out", "x", "--base-url", "http://h", "--kill-in", "1"], "only a server of its own"),
    ],
)
def test_contradicting_arguments_are_refused(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        soak.parse_args(arguments)
    assert problem in capsys.readouterr().err


@pytest.mark.slow
def test_a_sound_server_passes(patternkv_server: Server, tmp_path: Path) -> None:
    out = tmp_path / "soak.jsonl"
    sizes = ["--stem", "300", "--new-tokens", "16", "--branches", "4", "--concurrency", "6"]
    timing = ["--minutes", "0", "--rounds", "2", "--round-seconds", "3"]
    url = ["--base-url", patternkv_server.url, "--out", str(out)]
    assert soak.main([*url, *sizes, *timing]) == 0
    rows = read_rows(out)
    assert len(rows) == 2
    assert all(row["problems"] == [] and sum(row["done"].values()) > 0 for row in rows)
    assert rows[-1]["busy"]["tables_mined"] > rows[0]["busy"]["tables_mined"]


@pytest.mark.slow
def test_what_a_server_keeps_is_a_problem(
    patternkv_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server that never flushes looks like one that leaks."""
    monkeypatch.setattr(soak.Soak, "_flush", lambda self: None)
    url = ["--base-url", patternkv_server.url, "--out", str(tmp_path / "soak.jsonl")]
    assert soak.main([*url, "--minutes", "0", "--round-seconds", "1", "--concurrency", "2"]) == 1
    printed = capsys.readouterr().out
    assert "tokens are not free when flushed" in printed
    assert "1 rounds: FAILED" in printed
