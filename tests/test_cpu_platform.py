"""What SGLang asks of the CPU platform beyond its own."""

from __future__ import annotations

import sglang  # noqa: F401 - loads the platform, whose module cannot be imported first
from torch.profiler import ProfilerActivity

from patternkv_sgl.cpu_platform import CpuPlatform


def test_a_profile_traces_the_cpu_once() -> None:
    platform = CpuPlatform()
    assert platform.get_torch_profiler_activity() is ProfilerActivity.CPU
    # SGLang starts a profiler for this name and another for its own.
    assert platform.get_torch_profiler_activity_str() not in ("CPU", "GPU")
