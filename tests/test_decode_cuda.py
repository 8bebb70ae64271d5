"""The CUDA decode kernels against float64 attention over the same packed bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from patternkv_kernels import (
    DecodePlan,
    DecodeShape,
    DecodeWorkspace,
    SlotSource,
    dequantize,
    plan_decode,
    tree_decode,
    tree_decode_with_lse,
)
from tests.cases import (
    BITS_KV,
    CASES,
    DecodeCase,
    DecodeInputs,
    Segment,
    balanced_tree,
    dense_decode,
    make_inputs,
    to_list,
    window_tokens,
)
from tests.test_decode import to_device, ungrouped

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16

# From easy to hard. A tree of `balanced_tree(depth, branches, shared, private)`.
HARD_CASES = [
    *(
        DecodeCase(f"narrow{k}{v}_d{d}", bits=(k, v), d=d, group=4, num_patterns=64)
        for k, v in BITS_KV
        for d in (64, 96, 128, 256)
    ),
    *(
        DecodeCase(
            f"wide{b}_{k}{v}_d{d}",
            bits=(k, v),
            d=d,
            group=4,
            num_patterns=64,
            tree=balanced_tree(1, b, 700, [30, 0, 1]),
        )
        for b, k, v, d in (
            *((16, k, v, d) for k, v in BITS_KV for d in (64, 96, 128, 256)),
            (3, 4, 4, 128),
            (4, 2, 2, 128),
            (7, 4, 2, 128),
            (8, 4, 4, 128),
            (128, 2, 2, 128),
        )
    ),
    *(
        DecodeCase(
            f"patterns{m}_{b}",
            bits=(2, 2),
            d=128,
            group=4,
            num_patterns=m,
            tree=balanced_tree(1, b, 400, [77]),
        )
        for m in (1, 5, 65, 100, 128, 256)
        for b in (1, 4, 8, 12)
    ),
    *(
        DecodeCase(
            f"group{g}_{b}", d=128, group=g, h_kv=2, window=8, tree=balanced_tree(2, b, 300, [40])
        )
        for g in (1, 2, 7, 8, 16)
        for b in (1, 5, 20)
    ),
    *(
        DecodeCase(f"page{p}_{h}", page_size=p, h_kv=h, d=128, group=4, bits=(2, 2), window=32)
        for p in (1, 3, 16, 64)
        for h in (1, 2, 8)
    ),
    DecodeCase("depth5", d=128, group=4, tree=balanced_tree(5, 32, 400, [9, 1, 140]), window=32),
    DecodeCase("one_token", d=128, group=4, tree=balanced_tree(1, 64, 1, [0])),
    DecodeCase(
        "many_segments", group=1, h_kv=1, tree=[Segment(i % 37, (i % 5,)) for i in range(700)]
    ),
    DecodeCase(
        "deep_chain", group=4, h_kv=1, tree=[Segment(20, tuple(range(i, 64))) for i in range(64)]
    ),
    DecodeCase("cap_wide", d=128, group=4, logit_cap=5.0, tree=balanced_tree(1, 16, 500, [60])),
    DecodeCase("long_private", d=128, group=4, h_kv=1, tree=[Segment(131072, (0,))]),
    DecodeCase("long_shared", d=128, group=4, h_kv=1, tree=[Segment(131072, (0, 1, 2, 3, 4))]),
]


def ids(case: DecodeCase) -> str:
    return case.name


def low_precision(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The same attention as a model without a quantized cache computes it: K, V, products and
    probabilities in ``q.dtype``. Its error is the measure for the kernel's."""
    case, dtype = inputs.case, inputs.q.dtype
    b, h_q, d = inputs.q.shape
    out, lse = torch.zeros(b, h_q, d).double(), torch.full((b, h_q), -math.inf).double()
    dense = [
        dequantize(
            inputs.fmt,
            inputs.buffer,
            slots,
            inputs.tables,
            torch.full((len(slots),), table),
            dtype=dtype,
        )
        for slots, table in zip(inputs.segment_slots, inputs.segment_tables, strict=True)
    ]
    for row in range(b):
        ks = [k for (k, _), segment in zip(dense, case.tree, strict=True) if row in segment.rows]
        vs = [v for (_, v), segment in zip(dense, case.tree, strict=True) if row in segment.rows]
        if inputs.window is not None:
            recent_k, recent_v = window_tokens(inputs.window, row)
            ks.append(recent_k)
            vs.append(recent_v)
        k, v = (torch.cat(x).repeat_interleave(case.group, dim=1) for x in (ks, vs))
        if len(k) == 0:
            continue
        logits = (inputs.q[row].unsqueeze(1) @ k.permute(1, 2, 0)).squeeze(1) * inputs.sm_scale
        if case.logit_cap:
            logits = case.logit_cap * torch.tanh(logits / case.logit_cap)
        lse[row] = logits.double().logsumexp(1)
        p = logits.float().softmax(1).to(dtype)
        out[row] = (p.unsqueeze(1) @ v.transpose(0, 1)).squeeze(1).double()
    return out, lse


