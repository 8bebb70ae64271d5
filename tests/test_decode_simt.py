"""The CUDA decode kernels without a GPU: their sources run on the CPU, thread by thread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import (
    CASES,
    DecodeCase,
    Segment,
    balanced_tree,
    dense_decode,
    make_inputs,
    rings_afterwards,
    to_list,
)
from tests.simt_decode import leaves_32_rows, separates_private_work, simt_decode
from tests.simt_library import unavailable
from tests.test_decode import ungrouped
from tests.test_decode_cuda import HARD_CASES, assert_as_good_as_low_precision

REASON = unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

BF16, FP16 = torch.bfloat16, torch.float16

# Of the GPU's hard matrix what takes a CPU at most a few seconds.
HARD = {
    *("narrow44_d128", "narrow22_d128", "wide3_44_d128", "wide4_22_d128", "wide8_44_d128"),
    *("wide16_42_d64", "patterns1_4", "patterns100_1", "patterns256_4", "group1_5", "group7_5"),
    *("group8_5", "group16_1", "page3_1", "page16_2", "page64_2", "one_token", "cap_wide"),
}

# What the kernels of compute capability 9.0 must get right besides: formats, dims, pages, large
# tables, all sizes of work items, chunks shorter than a tile.
HOPPER = {
    *("bits42", "bits24", "bits22", "d96", "d256", "group7", "group16", "page3", "depth4"),
    *("branches17", "branches64", "only_shared", "many_chunks", "wide8_44_d128", "wide4_22_d128"),
    *("wide16_42_d64", "patterns1_4", "patterns100_1", "patterns256_4", "one_token", "cap_wide"),
}


@pytest.mark.parametrize(
    "case",
    [*CASES, *(case for case in HARD_CASES if case.name in HARD)],
    ids=lambda case: case.name,
)
def test_matches_float64_attention(case: DecodeCase) -> None:
    inputs = make_inputs(replace(case, dtype=FP16 if case.page_size > 1 else BF16))
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs))


@pytest.mark.parametrize(
    "case",
    [case for case in [*CASES, *HARD_CASES] if case.name in HOPPER],
    ids=lambda case: case.name,
)
def test_hopper_match_float64_attention(case: DecodeCase) -> None:
    inputs = make_inputs(replace(case, dtype=FP16 if case.page_size > 1 else BF16))
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs, hopper=True))


@pytest.mark.parametrize(
    ("branches", "bits", "patterns"),
    [
        *((24, (4, 4), 64), (32, (2, 2), 64), (9, (4, 4), 64)),
        # Two groups of patterns, of which the second may be part of one.
        *((4, (2, 2), 65), (8, (4, 4), 100), (3, (4, 2), 128), (8, (2, 2), 96)),
    ],
)
def test_hopper_over_many_tiles(branches: int, bits: tuple[int, int], patterns: int) -> None:
    tree = [Segment(2100, tuple(range(branches)))]
    case = DecodeCase("tiles", bits=bits, d=128, group=4, h_kv=1, dtype=BF16, tree=tree)
    inputs = make_inputs(replace(case, num_patterns=patterns))
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs, hopper=True))


@pytest.mark.parametrize(
    ("group", "branches"), [(1, 40), (4, 17), (7, 10), (16, 5), (1, 9), (4, 3), (7, 4), (16, 2)]
)
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_windows(group: int, branches: int, cap: float) -> None:
    """Ahead of more than 32 query rows, and in the merge of fewer."""
    tree = balanced_tree(1, branches, 70, [5, 0, 34])
    shape = {"d": 128, "group": group, "h_kv": 2, "window": 8}
    inputs = make_inputs(DecodeCase("window", tree=tree, dtype=BF16, logit_cap=cap, **shape))
    window = inputs.window
    assert window is not None
    expected = rings_afterwards(window)
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs, hopper=True))
    for ring, kept in zip((window.k, window.v), expected, strict=True):
        assert torch.equal(ring.view(torch.int16), kept)


@pytest.mark.parametrize("exponent", [-12, -6, 5])
def test_hopper_with_scales_far_apart(exponent: int) -> None:
    """Every other token has scales of another size than the rest."""
    tree = [Segment(200, tuple(range(4)))]
    inputs = make_inputs(DecodeCase("scales", d=128, group=4, h_kv=1, dtype=FP16, tree=tree))
    views = inputs.fmt.views(inputs.buffer)
    for scale in (views.k_scale, views.v_scale):
        scale[::2] *= 2.0**exponent
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs, hopper=True))


@pytest.mark.parametrize("bits", [(4, 4), (2, 2)])
@pytest.mark.parametrize("factor", [2.0**-16, 2.0**10])
def test_values_dequantized_far_from_one(bits: tuple[int, int], factor: float) -> None:
    tree = [Segment(200, tuple(range(16)))]
    case = DecodeCase("values", bits=bits, d=128, group=4, h_kv=1, dtype=BF16, tree=tree)
    inputs = make_inputs(case)
    inputs.tables.patterns[:, 1] *= factor
    inputs.fmt.views(inputs.buffer).v_scale.mul_(factor)
    out, _ = simt_decode(inputs, hopper=True)
    expected, _ = dense_decode(inputs)
    assert (out.double() - expected).norm() / expected.norm() < 2.0**-7


@pytest.mark.parametrize("step", [0.25, 24.0])
def test_keys_far_larger_than_those_before(step: float) -> None:
    """Logits rise from tile to tile, by less and by more than powers of two in float32 reach."""
    tokens = 1600
    inputs = make_inputs(
        DecodeCase(
            "rising", d=128, group=4, h_kv=1, dtype=BF16, tree=[Segment(tokens, tuple(range(16)))]
        )
    )
    scale = inputs.fmt.views(inputs.buffer).k_scale
    for tile, token in enumerate(range(30, tokens, 64)):
        page, offset = divmod(int(inputs.segment_slots[0][token]), inputs.fmt.page_size)
        scale[page, :, offset] *= 1 + step * tile
    out, lse = simt_decode(inputs, hopper=True)
    expected, expected_lse = dense_decode(inputs)
    assert (out.double() - expected).norm() / expected.norm() < 2.0**-7
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize(("lengths", "by_many"), [((900, 100), True), ((100, 900), False)])
def test_the_planner_weighs_rows(lengths: tuple[int, int], by_many: bool) -> None:
    """A segment of 40 rows and one of 32: the costlier decides for both."""
    rows = tuple(range(10))
    tree = [Segment(lengths[0], rows), Segment(lengths[1], rows[:8])]
    inputs = make_inputs(DecodeCase("weighed", d=64, group=4, h_kv=1, dtype=BF16, tree=tree))
    assert leaves_32_rows(inputs, 33) is by_many
    assert leaves_32_rows(inputs, 0)
    assert not leaves_32_rows(inputs, 1000)


@pytest.mark.parametrize(
    ("shared", "own", "separate"), [(900, 10, False), (64, 3000, True), (0, 100, True)]
)
def test_little_private_work_joins_the_shared(shared: int, own: int, separate: bool) -> None:
    tree = [Segment(shared, (0, 1, 2, 3)), *(Segment(own, (row,)) for row in range(4))]
    inputs = make_inputs(DecodeCase("private", d=64, group=4, h_kv=1, dtype=BF16, tree=tree))
    assert separates_private_work(inputs) is separate


@pytest.mark.parametrize(("rows", "segments"), [(2, 1030), (1030, 2)])
def test_more_of_them_than_the_planner_has_threads(rows: int, segments: int) -> None:
    tree = [Segment(1 + i % 3, tuple(range(i % 2, rows, 2))) for i in range(segments)]
    inputs = make_inputs(DecodeCase("many", d=64, group=1, h_kv=1, dtype=BF16, tree=tree))
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs))


# Warps of a warpgroup alike, then one by one.
SCHEDULES = (0x000F, 0x00F0, 0x0F00, 0xF0F0, 0x1111, 0x5A3C)


@pytest.mark.parametrize("branches", [4, 16, 40])
def test_warps_may_lag_behind_each_other(branches: int) -> None:
    """By 16 rows, by one consumer with three producers, and by two of each, over more tiles than
    a block has room for."""
    tree = [Segment(3000, tuple(range(branches)))]
    inputs = make_inputs(DecodeCase("late", d=64, group=4, h_kv=1, dtype=BF16, tree=tree))
    expected = simt_decode(inputs, hopper=True)
    for schedule in SCHEDULES:
        found = simt_decode(inputs, hopper=True, schedule=schedule)
        for x, of in zip(found, expected, strict=True):
            assert torch.equal(x, of), f"{schedule=:#x}"


@pytest.mark.parametrize("hopper", [False, True])
def test_listed_slots_are_those_of_the_segments(hopper: bool) -> None:
    # More tokens than the blocks that list them have threads, and segments without tokens.
    tree = balanced_tree(2, 6, 900, [50, 0, 700])
    inputs = make_inputs(DecodeCase("listed", d=64, group=4, h_kv=1, dtype=BF16, tree=tree))
    listed, source = to_list(inputs.plan)
    assert source.num_tokens > 2048
    found = simt_decode(replace(inputs, plan=listed), hopper=hopper, source=source)
    for x, expected in zip(found, simt_decode(inputs, hopper=hopper), strict=True):
        assert torch.equal(x, expected)
    assert (listed.req_to_token[0, source.num_tokens :] == -1).all()


def test_all_of_the_chosen_cases_exist() -> None:
    assert set(HARD) <= {case.name for case in HARD_CASES}
    assert set(HOPPER) <= {case.name for case in [*CASES, *HARD_CASES]}


def test_grouped_equals_ungrouped() -> None:
    tree = balanced_tree(2, 8, 300, [50, 0, 130])
    inputs = make_inputs(DecodeCase("grouped", d=128, group=4, h_kv=1, dtype=BF16, tree=tree))
    grouped, grouped_lse = simt_decode(inputs)
    separate, separate_lse = simt_decode(replace(inputs, plan=ungrouped(inputs)))
    torch.testing.assert_close(grouped, separate, rtol=2.0**-7, atol=2.0**-7)
    torch.testing.assert_close(grouped_lse, separate_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("branches", "hopper", "patterns"),
    [
        *((1, False, 16), (4, False, 16), (1, True, 16), (4, True, 16), (20, True, 16)),
        (8, True, 90),
    ],
)
def test_references_that_keep_rising(branches: int, hopper: bool, patterns: int) -> None:
    """Logits far apart: sums are rescaled again and again along a row."""
    tree = [Segment(900, tuple(range(branches)))]
    case = DecodeCase("loud", d=128, group=4, h_kv=1, dtype=FP16, tree=tree)
    inputs = make_inputs(replace(case, num_patterns=patterns))
    inputs = replace(inputs, q=inputs.q * 30)
    assert_as_good_as_low_precision(inputs, *simt_decode(inputs, hopper=hopper))


@pytest.mark.parametrize("hopper", [False, True])
def test_what_is_not_named_is_not_read(hopper: bool) -> None:
    """Also where a tile reaches past the end of its segment: other slots hold NaN scales."""
    tree = balanced_tree(1, 4, 33, [1, 2, 31])
    inputs = make_inputs(DecodeCase("poison", d=128, group=4, h_kv=1, dtype=BF16, tree=tree))
    out, lse = simt_decode(inputs, hopper=hopper)
    assert out.isfinite().all() and lse.isfinite().all()
