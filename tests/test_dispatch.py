"""How branches leave the tokenizer, with SGLang's hooks around a stand-in for its manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import patternkv_sgl.tokenizer_manager as manager_hooks
from patternkv_sgl import hooks
from patternkv_sgl.dispatch import BranchDispatch


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "enabled", lambda: True)
    monkeypatch.setattr(manager_hooks, "_dispatch", BranchDispatch())


class Manager:
    """SGLang's tokenizer as far as it sends: a prefill ahead of each prompt's branches, then them.

    Attributes:
        sent: messages in order, of the names of what they bring.
    """

    def __init__(self) -> None:
        self.sent: list[list[str]] = []

    async def call(self, obj: Any, stop_at: str = "") -> list[str]:
        handle = manager_hooks.handle_batch(Manager._handle_batch_request, self, obj, None, stop_at)
        return [answer async for answer in handle]

    async def _handle_batch_request(
        self, obj: Any, request: None, stop_at: str
    ) -> AsyncGenerator[Any]:
        for prompt in obj.prompts:
            await self.send(f"{prompt} alone")
        for prompt in obj.prompts:
            for branch in range(obj.parallel_sample_num):
                name = f"{prompt}{branch}"
                if name == stop_at:
                    raise ValueError(name)
                await self.send(name)
                await asyncio.sleep(0)
        yield "first"
        yield "second"

    async def send(self, name: str) -> None:
        await manager_hooks.send_request(
            Manager._send_one_request, self, SimpleNamespace(name=name)
        )

    async def _send_one_request(self, obj: Any) -> None:
        self.sent.append([obj.name])

    async def _send_batch_request(self, objs: list[Any]) -> None:
        self.sent.append([obj.name for obj in objs])


def request(*prompts: str, n: int = 3, has_images: bool = False) -> Any:
    return SimpleNamespace(
        prompts=prompts,
        batch_size=len(prompts),
        parallel_sample_num=n,
        contains_mm_input=lambda: has_images,
    )


def test_the_branches_of_a_prompt_are_one_message() -> None:
    manager = Manager()
    assert asyncio.run(manager.call(request("a", "b"))) == ["first", "second"]
    branches = [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert manager.sent == [["a alone"], ["b alone"], *branches]


@pytest.mark.parametrize("one_by_one", [request("a", n=1), request("a", has_images=True)])
def test_single_answers_and_images_go_at_once(one_by_one: Any) -> None:
    manager = Manager()
    asyncio.run(manager.call(one_by_one))
    assert [len(message) for message in manager.sent] == [1] * (1 + one_by_one.parallel_sample_num)


def test_requests_at_once_hold_their_own_branches() -> None:
    manager = Manager()

    async def both() -> None:
        await asyncio.gather(manager.call(request("a")), manager.call(request("b", n=2)))

    asyncio.run(both())
    assert sorted(message for message in manager.sent if len(message) > 1) == [
        ["a0", "a1", "a2"],
        ["b0", "b1"],
    ]


def test_a_request_that_failed_leaves_nothing_to_the_next_of_its_task() -> None:
    manager = Manager()

    async def one_after_the_other() -> None:
        with pytest.raises(ValueError, match="a2"):
            await manager.call(request("a"), stop_at="a2")
        await manager.send("single")
        await manager.call(request("b", n=2))

    asyncio.run(one_after_the_other())
    assert manager.sent == [["a alone"], ["single"], ["b alone"], ["b0", "b1"]]


def test_a_reader_that_leaves_closes_the_request() -> None:
    closed: list[str] = []

    async def answers() -> AsyncGenerator[str]:
        try:
            yield "first"
            yield "second"
        finally:
            closed.append("answers")

    async def read_one() -> None:
        handle = manager_hooks.handle_batch(lambda *args: answers(), None, request("a"), None, {})
        async for _ in handle:
            break
        await handle.aclose()

    asyncio.run(read_one())
    assert closed == ["answers"]
    assert manager_hooks._dispatch._calls == {}


def test_without_the_cache_the_tokenizer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "enabled", lambda: False)
    manager = Manager()
    asyncio.run(manager.call(request("a")))
    assert [len(message) for message in manager.sent] == [1] * 4


def test_the_hooks_pass_on_what_sglang_gives() -> None:
    def original(self: Any, obj: Any, request: Any, request_states: Any) -> Any:
        return self, obj, request, request_states

    single, handled = request("a", n=1), partial(manager_hooks.handle_batch, original)  # type: ignore[arg-type]
    assert handled("self", single, "request", request_states={}) == ("self", single, "request", {})

    async def sent(self: Any, obj: Any) -> None:
        assert (self, obj) == ("self", "obj")

    asyncio.run(manager_hooks.send_request(sent, "self", "obj"))


def test_who_reads_a_stream_may_send_others_once_its_branches_are_sent() -> None:
    manager = Manager()

    async def read() -> None:
        handle = manager_hooks.handle_batch
        async for _ in handle(Manager._handle_batch_request, manager, request("a"), None, ""):
            await manager.send("other")

    asyncio.run(read())
    assert manager.sent == [["a alone"], ["a0", "a1", "a2"], ["other"], ["other"]]
