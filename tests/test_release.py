"""Answers leave the scheduler before the requests that they end are stored and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.common import release_kv_cache

import patternkv_sgl.plugin as plugin
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.release import ReleaseQueue
from tests.fakes import Scheduler

CONFIG = PatternKVConfig(patterns=4, sinks=2, window=4, mine_tokens=16, check=True)

pytestmark = pytest.mark.usefixtures("published")


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scheduler]:
    scheduler = Scheduler(CONFIG)
    releases = ReleaseQueue(scheduler.allocator, lambda: None)
    monkeypatch.setattr(plugin, "_cache", SimpleNamespace(releases=releases))
    # As SGLang's own modules see it once the plug-in is loaded.
    monkeypatch.setattr("tests.fakes.release_kv_cache", hooked(release_kv_cache))
    yield scheduler
    scheduler.tree.check_integrity(scheduler.slot_table)


def hooked(original: Callable[..., None]) -> Callable[..., None]:
    def release(*args: Any, **kwargs: Any) -> None:
        plugin._release(original, *args, **kwargs)

    return release


def step(scheduler: Scheduler, process: Callable[[], None]) -> None:
    """Process the results of a step as the hooked scheduler does."""
    plugin._process_result(lambda self, batch, result: process(), scheduler, None, None)


def test_answers_go_first(scheduler: Scheduler) -> None:
    first, second, third = scheduler.prefill(range(40), range(60, 90), range(100, 120))
    free = scheduler.allocator.available_size()
    scheduler.decode([first, second, third], [7, 8, 9])
    held: list[bool] = []

    def process() -> None:
        scheduler.finish(first)
        scheduler.finish(second)
        # Here SGLang sends the answers.
        held.extend(req.kv.holds_kv for req in (first, second, third))

    step(scheduler, process)
    assert held == [True, True, True]
    assert [req.kv.holds_kv for req in (first, second, third)] == [False, False, True]
    # Answers are in the tree behind their prompts, and rows are free again.
    assert scheduler.tree.total_size() == 40 + 30 + 20 + 2
    assert scheduler.allocator.available_size() == free - 3
    assert scheduler.rows.available_size() == scheduler.rows.size - 1


def test_releases_outside_of_a_step_wait_for_nobody(scheduler: Scheduler) -> None:
    (request,) = scheduler.prefill(range(40))
    scheduler.retract(request)
    assert not request.kv.holds_kv
    step(scheduler, lambda: None)
    (other,) = scheduler.prefill(range(50, 90))
    scheduler.finish(other)
    assert not other.kv.holds_kv


def test_a_step_that_fails_releases_too(scheduler: Scheduler) -> None:
    first, second = scheduler.prefill(range(40), range(60, 90))

    def process() -> None:
        scheduler.finish(first)
        raise ValueError("a broken step")

    with pytest.raises(ValueError, match="a broken step"):
        step(scheduler, process)
    assert not first.kv.holds_kv
    scheduler.finish(second)
    assert not second.kv.holds_kv


def test_a_step_that_fails_while_it_frees_tells_its_own_error(scheduler: Scheduler) -> None:
    (request,) = scheduler.prefill(range(40))

    def process() -> None:
        scheduler.allocator.free_group_begin()
        scheduler.finish(request)
        raise ValueError("a broken step")

    with pytest.raises(ValueError, match="a broken step"):
        step(scheduler, process)
    assert not request.kv.holds_kv
    assert scheduler.allocator.free_group is None


def test_what_releases_free_is_one_group(scheduler: Scheduler) -> None:
    allocator, groups = scheduler.allocator, []
    releases = ReleaseQueue(allocator, lambda: None)
    with releases.processing():
        for _ in range(2):
            releases.put(lambda: groups.append(allocator.free_group))
        assert groups == []
    assert len(groups) == 2 and groups[0] is groups[1] is not None
    assert allocator.free_group is None
