"""Time per call on the device, and what the device can do at best."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]

_GRAPH_US = 2000.0
"""Work in one graph, so that the gap between two replays does not count."""
_REPEATS = (5, 50)
_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 20th and 80th percentile over the replays."""

    us: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        p20, us, p80 = (
            torch.tensor(samples)
            .double()
            .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
            .tolist()
        )
        return cls(us, p20, p80)


def measure(calls: Calls, device: torch.device, budget_s: float = 0.15) -> Timing:
    """Time per call of ``calls``, which run one after another over different buffers.

    On a GPU one CUDA graph holds them, several times over if they are short, and is replayed; each
    call has run once before, so that what compiles or plans does so outside. On a CPU they are
    called.
    """
    for call in calls:
        call()
    if device.type == "cpu":
        return _wall_clock(calls)
    rounds = max(1, round(_GRAPH_US / _elapsed_us([lambda: [call() for call in calls]])[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    replay_us = _elapsed_us([graph.replay])[0]
    low, high = _REPEATS
    repeats = max(low, min(high, int(budget_s * 1e6 / replay_us)))
    per_replay = rounds * len(calls)
    return Timing.of([us / per_replay for us in _elapsed_us([graph.replay] * repeats)])


def _elapsed_us(calls: Calls) -> list[float]:
    """Device time of each call. The host does not wait in between, so the device never idles."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _wall_clock(calls: Calls) -> Timing:
    samples = []
    for call in [*calls] * _REPEATS[0]:
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return Timing.of(samples)


def copies_beyond_l2(nbytes: int, device: torch.device) -> int:
    """Copies of ``nbytes`` that make a round over all of them exceed the L2 cache twice."""
    if device.type == "cpu":
        return 1
    l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
    return 2 * l2_bytes // nbytes + 1


def copy_gbps(device: torch.device) -> float:
    """Bandwidth of a device copy, GB/s, bytes read plus bytes written."""
    nbytes = (1024 if device.type == "cuda" else 16) * _MEBIBYTE
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Not in a graph: a captured copy becomes a node that the slower copy engines run.
    copies = [lambda: target.copy_(source)] * 20
    cpu = device.type == "cpu"
    timing = _wall_clock(copies[:1]) if cpu else Timing.of(_elapsed_us(copies))
    return 2 * nbytes / timing.us / 1e3


def matmul_tflops(device: torch.device) -> float:
    """Rate of a large bfloat16 matrix product, TFLOP/s."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / measure([lambda: torch.mm(a, b, out=out)], device).us / 1e6
