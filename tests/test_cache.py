"""The cache's gauges: late by a second at most while requests run, exact once none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

import patternkv_sgl.plugin as plugin
from patternkv_sgl.cache import PatternCache
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.radix import PatternRadixCache
from tests.fakes import Scheduler

CONFIG = PatternKVConfig(patterns=4, sinks=2, window=4, mine_tokens=16, check=True)

pytestmark = pytest.mark.usefixtures("published")


class Shown:
    """Stands in for Prometheus gauges.

    Attributes:
        values: what they show.
        times: how often they were set.
    """

    def __init__(self, names: Iterable[str], labels: dict[str, str]) -> None:
        self.values: dict[str, int] = {}
        self.times = 0

    def set(self, values: dict[str, int]) -> None:
        self.values = values
        self.times += 1


class Served(Scheduler):
    """A scheduler whose tree is a `PatternCache`'s, with the plug-in's hooks around it.

    Attributes:
        now: seconds on the clock that the cache sees.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, enable_metrics: bool) -> None:
        super().__init__(CONFIG)
        self.now = 100.0
        monkeypatch.setattr("patternkv_sgl.cache.Gauges", Shown)
        # SGLang's own metrics of the tree, which need all of a process's groups.
        monkeypatch.setattr(PatternRadixCache, "init_metrics_collector", lambda self: None)
        monkeypatch.setattr("patternkv_sgl.cache.time", SimpleNamespace(monotonic=lambda: self.now))
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
            enable_metrics=enable_metrics,
        )
        self.cache = PatternCache(params)
        self.tree, self.planner = self.cache.tree, self.cache.planner
        monkeypatch.setattr(plugin, "_cache", self.cache)
        monkeypatch.setattr(
            "tests.fakes.release_kv_cache",
            lambda *args, **kwargs: plugin._release(release_kv_cache, *args, **kwargs),
        )

    @property
    def gauges(self) -> Any:
        return self.cache.gauges

    @property
    def is_exact(self) -> bool:
        return bool(self.gauges.values == self.cache.numbers())

    def step(self, process: Callable[[], None] = lambda: None, seconds: float = 0.25) -> None:
        """Process the results of a step that took ``seconds``."""
        self.now += seconds
        plugin._process_result(lambda self, batch, result: process(), self, None, None)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with get_parallel().override(tp_rank=0, dp_rank=0):
        yield Served(monkeypatch, enable_metrics=True)


def test_a_server_that_has_served_nothing_shows_its_capacity(scheduler: Served) -> None:
    assert scheduler.is_exact
    assert scheduler.gauges.values["kv_tokens_free"] == scheduler.pool.size


def test_the_first_prompt_shows_while_it_is_prefilled(scheduler: Served) -> None:
    req = scheduler.admit(range(40))
    batch: Any = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        reqs=[req],
        prefix_lens=[0],
        extend_lens=[40],
        model_config=SimpleNamespace(is_generation=False),
    )
    names = ("input_embeds", "replace_embeds", "token_indices_to_pool", "mrope_positions")
    nothing = dict.fromkeys((*names, "spec_info", "global_num_tokens_cpu"))
    forward_batch: Any = SimpleNamespace(forward_mode=ForwardMode.EXTEND, **nothing)
    scheduler.now += 1
    scheduler.cache.begin(batch, forward_batch)
    assert scheduler.is_exact
    assert scheduler.gauges.values["running_requests"] == 1


def test_gauges_follow_a_long_decode(scheduler: Served) -> None:
    (req,) = scheduler.prefill(range(40))
    scheduler.step(seconds=1)
    assert scheduler.is_exact
    before = scheduler.gauges.times
    for token in range(3):
        scheduler.decode([req], [token])
        scheduler.step()
    assert scheduler.gauges.times == before
    scheduler.decode([req], [3])
    scheduler.step()
    assert scheduler.gauges.times == before + 1
    assert scheduler.is_exact


def test_the_last_request_leaves_them_exact(scheduler: Served) -> None:
    first, second = scheduler.prefill(range(40), range(60, 90))
    scheduler.step(seconds=1)
    scheduler.decode([first, second], [7, 8])
    scheduler.step(lambda: scheduler.finish(first))
    assert scheduler.gauges.values["running_requests"] == 2
    scheduler.step(lambda: scheduler.finish(second))
    assert scheduler.is_exact
    assert scheduler.gauges.values["running_requests"] == 0
    # Released behind the answers, and still counted as free.
    free = scheduler.pool.size - scheduler.tree.total_size()
    assert scheduler.gauges.values["kv_tokens_free"] == free


def test_a_request_that_ends_outside_of_a_step_leaves_them_exact(scheduler: Served) -> None:
    (req,) = scheduler.prefill(range(40))
    scheduler.step(seconds=1)
    assert scheduler.gauges.values["running_requests"] == 1
    scheduler.retract(req)
    assert scheduler.is_exact
    assert scheduler.gauges.values["running_requests"] == 0


def test_a_flush_leaves_them_exact(scheduler: Served) -> None:
    (req,) = scheduler.prefill(range(40))
    scheduler.step(lambda: scheduler.finish(req))
    assert scheduler.gauges.values["tables_live"] == 1
    scheduler.flush()
    assert plugin._flush(True, scheduler, empty_cache=False)
    assert scheduler.is_exact
    assert scheduler.gauges.values["tables_live"] == 0
    assert scheduler.gauges.values["kv_tokens_free"] == scheduler.pool.size


def test_without_metrics_no_number_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Served(monkeypatch, enable_metrics=False)
    monkeypatch.setattr(scheduler.cache, "numbers", lambda: pytest.fail("they are read"))
    monkeypatch.setattr("patternkv_sgl.cache.time", None)
    (req,) = scheduler.prefill(range(40))
    scheduler.step(lambda: scheduler.finish(req), seconds=5)
    scheduler.flush()
    plugin._flush(True, scheduler)
    assert scheduler.gauges is None


def test_a_batch_without_our_tree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang builds the tree after the backend, which can check pool and hooks alone."""
    monkeypatch.setattr(plugin, "_cache", None)
    arguments = (lambda cls, batch, runner: "forward", object, None, None)
    monkeypatch.setattr("patternkv_sgl.hooks.enabled", lambda: False)
    assert plugin._init_forward_batch(*arguments) == "forward"
    monkeypatch.setattr("patternkv_sgl.hooks.enabled", lambda: True)
    with pytest.raises(RuntimeError, match="no radix tree of its own"):
        plugin._init_forward_batch(*arguments)
