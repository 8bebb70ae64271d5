"""Fixtures that every test gets: fixed seeds, offline CPU defaults, a reason for each GPU skip."""

from __future__ import annotations

import os

# Set before torch is imported, since it reads the thread count once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

SEED = 20230


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch (every device) before each test; gives the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="module")
def published() -> Iterator[None]:
    """SGLang's runtime context, which releasing a request reads."""
    from sglang.srt.runtime_context import get_context  # takes seconds to import

    with get_context().override_server_args():
        yield


@pytest.fixture
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty*`` returns with NaN (floats) or the largest value (integers).

    An op that reads memory before writing it, or leaves part of its output unwritten, shows it.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: object, **kwargs: object) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(torch.iinfo(out.dtype).max)

        return empty

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
