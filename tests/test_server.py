"""``sglang.launch_server --kv-quant patternkv``: requests, cache, numbers, bad requests."""

from __future__ import annotations

import gzip
import math
import re
import uuid
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from patternkv_sgl.pool import SLOTS_PER_PAGE
from tests.answers import assert_close, cached, greedy, outputs
from tests.servers import Model, Server

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

PROMPT = 540  # tokens; more than --kv-quant-mine-tokens
SHORT = 40  # tokens; less
# Nats between a greedy answer whose prompt was attended exactly and one that read it from the
# 4-bit cache: 0.54 at most over eight random prompts to the demo model. Wrong slots give several.
COLD_TO_WARM = 1.5
CONFIGURATION = {"bits": "4/4", "patterns": 64, "window": 32, "sinks": 4, "mine_tokens": 256}
CONFIGURATION |= {"rotate": False, "layer_bits": {}}
COUNTS = {
    *("bytes_per_token", "bf16_bytes_per_token", "bytes_allocated", "table_bytes"),
    *("window_bytes", "kv_tokens", "kv_tokens_free", "table_slots", "tables_live", "table_refs"),
    *("running_requests", "tables_mined", "tables_inherited", "tables_exhausted"),
    *("kv_reads", "kv_reads_shared", "max_branches"),
}
MEASURED = {"logit_error_percent"}  # once, at the first prefill that mines


