"""Counters of one scheduler process, shown under ``/server_info`` and as Prometheus gauges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class Stats:
    """What happened since start-up; a flush of the cache does not reset it.

    Attributes:
        mined, inherited: extends that mined a table, or took the table of their prefix.
        exhausted: extends that would have mined but found no free table slot.
        kv_reads: KV tokens that decode would read if every branch read all of its own.
        kv_reads_shared: of those, reads saved since a shared segment is read once for its branches.
        max_branches: most branches that shared one segment.
        logit_error_percent: error of attention's logits by storing K in the worst KV head, of their
            spread (``guard.py``); 0 until it is measured.
    """

    mined: int = 0
    inherited: int = 0
    exhausted: int = 0
    kv_reads: int = 0
    kv_reads_shared: int = 0
    max_branches: int = 0
    logit_error_percent: int = 0

    def snapshot(self) -> dict[str, int]:
        names = {"mined": "tables_mined", "inherited": "tables_inherited"}
        names["exhausted"] = "tables_exhausted"
        return {names.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}


def device_memory(device: torch.device) -> dict[str, int]:
    """Bytes of GPU memory that this process has allocated, keeps from the driver, and had allocated
    at most; empty for a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "device_bytes": torch.cuda.memory_allocated(device),
        "device_bytes_reserved": torch.cuda.memory_reserved(device),
        "device_bytes_peak": torch.cuda.max_memory_allocated(device),
    }


class Gauges:
    """One Prometheus gauge ``sglang:patternkv_<name>`` per number, labelled by rank.

    SGLang runs Prometheus in multiprocess mode, so gauges are made in the scheduler process after
    it has set ``PROMETHEUS_MULTIPROC_DIR``.
    """

    def __init__(self, names: Iterable[str], labels: dict[str, str]) -> None:
        from prometheus_client import Gauge

        self._gauges = {
            name: Gauge(
                f"sglang:patternkv_{name}",
                f"PatternKV cache: {name.replace('_', ' ')}",
                list(labels),
                multiprocess_mode="mostrecent",
            ).labels(**labels)
            for name in names
        }

    def set(self, values: dict[str, Any]) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(values[name])