def assert_as_good_as_low_precision(
    inputs: DecodeInputs, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """At most twice the error of low-precision torch, and one rounding of the output."""
    expected_out, expected_lse = dense_decode(inputs)
    torch_out, torch_lse = low_precision(inputs)
    empty = expected_lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, empty)
    assert (out.cpu()[empty] == 0).all()
    rounding = torch.finfo(inputs.q.dtype).eps * expected_out.abs().max()
    error = (out.cpu().double() - expected_out).abs().max()
    assert error <= 2 * (torch_out - expected_out).abs().max() + rounding
    lse_error = (lse.cpu().double() - expected_lse)[~empty].abs()
    limit = 2 * (torch_lse - expected_lse)[~empty].abs().amax() if len(lse_error) else 0
    assert (lse_error <= limit + 1e-3).all()


def run(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    on_device = to_device(inputs, "cuda")
    return tree_decode_with_lse(*on_device.args, **on_device.options, impl="cuda")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_matches_on_the_common_matrix(case: DecodeCase, nan_empty: None) -> None:
    inputs = make_inputs(replace(case, dtype=BF16))
    assert_as_good_as_low_precision(inputs, *run(inputs))


@pytest.mark.parametrize("case", HARD_CASES, ids=ids)
def test_matches_on_the_hard_matrix(case: DecodeCase, nan_empty: None) -> None:
    inputs = make_inputs(replace(case, dtype=FP16 if case.page_size > 1 else BF16))
    assert_as_good_as_low_precision(inputs, *run(inputs))


@pytest.mark.parametrize("branches", [1, 4, 16])
def test_error_is_a_fraction_of_half_precision(branches: int) -> None:
    """Codes, patterns and logits are exact inside: what remains are roundings to float16."""
    tree = balanced_tree(1, branches, 1000, [100])
    inputs = make_inputs(DecodeCase("fine", d=128, group=4, dtype=FP16, tree=tree))
    out, lse = run(inputs)
    expected_out, expected_lse = dense_decode(inputs)
    relative = (out.cpu().double() - expected_out).norm() / expected_out.norm()
    assert relative < 2e-3
    assert (lse.cpu().double() - expected_lse).abs().max() < 2e-3


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("branches", [1, 4, 16])
def test_extreme_logits(branches: int, scale: float) -> None:
    """Flat and peaked softmax, references that keep rising along a row."""
    tree = balanced_tree(1, branches, 1500, [200])
    inputs = make_inputs(DecodeCase("loud", d=128, group=4, dtype=BF16, tree=tree))
    inputs = replace(inputs, q=inputs.q * scale)
    assert_as_good_as_low_precision(inputs, *run(inputs))


@pytest.mark.parametrize("factor", [2.0**-16, 2.0**10])
@pytest.mark.parametrize("branches", [1, 16])
def test_extreme_value_scales(branches: int, factor: float) -> None:
    tree = balanced_tree(1, branches, 500, [200])
    inputs = make_inputs(DecodeCase("values", d=128, group=4, dtype=BF16, tree=tree))
    inputs.tables.patterns[:, 1] *= factor
    inputs.fmt.views(inputs.buffer).v_scale.mul_(factor)
    out, _ = run(inputs)
    expected_out, _ = dense_decode(inputs)
    relative = (out.cpu().double() - expected_out).norm() / expected_out.norm()
    assert relative < 2.0**-7


@pytest.mark.parametrize("name", ["depth5", "deep_chain", "many_segments", "wide16_44_d128"])
def test_same_inputs_give_the_same_bits(name: str) -> None:
    case = next(case for case in HARD_CASES if case.name == name)
    on_device = to_device(make_inputs(replace(case, dtype=BF16)), "cuda")
    first = tree_decode(*on_device.args, **on_device.options, impl="cuda")
    for _ in range(5):
        assert torch.equal(first, tree_decode(*on_device.args, **on_device.options, impl="cuda"))


@pytest.mark.parametrize("branches", [2, 4, 16, 40])
def test_grouped_equals_ungrouped(branches: int) -> None:
    """Other kernels read a segment when more rows share it, and one of them rounds K to float16:
    logits agree to its unit roundoff."""
    tree = balanced_tree(2, branches, 900, [50, 0, 300])
    inputs = make_inputs(DecodeCase("grouped", d=128, group=4, dtype=BF16, tree=tree))
    results = run(inputs), run(replace(inputs, plan=ungrouped(inputs)))
    for out, lse in results:
        assert_as_good_as_low_precision(inputs, out, lse)
    (grouped, grouped_lse), (separate, separate_lse) = results
    torch.testing.assert_close(grouped, separate, rtol=2.0**-7, atol=2.0**-7)
    torch.testing.assert_close(grouped_lse, separate_lse, rtol=2.0**-11, atol=1e-3)


def test_strided_queries() -> None:
    inputs = make_inputs(DecodeCase("strided", d=128, group=4, dtype=BF16))
    b, h_q, d = inputs.q.shape
    fused = torch.randn(b, h_q + 4, d).to(BF16)
    fused[:, :h_q] = inputs.q
    on_device = to_device(inputs, "cuda")
    strided = replace(on_device, q=fused.cuda()[:, :h_q])
    assert torch.equal(
        tree_decode(*strided.args, **strided.options, impl="cuda"),
        tree_decode(*on_device.args, **on_device.options, impl="cuda"),
    )


def padded(plan: DecodePlan, num_segments: int, nnz: int) -> list[torch.Tensor]:
    """The plan's ``segments, row_indptr, rows`` in arrays of fixed size: empty segments follow."""
    segments = torch.zeros(num_segments, 4, dtype=torch.int32)
    segments[: len(plan.segments)] = plan.segments
    indptr = torch.full((num_segments + 1,), int(plan.row_indptr[-1]), dtype=torch.int32)
    indptr[: len(plan.row_indptr)] = plan.row_indptr
    rows = torch.full((nnz,), -1, dtype=torch.int32)
    rows[: len(plan.rows)] = plan.rows
    return [segments, indptr, rows]


def test_one_graph_serves_any_tree() -> None:
    """A captured graph that lowers its plan follows the plan's tensors; its workspace may be larger
    than the batch."""
    trees = [
        balanced_tree(1, 16, 600, [30, 2]),
        balanced_tree(3, 16, 200, [300, 0, 1]),
        balanced_tree(0, 16, 0, [700, 80]),
    ]
    cases = [DecodeCase("graph", d=128, group=4, dtype=BF16, tree=tree) for tree in trees]
    inputs = [make_inputs(case, seed=i) for i, case in enumerate(cases)]
    static = [x.cuda() for x in padded(inputs[0].plan, 64, 128)]
    context = max(x.plan.req_to_token.shape[1] for x in inputs)
    req_to_token = torch.zeros(17, context, dtype=torch.int32, device="cuda")
    size = max(len(x.buffer) for x in inputs)
    buffer = torch.zeros(size, inputs[0].fmt.page_bytes, dtype=torch.uint8, device="cuda")
    q = torch.zeros_like(inputs[0].q, device="cuda")
    tables = to_device(inputs[0], "cuda").tables
    plan = DecodePlan(req_to_token, *static)
    fmt, (b, h_q, _) = inputs[0].fmt, q.shape
    shape = DecodeShape(fmt, tables.num_patterns, h_q, b + 3, 200, 4 * b * context)
    assert DecodeWorkspace.nbytes(shape, q.device) > 0
    workspace = DecodeWorkspace.allocate(shape, q.device)
    options = {**inputs[0].options, "workspace": workspace, "impl": "cuda"}

    def fill(x: DecodeInputs) -> None:
        for target, source in zip(static, padded(x.plan, 64, 128), strict=True):
            target.copy_(source)
        req_to_token[:, : x.plan.req_to_token.shape[1]].copy_(x.plan.req_to_token)
        buffer[: len(x.buffer)].copy_(x.buffer)
        q.copy_(x.q)
        for name in ("patterns", "channel_scale", "channel_weight"):
            getattr(tables, name).copy_(getattr(x.tables, name))

    def step() -> torch.Tensor:
        plan_decode(plan, workspace, b)
        return tree_decode(q, fmt, buffer, tables, plan, **options)

    fill(inputs[0])
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for x in (*inputs[1:], inputs[0]):
        fill(x)
        graph.replay()
        torch.testing.assert_close(out, run(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("own", [[50, 0, 700], [9000, 1]])
def test_listed_slots_are_those_of_the_segments(own: list[int]) -> None:
    tree = balanced_tree(2, 40, 900, own)
    case = DecodeCase("listed", d=64, group=4, dtype=BF16, tree=tree)
    on_host = make_inputs(case)
    plan, source = to_list(on_host.plan)
    inputs, listed = (to_device(replace(on_host, plan=of), "cuda") for of in (on_host.plan, plan))
    source = SlotSource(inputs.plan.req_to_token, source.sources.cuda(), source.num_tokens)
    shape = DecodeShape(
        inputs.fmt, inputs.tables.num_patterns, inputs.q.shape[1], 40, len(plan.rows), 400000
    )
    workspace = DecodeWorkspace.allocate(shape, inputs.q.device)
    plan_decode(listed.plan, workspace, 40, source)
    out = tree_decode(*listed.args, **listed.options, workspace=workspace, impl="cuda")
    assert torch.equal(out, tree_decode(*inputs.args, **inputs.options, impl="cuda"))
    assert (listed.plan.req_to_token[0, source.num_tokens :] == -1).all()


def test_what_the_kernels_cannot_take_is_refused() -> None:
    inputs = to_device(make_inputs(DecodeCase("float32")), "cuda")
    with pytest.raises(ValueError, match=r"q is torch\.float32"):
        tree_decode(*inputs.args, **inputs.options, impl="cuda")
    with pytest.raises(ValueError, match="impl='triton'"):
        tree_decode(*inputs.args, **inputs.options, impl="triton")
    inputs = to_device(make_inputs(DecodeCase("group17", group=17, h_kv=1, dtype=BF16)), "cuda")
    with pytest.raises(ValueError, match="17 query heads per KV head"):
        tree_decode(*inputs.args, **inputs.options, impl="cuda")
    auto = tree_decode(*inputs.args, **inputs.options)
    assert torch.equal(auto, tree_decode(*inputs.args, **inputs.options, impl="reference"))
