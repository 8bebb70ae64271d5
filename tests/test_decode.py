"""Tree decode against dense float64 attention on the same packed bytes."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patternkv_kernels import DecodePlan, decode_reference, tree_decode, tree_decode_with_lse
from patternkv_kernels.decode_cuda import unsupported
from tests.cases import (
    CASES,
    DEVICES,
    DecodeCase,
    DecodeInputs,
    Segment,
    balanced_tree,
    dense_decode,
    make_inputs,
    random_tables,
    rings_afterwards,
)

OUT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}
LSE_TOLERANCE = 2e-5


def assert_matches(inputs: DecodeInputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    expected_out, expected_lse = dense_decode(inputs)
    assert out.dtype == inputs.q.dtype
    assert lse.dtype == torch.float32
    tolerance = OUT_TOLERANCE[inputs.case.dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


def ungrouped(inputs: DecodeInputs) -> DecodePlan:
    """The same reads with every segment listed once per row."""
    plan = inputs.plan
    segments, rows = [], []
    for i, segment in enumerate(inputs.case.tree):
        for row in segment.rows:
            segments.append(plan.segments[i].tolist())
            rows.append(row)
    return DecodePlan(
        plan.req_to_token,
        torch.tensor(segments, dtype=torch.int32),
        torch.arange(len(rows) + 1, dtype=torch.int32),
        torch.tensor(rows, dtype=torch.int32),
    )


def to_device(inputs: DecodeInputs, device: str) -> DecodeInputs:
    def move(value: object) -> object:
        fields = vars(value).items()
        moved = {name: x.to(device) for name, x in fields if isinstance(x, torch.Tensor)}
        return replace(value, **moved)  # type: ignore[type-var]

    return replace(
        inputs,
        q=inputs.q.to(device),
        buffer=inputs.buffer.to(device),
        tables=move(inputs.tables),
        plan=move(inputs.plan),
        window=None if inputs.window is None else move(inputs.window),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_dense_attention(case: DecodeCase) -> None:
    inputs = make_inputs(case)
    assert_matches(inputs, *tree_decode_with_lse(*inputs.args, **inputs.options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_torch_ops_match_dense_attention_on_cuda(case: DecodeCase) -> None:
    inputs = make_inputs(case)
    on_device = to_device(inputs, "cuda")
    out, lse = tree_decode_with_lse(*on_device.args, **on_device.options, impl="reference")
    assert_matches(inputs, out.cpu(), lse.cpu())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grouped_equals_ungrouped(case: DecodeCase) -> None:
    inputs = make_inputs(case, seed=1)
    grouped, grouped_lse = tree_decode_with_lse(*inputs.args, **inputs.options)
    alone = replace(inputs, plan=ungrouped(inputs))
    separate, separate_lse = tree_decode_with_lse(*alone.args, **alone.options)
    tolerance = OUT_TOLERANCE[case.dtype]
    torch.testing.assert_close(grouped, separate, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grouped_lse, separate_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@st.composite
def trees(draw: st.DrawFn) -> list[Segment]:
    """Random forests: every node's rows are split among its children at random, down to random
    depths."""
    lengths = st.one_of(st.integers(0, 3), st.integers(0, 70), st.integers(250, 530))
    segments: list[Segment] = []

    def grow(rows: tuple[int, ...], depth: int) -> None:
        segments.append(Segment(draw(lengths), rows))
        if depth == 4 or draw(st.booleans()):
            return
        cut = draw(st.integers(0, len(rows)))
        for part in (rows[:cut], rows[cut:]):
            if part:
                grow(part, depth + 1)

    b = draw(st.integers(1, 9))
    cut = draw(st.integers(0, b))
    for root in (tuple(range(cut)), tuple(range(cut, b))):
        if root:
            grow(root, 0)
    return segments


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tree=trees(), window=st.sampled_from([0, 8]), page_size=st.sampled_from([1, 16]))
def test_random_trees(tree: list[Segment], window: int, page_size: int) -> None:
    case = DecodeCase("random", tree=tree, window=window, page_size=page_size, bits=(4, 2))
    inputs = make_inputs(case)
    assert_matches(inputs, *tree_decode_with_lse(*inputs.args, **inputs.options))


def test_same_inputs_give_the_same_bits() -> None:
    case = next(case for case in CASES if case.name == "depth4")
    first, second = make_inputs(case), make_inputs(case)
    assert torch.equal(
        tree_decode(*first.args, **first.options), tree_decode(*second.args, **second.options)
    )


def test_rows_without_tokens_are_zero() -> None:
    inputs = make_inputs(DecodeCase("empty", tree=[Segment(0, (0, 1)), Segment(4, (1,))]))
    out, lse = tree_decode_with_lse(*inputs.args, **inputs.options)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert (out[1] != 0).any()
    assert lse[1].isfinite().all()


def test_rows_beyond_the_plan_read_nothing() -> None:
    inputs = make_inputs(DecodeCase("short", tree=[Segment(4, (0,))]))
    padded = replace(inputs, q=inputs.q.repeat(3, 1, 1))
    out, lse = tree_decode_with_lse(*padded.args, **padded.options)
    assert_matches(inputs, out[:1], lse[:1])
    assert (lse[1:] == -torch.inf).all()


def test_huge_logits_do_not_overflow() -> None:
    inputs = make_inputs(DecodeCase("huge", window=8))
    loud = replace(inputs, q=inputs.q * 200)
    out, lse = tree_decode_with_lse(*loud.args, **loud.options)
    expected_out, expected_lse = dense_decode(loud)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-2, atol=1e-2)


def test_a_plan_is_lowered_once_and_forgotten_with_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lowered = []

    def lower(plan: DecodePlan) -> object:
        lowered.append(1)
        return original(plan)

    original = decode_reference._lower
    monkeypatch.setattr(decode_reference, "_lower", lower)
    gc.collect()
    kept = len(decode_reference._lowered)
    inputs = make_inputs(DecodeCase("cached"))
    first = tree_decode(*inputs.args, **inputs.options)
    assert torch.equal(first, tree_decode(*inputs.args, **inputs.options))
    assert len(lowered) == 1
    # The same tensors in another plan: another step, which may have changed them in place.
    tree_decode(*replace(inputs, plan=replace(inputs.plan)).args, **inputs.options)
    assert len(lowered) == 2
    del inputs
    gc.collect()
    assert len(decode_reference._lowered) == kept


def test_plans_and_queries_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(CASES[0])
    with pytest.raises(ValueError, match="batch row 3"):
        tree_decode(inputs.q[:2], *inputs.args[1:], **inputs.options)
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        tree_decode(inputs.q[:, :5], *inputs.args[1:], **inputs.options)
    other = replace(inputs, fmt=replace(inputs.fmt, h_kv=3))
    with pytest.raises(ValueError, match=r"needs a contiguous uint8 \[num_pages, 216\]"):
        tree_decode(*other.args, **other.options)
    narrow = replace(inputs, tables=random_tables(1, inputs.fmt.head_dim, seed=0))
    with pytest.raises(ValueError, match="do not fit 2 KV heads"):
        tree_decode(*narrow.args, **narrow.options)


def decode_with_window(inputs: DecodeInputs, **changes: torch.Tensor) -> None:
    assert inputs.window is not None
    changed = replace(inputs, window=replace(inputs.window, **changes))
    tree_decode(*changed.args, **changed.options)


def test_new_tokens_must_fit_the_window() -> None:
    inputs = make_inputs(DecodeCase("window", window=8))
    window = inputs.window
    assert window is not None
    decode = partial(decode_with_window, inputs)
    rows = f"{len(inputs.q)} rows with rings"
    with pytest.raises(ValueError, match=rows):
        decode(new_k=window.new_k[1:])
    with pytest.raises(ValueError, match=rows):
        decode(new_v=window.new_v[:, :1])
    with pytest.raises(ValueError, match=r"rings are torch.float32 and tokens torch.float64"):
        decode(new_v=window.new_v.double())


def test_a_window_that_kernels_would_misread_is_refused() -> None:
    inputs = make_inputs(DecodeCase("window", window=8))
    window = inputs.window
    assert window is not None
    wider = window.k.repeat(1, 2, 1, 1)
    for changes, message in (
        ({"ring": window.ring.int()}, "ring is torch.int32"),
        ({"start": window.start[1:]}, r"start is torch.int64 \["),
        ({"end": window.end.double()}, "end is torch.float64"),
        ({"v": wider}, "both alike"),
        ({"k": wider[:, ::2], "v": wider[:, ::2]}, "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_with_window(inputs, **changes)


def test_only_contiguous_tables_are_for_kernels() -> None:
    inputs = make_inputs(DecodeCase("plain"))
    tables = inputs.tables
    sparse = replace(tables, patterns=tables.patterns.repeat_interleave(2, -1)[..., ::2])
    reasons = [
        unsupported(inputs.q.half(), inputs.fmt, own, None, inputs.plan) for own in (tables, sparse)
    ]
    assert reasons == [None, "the tables are not contiguous"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "branches"), [(1, 4), (8, 4), (8, 70)])
def test_windows_keep_the_newest_token(size: int, branches: int, device: str) -> None:
    """Bit by bit, and nothing else changes; on a GPU the kernels put it there."""
    tree = balanced_tree(1, branches, 70, [5, 0, 34])
    inputs = make_inputs(DecodeCase("window", window=size, dtype=torch.bfloat16, tree=tree))
    assert inputs.window is not None
    expected = rings_afterwards(inputs.window)
    on_device = to_device(inputs, device)
    window = on_device.window
    assert window is not None
    tree_decode(*on_device.args, **on_device.options)
    for ring, kept in zip((window.k, window.v), expected, strict=True):
        assert torch.equal(ring.cpu().view(torch.int16), kept)


def test_the_newest_token_need_not_be_contiguous() -> None:
    """Serving hands over slices of a fused projection."""
    inputs = make_inputs(DecodeCase("window", window=8))
    window = inputs.window
    assert window is not None
    fused = torch.stack((window.new_k, window.new_v), dim=1).flatten(1, 2)
    heads = window.new_k.shape[1]
    sliced = replace(inputs, window=replace(window, new_k=fused[:, :heads], new_v=fused[:, heads:]))
    out, lse = tree_decode_with_lse(*sliced.args, **sliced.options)
    assert_matches(inputs, out, lse)
