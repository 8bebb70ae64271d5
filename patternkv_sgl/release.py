"""Requests that are done give their rows back once their answers are on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.mem_cache.allocator import BaseTokenToKVPoolAllocator


class ReleaseQueue:
    """Puts off what SGLang's ``release_kv_cache`` does (mem_cache/common.py) while the results of a
    step are processed.

    SGLang stores and frees every request that a step ends before it sends the step's answers
    (managers/scheduler_components/batch_result_processor.py), so branches that end together wait
    for one another.

    Args:
        allocator: whose slots the releases free, as one group.
        then: called after the releases of each step, and after every other one.
    """

    def __init__(self, allocator: BaseTokenToKVPoolAllocator, then: Callable[[], None]) -> None:
        self._allocator, self._then = allocator, then
        self._waiting: list[Callable[[], None]] | None = None

    @contextmanager
    def processing(self) -> Iterator[None]:
        """While results are processed and answers sent; releases follow at its end."""
        waiting = self._waiting = []
        try:
            yield
        finally:
            self._waiting = None
            # A step that failed may have left its own group open; its error is the one to tell.
            if self._allocator.free_group is None:
                self._allocator.free_group_begin()
            for release in waiting:
                release()
            self._allocator.free_group_end()
            self._then()

    def put(self, release: Callable[[], None]) -> None:
        """Call ``release``, while results are processed later."""
        if self._waiting is None:
            release()
            self._then()
        else:
            self._waiting.append(release)
