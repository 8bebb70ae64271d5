"""SGLang's KV canary over the packed cache: what it reads, what it walks, what it finds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patternkv_sgl.canary import attach, nbytes, walk
from patternkv_sgl.config import PatternKVConfig
from tests.answers import outputs
from tests.engines import EngineRun
from tests.fakes import Scheduler, make_pool
from tests.models import make_model
from tests.servers import environment
from tests.test_models import engine

pytestmark = pytest.mark.usefixtures("published")


CONFIG = PatternKVConfig(patterns=8, sinks=2, mine_tokens=32, window=0)


def scheduler(page_size: int = 1, **options: Any) -> Scheduler:
    shape = {"h_kv": 2, "head_dim": 64, "num_layers": 2} | options
    return Scheduler(CONFIG, size=512, page_size=page_size, **shape)


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def attached(pool: Any, read_bytes: int) -> Any:
    (group,) = attach(
        pool=pool,
        device=torch.device("cpu"),
        read_bytes=read_bytes,
        kv_token_id_vs_position_offset=0,
    )
    return group


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("read_bytes", "expected"), [(16, 16), (sys.maxsize, 64)])
def test_the_hash_reads_the_codes_of_the_first_head(
    page_size: int, read_bytes: int, expected: int
) -> None:
    """K and V at 4 bits of 64 dims: 64 bytes."""
    pool = scheduler(page_size).pool
    pool.packed[0].random_(256)
    (source,) = attached(pool, read_bytes).real_kv_sources_k
    assert source.read_bytes == expected
    views = pool.slot_formats[0].views(pool.packed[0])
    for slot in (0, 1, 17, 300):
        row, column = divmod(slot, source.page_size)
        start = column * source.num_bytes_per_token
        read = source.tensor[row, start : start + source.num_bytes_per_token]
        stored = torch.cat([views.k_codes[row, 0, column], views.v_codes[row, 0, column]])
        assert torch.equal(read, stored)


def test_buffers_have_a_row_per_slot_and_are_accounted_for() -> None:
    pool = scheduler().pool
    group = attached(pool, 0)
    assert group.real_kv_sources_k == () and not group.has_v_half
    assert len(group.k_head) == len(group.k_tail) == len(pool.slot_table)
    assert group.k_head.nbytes + group.k_tail.nbytes < nbytes(len(pool.slot_table))


def test_unaligned_slots_cannot_be_hashed() -> None:
    pool = make_pool(PatternKVConfig(4, 2), head_dim=96)
    assert attached(pool, 0)
    with pytest.raises(ValueError, match=r"codes of 72 bytes .* leave it at 'none'"):
        attached(pool, 16)


def test_the_walk_lists_every_token_of_the_tree_once() -> None:
    world = scheduler()
    prompts = [tokens(0, 40) + tokens(100, 9), tokens(0, 40) + tokens(200, 5), tokens(300, 12)]
    reqs = world.prefill(*prompts)
    for req in reqs[1:]:
        world.finish(req)
    rows = [world.row(req).tolist() for req in reqs[:1]]
    found = walk(world.tree, unlocked_only=False)
    listed = list(zip(*(x.tolist() for x in vars_of(found)), strict=True))
    assert len(listed) == len(set(listed)) == 40 + 9 + 5 + 12
    chain = {slot: (position, before) for slot, position, before in listed}
    for row in rows:
        for position, slot in enumerate(row):
            assert chain[slot] == (position, row[position - 1] if position else -1)
    # The first request still runs: its path is locked.
    free = walk(world.tree, unlocked_only=True)
    assert len(free.slot_indices) == 5 + 12
    assert not set(free.slot_indices.tolist()) & set(rows[0])


def vars_of(found: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return found.slot_indices, found.positions, found.prev_slot_indices


PERTURBED = {
    "SGLANG_KV_CANARY_PERTURB_REAL_KV_USED_PROB": "1.0",
    "SGLANG_KV_CANARY_PERTURB_TARGET_GROUP": "full",
    "SGLANG_KV_CANARY_PERTURB_WARMUP_STEPS": "20",
}


@pytest.mark.gpu
@pytest.mark.slow
def test_a_sound_cache_passes_and_a_flipped_byte_is_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make_model(tmp_path / "model")
    on = {"kv_canary_real_data": "all", "kv_canary_sweep_interval": 8, "log_level": "info"}
    jobs = {
        "sound": engine(tmp_path / "model", {}, kv_canary="raise", **on),
        "flipped": engine(tmp_path / "model", PERTURBED, kv_canary="log", **on),
    }
    runs = {}
    for name, job in jobs.items():
        (tmp_path / name).mkdir()
        runs[name] = EngineRun([job], tmp_path / name, environment())
    (sound,) = runs["sound"].results()
    assert all(outputs(answer) for answer in sound["answers"][:-1])
    log = runs["sound"].log.read_text()
    assert "kv_canary violation" not in log and "[canary] sweep succeeded" in log
    runs["flipped"].results()
    log = runs["flipped"].log.read_text()
    assert "fail_reason=verify_real_kv_hash" in log