@pytest.fixture
def server(patternkv_server: Server) -> Server:
    return patternkv_server


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Counters that moved, by how much."""
    return {name: after[name] - before[name] for name in COUNTS if after[name] != before[name]}


def test_startup_line_states_what_the_cache_holds(server: Server) -> None:
    stats = server.stats()
    line = next(line for line in server.text().splitlines() if "PatternKV cache:" in line)
    ratio = stats["bf16_bytes_per_token"] / stats["bytes_per_token"]
    assert (
        f"bits K/V 4/4, {stats['bytes_per_token']} bytes per token against "
        f"{stats['bf16_bytes_per_token']} in bfloat16 ({ratio:.2f}x), {stats['kv_tokens']} tokens, "
        f"{stats['table_slots']} table slots of 64 patterns"
    ) in line
    assert ratio > 3.5


@pytest.mark.parametrize("path", ["server_info", "get_server_info"])
def test_stats_have_every_number(server: Server, path: str) -> None:
    info = server.get(path).json()
    stats = info["internal_states"][0]["patternkv"]
    assert set(stats) == COUNTS | MEASURED | set(CONFIGURATION)
    assert {name: stats[name] for name in CONFIGURATION} == CONFIGURATION
    assert (info["kv_quant"], info["kv_quant_bits"]) == ("patternkv", "4")
    assert stats["kv_tokens"] == info["max_total_num_tokens"]
    # SGLang's padding slot beyond the tokens that are served, and what fills the last page.
    slots = math.ceil((stats["kv_tokens"] + 1) / SLOTS_PER_PAGE) * SLOTS_PER_PAGE
    assert stats["bytes_allocated"] == (
        slots * stats["bytes_per_token"] + stats["table_bytes"] + stats["window_bytes"]
    )


def test_best_of_8_shares_one_table_and_the_prompt_reads(server: Server, model: Model) -> None:
    before = server.stats()
    answers = server.generate(model.prompt(PROMPT, 1), 64, n=8, temperature=0.8)
    after = grown(before, server.settle())
    assert [cached(answer) for answer in answers] == [PROMPT - 1] * 8
    assert len({tuple(outputs(answer)) for answer in answers}) > 1
    assert after["tables_mined"] == after["tables_live"] == 1
    assert after["tables_inherited"] == 8
    assert server.stats()["max_branches"] >= 8
    # Seven of eight reads of the prompt are saved while all branches run.
    assert after["kv_reads_shared"] / after["kv_reads"] > 0.7


def test_warm_answers_agree_with_cold_and_repeat_exactly(server: Server, model: Model) -> None:
    for seed in (2, 3):
        cold, warm, again = (server.generate(model.prompt(PROMPT, seed)) for _ in range(3))
        reused = [cached(answer) for answer in (cold, warm, again)]
        assert reused == [0, PROMPT - 1, PROMPT - 1]
        assert_close(cold, warm, COLD_TO_WARM)
        assert outputs(warm) == outputs(again)


def test_a_stored_prompt_is_joined_by_a_decode_step(server: Server, model: Model) -> None:
    """Unless the request wants logprobs; both read the same bytes."""
    text = model.prompt(PROMPT, 3)
    server.generate(text, 1)
    before = server.settle()
    prefilled = server.generate(text, 1)
    assert "kv_reads" not in grown(before, server.settle())
    body = greedy(text, 1) | {"return_logprob": False, "top_logprobs_num": 0}
    joined = server.post("generate", body).json()
    assert grown(before, server.settle())["kv_reads"] == PROMPT
    assert (joined["text"], cached(joined)) == (prefilled["text"], PROMPT - 1)
    body["sampling_params"] |= {"n": 4, "max_new_tokens": 8}
    branches = server.post("generate", body).json()
    assert len({branch["text"] for branch in branches}) == 1
    assert branches[0]["text"].startswith(joined["text"])


def test_a_stored_prompt_needs_no_prefill_ahead_of_its_branches(
    server: Server, model: Model
) -> None:
    text = model.prompt(PROMPT, 43)
    server.generate(text, 8)
    before = server.settle()
    body = greedy(text, 8) | {"return_logprob": False, "top_logprobs_num": 0}
    body["sampling_params"] |= {"n": 3}
    branches = server.post("generate", body).json()
    assert grown(before, server.settle())["tables_inherited"] == 3
    assert [cached(branch) for branch in branches] == [PROMPT - 1] * 3
    assert len({branch["text"] for branch in branches}) == 1
    # Logprobs of the prompt are asked of the prefill, too.
    server.generate(text, 8, n=3)
    assert grown(before, server.settle())["tables_inherited"] == 3 + 4


def test_branches_start_in_one_batch(server: Server, model: Model) -> None:
    text = model.prompt(PROMPT, 44)
    server.generate(text, 8)
    server.settle()
    before = len(server.text())
    server.generate(text, 8, n=8, temperature=0.8)
    server.settle()
    batches = re.findall(r"Prefill batch.*#new-seq: (\d+)", server.text()[before:])
    assert batches == ["1", "8"]  # the prefill ahead of branches, for logprobs, then they


def test_the_first_mined_prompt_is_measured(server: Server, model: Model) -> None:
    server.generate(model.prompt(PROMPT, 4), 2)
    assert 0 < server.settle()["logit_error_percent"] < 20


def test_equal_prompts_in_one_call_are_prefilled_once(server: Server, model: Model) -> None:
    """By one of them; the others join it, as branches do."""
    before = server.stats()
    text = model.prompt(PROMPT, 41)
    answers = sorted(server.generate([text] * 4), key=cached)
    cold, *joined = answers
    assert [cached(answer) for answer in answers] == [0, *[PROMPT - 1] * 3]
    assert all(outputs(answer) == outputs(joined[0]) for answer in joined)
    assert_close(cold, joined[0], COLD_TO_WARM)
    moved = grown(before, server.settle())
    assert (moved["tables_live"], moved["tables_mined"], moved["tables_inherited"]) == (1, 1, 3)
    again = server.generate([text] * 4)
    assert [cached(answer) for answer in again] == [PROMPT - 1] * 4
    assert grown(before, server.settle())["tables_mined"] == 1


@pytest.mark.parametrize("lengths", [(1, 1), (PROMPT, PROMPT), (PROMPT, SHORT), (SHORT, PROMPT)])
def test_prompts_without_a_suffix_or_of_one_token(
    server: Server, model: Model, lengths: tuple[int, int]
) -> None:
    first, second = (server.generate(model.prompt(length, 5)) for length in lengths)
    assert cached(first) == 0
    shared = min(*lengths, lengths[1] - 1)
    assert cached(second) == shared
    assert len(outputs(second)) == 16
    server.settle()


def test_flush_drops_every_table_and_the_next_run_mines_again(server: Server, model: Model) -> None:
    first = server.generate(model.prompt(PROMPT, 6))
    assert server.settle()["tables_live"] == 1
    server.flush()
    empty = server.stats()
    assert (empty["tables_live"], empty["table_refs"]) == (0, 1)  # the root's, of the zero table
    second = server.generate(model.prompt(PROMPT, 6))
    assert cached(second) == 0
    assert outputs(second) == outputs(first)
    assert grown(empty, server.settle())["tables_mined"] == 1


@pytest.mark.parametrize("how", ["close", "abort_request"])
def test_abort_in_mid_stream_gives_everything_back(server: Server, model: Model, how: str) -> None:
    text = model.prompt(PROMPT, 7)
    server.generate(text, 1)
    idle = server.settle()
    rid = uuid.uuid4().hex
    body = greedy(text, 3000) | {"stream": True, "rid": rid}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert server.stats()["running_requests"] == 1
        if how == "abort_request":
            assert server.post(how, {"rid": rid}).ok
            assert any(b'"type":"abort"' in line for line in lines)
    after = server.settle()
    assert {*grown(idle, after)} <= {"kv_reads", "kv_tokens_free", "tables_inherited", "table_refs"}
    assert after["tables_live"] == idle["tables_live"] == 1
    assert cached(server.generate(text)) == PROMPT - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"beam_width": 2},
            "Beam search (beam_width=2) is not supported with --kv-quant patternkv",
        ),
        ({"temperature": -1.0}, "temperature must be a non-negative"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"text": 5000}, "longer than the model's context length"),
    ],
)
def test_bad_requests_are_answered_and_the_server_goes_on(
    server: Server, model: Model, change: dict[str, Any], message: str
) -> None:
    text = model.prompt(change.pop("text", SHORT), 8)
    response = server.post("generate", {"text": text, "sampling_params": change})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert server.settle()["table_refs"] == 1
    assert len(outputs(server.generate(model.prompt(SHORT, 8)))) == 16


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text": ""}, "The prompt has no tokens"),
        ({"input_ids": [5, 99999]}, "The prompt holds token id 99999: ids of this model are 0 to"),
        ({"input_ids": [[5, 6], [7, -1]]}, "The prompt holds token id -1"),
        (
            {"input_ids": [5, 6], "return_logprob": True, "top_logprobs_num": 99999},
            "top_logprobs_num 99999",
        ),
        (
            {"input_ids": [5, 6], "return_logprob": True, "token_ids_logprob": [99999]},
            "out-of-vocabulary token id 99999",
        ),
        (
            {"input_ids": [5, 6], "return_logprob": True, "logprob_start_len": -7},
            "logprob_start_len -7: expected a position in the prompt",
        ),
        (
            {"input_ids": [5], "sampling_params": {"min_new_tokens": 2, "stop_token_ids": [9999]}},
            "stop_token_ids has 9999: ids of this model are 0 to",
        ),
    ],
)
def test_requests_that_would_end_the_scheduler_are_answered(
    server: Server, model: Model, request_: dict[str, Any], message: str
) -> None:
    params = {"max_new_tokens": 4} | request_.get("sampling_params", {})
    response = server.post("generate", request_ | {"sampling_params": params})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert len(outputs(server.generate(model.prompt(SHORT, 8)))) == 16


def test_a_body_that_is_no_json_is_answered(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/generate", data="{text:", headers=headers, timeout=60)
    assert answer.status_code == 400
    assert server.stats()["running_requests"] == 0


def test_a_profile_ends_in_a_trace(server: Server, model: Model, tmp_path: Path) -> None:
    body = {"output_dir": str(tmp_path), "num_steps": 2, "with_stack": False}
    assert server.post("start_profile", body).ok
    # The scheduler writes the trace between two of the steps that this takes.
    server.generate(model.prompt(SHORT, 8))
    (trace,) = tmp_path.glob("*.trace.json.gz")
    assert orjson.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_prometheus_shows_the_numbers_with_their_rank(server: Server, model: Model) -> None:
    server.generate(model.prompt(PROMPT, 9), 64)
    stats = server.settle()
    ((labels, found),) = server.gauges().items()
    assert 'dp_rank="0"' in labels and 'tp_rank="0"' in labels
    assert found == {name: stats[name] for name in COUNTS | MEASURED}
    assert (found["running_requests"], found["tables_live"]) == (0, 1)
    server.flush()
    stats, (found,) = server.stats(), server.gauges().values()
    assert found == {name: stats[name] for name in COUNTS | MEASURED}
    assert (found["tables_live"], found["kv_tokens_free"]) == (0, found["kv_tokens"])


def test_prometheus_keeps_up_with_a_long_answer(server: Server, model: Model) -> None:
    before = server.settle()["kv_reads"]
    body = greedy(model.prompt(PROMPT, 9), 3000) | {"stream": True}

    def shown() -> bool:
        (found,) = server.gauges().values()
        return found["running_requests"] == 1 and found["kv_reads"] > before

    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as stream:
        lines = stream.iter_lines()  # who lets go of it closes the stream
        next(lines)
        server.wait(shown, 10, "shown while it runs")
    server.settle()
