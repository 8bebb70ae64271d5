"""Device memory: what is reported is what is allocated, and nothing is allocated behind it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import patternkv_sgl.scratch as scratch
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.metadata import DecodeBuffers, most_tokens
from patternkv_sgl.pool import SLOTS_PER_PAGE, PoolGeometry, explained_memory
from patternkv_sgl.scratch import Scratch, ScratchShape
from patternkv_sgl.sizing import Sizing
from tests.engines import EngineRun
from tests.fakes import make_pool
from tests.models import WORDS, make_model
from tests.servers import environment

MIB = 2**20
SMALL = 16 * 1024  # bytes of tensors that are not worth counting
CHUNK, CONTEXT, ROWS = 8192, 65536, 128
SLACK = 64 * MIB  # of cuBLAS and the like, which allocate once when first used


def test_memory_that_does_not_fit_is_explained() -> None:
    with (
        pytest.raises(RuntimeError, match=r"memory for the cache .* lower --a, --b") as error,
        explained_memory("the cache", "--a", "--b"),
    ):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")
    assert "PyTorch says: tried to allocate 2 GiB" in str(error.value)


@pytest.mark.usefixtures("published")
def test_pool_plans_and_scratch_fill_the_memory_that_there_is() -> None:
    budget, rows, scratch_bytes = 64 * MIB, 12, 123_456
    config = PatternKVConfig(patterns=8, window=32)
    geometry = PoolGeometry(config, 4, 2, 64, torch.bfloat16)
    formats = tuple(dict.fromkeys(geometry.slot_formats))
    shape = ScratchShape(formats, 8, 6, rows, CONTEXT, torch.bfloat16)
    left = budget - Sizing(geometry, shape, scratch_bytes).reserved_bytes(budget)
    pool = make_pool(
        config,
        size=left // geometry.bytes_per_token,
        num_tables=geometry.num_tables(budget),
        num_windows=rows + 1,
        num_layers=4,
        h_kv=2,
    )
    plans = DecodeBuffers.nbytes(rows, shape.max_entries, most_tokens(pool.size, rows))
    taken = pool.get_kv_size_bytes() + plans + scratch_bytes
    assert budget - SMALL * 2 < taken <= budget


@pytest.mark.parametrize("alike", [True, False])
def test_layers_that_need_other_kernels_are_refused(
    alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = tuple(dict.fromkeys(PatternKVConfig(2, 2, patterns=256).slot_formats(4, 8, 128, 1)))
    shape = ScratchShape(formats, 256, 32, ROWS, CONTEXT, torch.bfloat16)
    monkeypatch.setattr(scratch, "decode_unavailable", lambda shape, device: None)
    monkeypatch.setattr(scratch, "plans_are_alike", lambda shape, fmt, device: alike)
    if alike:
        assert shape.decode_missing(torch.device("cuda")) is None
        return
    with pytest.raises(ValueError, match="256 patterns, layers of 4:2 bits need other") as error:
        shape.decode_missing(torch.device("cuda"))
    assert "lower --kv-quant-patterns to 128" in str(error.value)


def test_layers_without_kernels_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = tuple(dict.fromkeys(PatternKVConfig(2, 2).slot_formats(4, 8, 128, 1)))
    shape = ScratchShape(formats, 64, 32, ROWS, CONTEXT, torch.bfloat16)
    only = {2: None, 4: "no room"}
    monkeypatch.setattr(scratch, "decode_unavailable", lambda shape, _: only[shape.fmt.k_bits])
    assert shape.decode_missing(torch.device("cuda")) == "no room"


def grown(make: Any) -> tuple[Any, int]:
    """What ``make`` returns, and the bytes of the tensors that it left; blocks of PyTorch's
    allocator may be 1 MiB larger than what was asked for."""

    def held() -> int:
        return int(torch.cuda.memory_stats()["requested_bytes.all.current"])

    before = held()
    made = make()
    return made, held() - before


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [(4, 4), (4, 2), (2, 2)])
def test_a_pool_reports_what_it_allocates(bits: tuple[int, int]) -> None:
    config = PatternKVConfig(*bits, patterns=64)
    shape: dict[str, Any] = {"num_layers": 4, "h_kv": 8, "head_dim": 128, "size": 4096}
    pool, allocated = grown(lambda: make_pool(config, device="cuda", num_windows=17, **shape))
    assert 0 <= allocated - pool.get_kv_size_bytes() <= SMALL
    stored = sum(packed.nbytes for packed in pool.packed) + pool.slot_table.nbytes
    # SGLang's padding slot beyond the tokens that are served, and what fills the last page.
    slots = math.ceil((4096 + 1) / SLOTS_PER_PAGE) * SLOTS_PER_PAGE
    assert stored == slots * pool.geometry.bytes_per_token


@pytest.mark.gpu
def test_scratch_is_what_start_up_set_aside() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    formats = tuple(dict.fromkeys(PatternKVConfig(2, 2, patterns=64).slot_formats(4, 8, 128, 1)))
    shape = ScratchShape(formats, 64, 32, ROWS, CONTEXT, torch.bfloat16)
    rows = torch.zeros(ROWS + 1, CONTEXT, dtype=torch.int32, device=device)
    stated = shape.nbytes(device)
    _scratch, allocated = grown(lambda: Scratch(shape, device))
    assert abs(allocated - stated) <= MIB
    sizes = (ROWS, shape.max_entries, 10 * CONTEXT)
    _buffers, allocated = grown(lambda: DecodeBuffers(rows, *sizes))
    assert 0 <= allocated - DecodeBuffers.nbytes(*sizes) <= SMALL


def job(folder: Path, requests: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    kwargs = {
        "model_path": str(folder),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "kv_quant": "patternkv",
        "mem_fraction_static": 0.6,
        "max_total_tokens": 3 * CONTEXT,
        "chunked_prefill_size": CHUNK,
        "max_running_requests": ROWS,
        "cuda_graph_max_bs_decode": ROWS,
        "random_seed": 0,
        "log_level": "warning",
    }
    return {"kwargs": kwargs | options, "environment": {}, "requests": requests}


def prompt(tokens: int, new_tokens: int, n: int = 1) -> dict[str, Any]:
    params = {"temperature": 0.8, "n": n, "max_new_tokens": new_tokens, "ignore_eos": True}
    ids = random.Random(tokens).choices(range(WORDS), k=tokens)
    return {"input_ids": ids, "sampling_params": params}


@pytest.mark.gpu
@pytest.mark.slow
def test_serving_allocates_nothing_that_stays_and_no_more_for_a_long_prefix(tmp_path: Path) -> None:
    """The largest chunk over the longest prefix, then the largest decode batch, twice."""
    folder = tmp_path / "model"
    folder.mkdir()
    make_model(folder, max_position_embeddings=CONTEXT)
    work = [
        prompt(64, 1),
        prompt(CHUNK, 1),
        prompt(CONTEXT - 64, 1),
        prompt(CHUNK // 2, 32, n=ROWS),
    ]
    again = [prompt(CHUNK - 1, 1), prompt(CONTEXT - 65, 8), prompt(CHUNK // 2 - 1, 32, n=ROWS)]
    (result,) = EngineRun([job(folder, [*work, *again])], tmp_path, environment()).results()
    held = [stats["device_bytes"] for stats in result["stats"]]
    peaks = [stats["device_bytes_peak"] for stats in result["stats"]]
    print("MiB held:", [x // MIB for x in held], "peak:", [x // MIB for x in peaks])
    chunk, longest, batch = peaks[1:4]
    assert longest - chunk <= SLACK, "a long prefix takes memory of its own"
    assert batch - chunk <= SLACK, "a large decode batch takes memory of its own"
    assert peaks[-1] - batch <= SLACK, "the same work takes more the second time"
    assert max(held) - held[1] <= SLACK, "served requests leave memory behind"


@pytest.mark.gpu
@pytest.mark.slow
def test_too_many_tables_say_what_to_lower(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make_model(folder)
    options = {"mem_fraction_static": 0.05, "kv_quant_tables": 32768, "kv_quant_patterns": 256}
    run = EngineRun([job(folder, [prompt(8, 1)], **options)], tmp_path, environment())
    with pytest.raises(AssertionError, match="leave nothing of the KV memory") as error:
        run.results()
    assert "lower --kv-quant-patterns, --kv-quant-tables" in str(error.value)
