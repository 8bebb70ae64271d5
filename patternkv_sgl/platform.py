"""A CPU platform for SGLang, so that the stock engine runs where no accelerator exists.

SGLang's in-tree CPU platform needs a CPU build of its kernels; this one uses torch operators only.
Registered in the entry-point group ``sglang.srt.platforms``.
"""

from __future__ import annotations

from importlib.util import find_spec


def activate() -> str | None:
    """Path of the platform class, or None to leave the machine to SGLang's own platforms."""
    import torch

    accelerators = (torch.cuda.is_available(), torch.xpu.is_available(), find_spec("torch_npu"))
    if any(accelerators):
        return None
    return "patternkv_sgl.cpu_platform:CpuPlatform"
