"""The platform class that `platform.activate` names; imported only where it is active."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

BIND = "SGLANG_CPU_OMP_THREADS_BIND"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """CPU with torch-native attention (platforms/interface.py)."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        # SGLang takes it for the value of --device, which it splits as a string.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_torch_profiler_activity_str(self) -> str:
        # Not SGLang's "CPU": with SGLANG_PROFILE_V2 a request for it would start two profilers.
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Replace the backend that SGLang presets for a CPU, and give each rank its cores."""
        if server_args.attention_backend == "intel_amx":
            server_args.attention_backend = self.get_default_attention_backend()
        ranks = server_args.tp_size * server_args.dp_size * server_args.pp_size
        if ranks > 1 and BIND not in os.environ:
            os.environ[BIND] = bind_ranks(sorted(os.sched_getaffinity(0)), ranks)


def bind_ranks(cores: list[int], ranks: int) -> str:
    """Cores per rank in SGLang's syntax (``"0,1|2,3"``); ranks share cores when there are fewer."""
    share = max(1, len(cores) // ranks)
    groups = [cores[(rank * share) % len(cores) :][:share] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)
