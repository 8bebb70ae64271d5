"""The same server behind SGLang's frontend language and the OpenAI API."""

from __future__ import annotations

from typing import Any

import pytest

from tests.servers import Model, Server

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

BRANCHES = 8
CONTEXT = 400  # tokens


@pytest.fixture
def server(patternkv_server: Server) -> Server:
    return patternkv_server


def test_fork_and_join_share_the_context(server: Server, model: Model) -> None:
    import sglang as sgl

    @sgl.function
    def debate(s: Any, context: str, openings: list[str]) -> None:
        s += context
        # Programs run behind their caller, and `fork` commits only the text that has arrived.
        s.text()
        forks = s.fork(len(openings))
        for fork, opening in zip(forks, openings, strict=True):
            fork += " " + opening
            fork += sgl.gen("thought", max_tokens=24, ignore_eos=True, temperature=0.7)
        forks.join()
        s += "".join(fork["thought"] for fork in forks)
        s += sgl.gen("verdict", max_tokens=8, ignore_eos=True, temperature=0.0)

    openings = [model.prompt(3, seed) for seed in range(BRANCHES)]
    before = server.stats()
    state = debate.run(
        context=model.prompt(CONTEXT, 20),
        openings=openings,
        backend=sgl.RuntimeEndpoint(server.url),
    )
    after = server.settle()
    assert len(state["verdict"].split()) >= 1
    assert len(state.text().split()) > CONTEXT + BRANCHES * 3
    # The context is prefilled once; branches and the verdict inherit its table.
    assert after["tables_mined"] - before["tables_mined"] == 1
    assert after["tables_live"] == 1
    saved = after["kv_reads_shared"] - before["kv_reads_shared"]
    assert saved > CONTEXT * (BRANCHES - 1)
    assert after["max_branches"] >= BRANCHES


def test_run_batch_over_one_context(server: Server, model: Model) -> None:
    import sglang as sgl

    @sgl.function
    def answer(s: Any, context: str, question: str) -> None:
        s += context + " " + question
        s += sgl.gen("answer", max_tokens=16, ignore_eos=True)

    context = model.prompt(CONTEXT, 21)
    server.generate(context, 1)
    before = server.settle()
    rows = [{"context": context, "question": model.prompt(5, seed)} for seed in range(4)]
    states = answer.run_batch(rows, backend=sgl.RuntimeEndpoint(server.url), num_threads=4)
    after = server.settle()
    assert all(state["answer"].split() for state in states)
    assert after["tables_mined"] == before["tables_mined"]
    assert after["kv_reads_shared"] > before["kv_reads_shared"]


def test_openai_completions_with_8_choices(server: Server, model: Model) -> None:
    before = server.stats()
    body = {"model": "m", "prompt": model.prompt(CONTEXT, 22), "n": BRANCHES, "max_tokens": 16}
    response = server.post("v1/completions", body | {"temperature": 0.8, "ignore_eos": True})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert sorted(choice["index"] for choice in answer["choices"]) == [*range(BRANCHES)]
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    assert answer["usage"]["completion_tokens"] == BRANCHES * 16
    after = server.settle()
    assert after["tables_mined"] - before["tables_mined"] == 1
    assert after["kv_reads_shared"] > before["kv_reads_shared"]


def test_openai_chat_with_8_choices(server: Server, model: Model) -> None:
    before = server.stats()
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": model.prompt(CONTEXT, 23)}],
        "n": BRANCHES,
        "max_tokens": 16,
        "ignore_eos": True,
    }
    response = server.post("v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == BRANCHES
    after = server.settle()
    assert after["tables_mined"] - before["tables_mined"] == 1
