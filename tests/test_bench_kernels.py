"""The pure parts of the kernel benchmark: cases, layout, byte model, targets; the rest on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import baselines
from benchmarks.baselines import FlashInfer
from benchmarks.bench_kernels import main
from benchmarks.kernel_bench import PackedCache, dequantized
from benchmarks.kernel_cases import (
    H_KV,
    H_Q,
    HEAD_DIM,
    PAGE,
    PLAN_TARGET_US,
    PROMPTS,
    QUICK_SWEEP,
    SWEEP,
    TARGETS,
    TREES,
    Case,
    Level,
    flat,
    private,
    suites,
)
from benchmarks.kernel_inputs import (
    KV,
    Tree,
    build_tree,
    random_kv,
    random_pool,
    random_queries,
    random_tables,
)
from benchmarks.kernel_results import markdown
from benchmarks.roofline import packed_bytes, roofline_us, unpacked_bytes
from benchmarks.timing import Timing
from patternkv_kernels import SlotFormat, tree_decode
from patternkv_sgl.pool import SLOTS_PER_PAGE
from recipes.environment import git_commit

CPU = torch.device("cpu")
SMALL = [
    flat(3, 32, 16),
    flat(1, 16, 0),
    flat(4, 16, 0),
    private(3, 32),
    Case((Level(1, 32), Level(2, 16), Level(4, 32))),
    Case((Level(2, 16), Level(4, 48), Level(4, 16), Level(8, 0))),
]


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


# The cases.


def test_design_cases() -> None:
    assert names(suites("all", quick=False)["design"]) == [
        "4x(32768+512)",
        "8x(32768+512)",
        "16x(32768+512)",
        "32x(16384+512)",
        "64x(32768+1024)",
        "16x32768",
        "4x32768",
    ]
    assert [list(targets.values()) for targets in TARGETS.values()] == [
        [20, 17],
        [22, 19],
        [26, 24],
        [28, 26],
        [75, 70],
        [190, 130],
        [55, 40],
    ]
    assert all(list(targets) == [(4, 4), (2, 2)] for targets in TARGETS.values())


@pytest.mark.parametrize("cells", [SWEEP, QUICK_SWEEP], ids=["full", "quick"])
def test_sweep_spans_the_grid(cells: list[Case]) -> None:
    assert {1, 128} <= {case.branches for case in cells}
    assert {1024, 32768} <= {case.shared for case in cells}
    assert {0, 512} <= {case.own for case in cells}


def test_no_case_is_measured_twice() -> None:
    every = [case for cases in suites("all", quick=False).values() for case in cases]
    assert len(set(names(every))) == len(every)
    assert max(case.shared for case in SWEEP) == 131072
    assert max(case.own for case in SWEEP) == 8192


def test_trees_have_two_and_three_shared_levels() -> None:
    assert {len(case.levels) - 1 for case in TREES} == {2, 3}


def test_case_counts() -> None:
    case = Case((Level(1, 100), Level(2, 10), Level(4, 1)))
    assert (case.branches, case.shared, case.own, case.context) == (4, 110, 1, 111)
    assert (case.tokens, case.tables) == (124, 3)
    assert (private(3, 7).shared, private(3, 7).own, private(3, 7).tables) == (0, 7, 3)


def test_levels_must_nest() -> None:
    with pytest.raises(ValueError, match="each must divide the next"):
        Case((Level(2, 8), Level(3, 8)))


# The layout.


@pytest.mark.parametrize("shuffle", [False, True], ids=["in_order", "shuffled"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("case", SMALL, ids=names(SMALL))
def test_plan_covers_every_position_once(case: Case, page_size: int, shuffle: bool) -> None:
    tree = build_tree(case, page_size, "cpu", shuffle=shuffle)
    slots, indptr, rows = tree.plan.req_to_token, tree.plan.row_indptr, tree.plan.rows
    covered = [[0] * case.context for _ in range(case.branches)]
    used: list[int] = []
    for i, (request, start, end, table) in enumerate(tree.plan.segments.tolist()):
        run = slots[request, start:end]
        used += run.tolist()
        assert tree.slot_tables[run].eq(table).all() and 0 <= table < case.tables
        for row in rows[indptr[i] : indptr[i + 1]].tolist():
            assert slots[row, start:end].equal(run), "readers of a segment share its slots"
            for position in range(start, end):
                covered[row][position] += 1
    assert covered == [[1] * case.context] * case.branches
    assert sorted(used) == list(range(case.tokens)), "every slot belongs to one segment"
    at_page_starts = slots[:, ::page_size]
    assert at_page_starts.equal(tree.pages * page_size)


def test_prompts_lie_together_and_generated_text_takes_turns() -> None:
    assert build_tree(flat(3, 4, 2), 1, "cpu").pages.tolist() == [
        [0, 1, 2, 3, 4, 7],
        [0, 1, 2, 3, 5, 8],
        [0, 1, 2, 3, 6, 9],
    ]
    assert build_tree(private(2, 3), 1, "cpu").pages.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_generated_text_uses_the_table_above_it() -> None:
    tree = build_tree(Case((Level(1, 4), Level(2, 4), Level(4, 4))), 1, "cpu")
    assert tree.plan.segments[:, 3].tolist() == [0, 1, 2, 1, 1, 2, 2]


def test_lengths_must_be_whole_pages() -> None:
    with pytest.raises(ValueError, match="page_size=16"):
        build_tree(flat(2, 32, 8), 16, "cpu")


# The byte model and the statistics.


def test_packed_bytes_by_hand() -> None:
    fmt = SlotFormat(4, 4, HEAD_DIM, h_kv=H_KV)
    tokens = 32768 + 4 * 512
    table = 2 * 8 * (64 + 1) * 128 * 2  # K and V, heads, patterns and channel scales, float16
    queries = 2 * 4 * 32 * 128 * 2  # in and out, bfloat16
    expected = tokens * (8 * 134 + 4) + table + queries
    assert packed_bytes(flat(4, 32768, 512), fmt, 64) == expected == 37_793_792
    assert roofline_us(expected, 4270) == pytest.approx(8.851, abs=1e-3)


def test_packed_bytes_of_private_prompts_in_pages() -> None:
    fmt = SlotFormat(2, 2, HEAD_DIM, 16, h_kv=H_KV)
    table = 2 * 8 * 257 * 128 * 2
    expected = 16 * 32768 * (8 * 70 + 4) + 16 * table + 2 * 16 * 32 * 128 * 2
    assert packed_bytes(private(16, 32768), fmt, 256) == expected


def test_unpacked_bytes_by_hand() -> None:
    assert unpacked_bytes(private(16, 32768), torch.bfloat16) == 2 * 1024**3
    assert unpacked_bytes(private(16, 32768), torch.float8_e4m3fn) == 1024**3


def test_percentiles() -> None:
    assert Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Timing(us=3.5, p20=2.0, p80=5.0)


# The results.


def test_pages_are_those_of_the_pool() -> None:
    assert PAGE == SLOTS_PER_PAGE


def rows_at_target(factor: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "suite": "design",
            "case": case.name,
            "bits_k": bits[0],
            "bits_v": bits[1],
            "page": PAGE,
            "shuffle": False,
            "us": factor * us,
            "roofline_us": us / 2,
            "flashinfer_us": 4.0 * us,
            "flashinfer_fp8_us": 2.0 * us,
            "cascade_us": None,
            "copy_gbps": 4270.0,
            "matmul_tflops": 790.0,
            "gpu": "NVIDIA H200",
            "versions": {"torch": "2.14.1"},
            "commit": "abc",
        }
        for case, targets in TARGETS.items()
        for bits, us in targets.items()
    ]


def planned(us: float = PLAN_TARGET_US) -> dict[str, Any]:
    return rows_at_target()[0] | {"case": PROMPTS[0].name, "plan_us": us}


def check(rows: list[dict[str, Any]], folder: Path) -> int:
    file = folder / "kernels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return main(["--check", "--out", str(file)])


def test_check_accepts_what_reaches_the_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check([*rows_at_target(), planned()], tmp_path) == 0
    assert capsys.readouterr().out == "every target is reached\n"


def test_check_prints_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_at_target(0.9)
    rows[1]["us"] = 25.5
    assert check([*rows, planned()], tmp_path) == 1
    assert capsys.readouterr().out == "4x(32768+512) 2/2: 25.5 us, target 17 us (50 % over)\n"


@pytest.mark.parametrize("other", [{"page": 1}, {"shuffle": True}], ids=["paged", "shuffled"])
def test_check_misses_what_was_measured_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any]
) -> None:
    rows = rows_at_target(0.5)
    rows[0] |= other
    assert check([*rows, planned()], tmp_path) == 1
    assert capsys.readouterr().out == "4x(32768+512) 4/4: not measured, target 20 us\n"


@pytest.mark.parametrize(
    ("plans", "missed"),
    [([], "not measured, target 50 us"), ([30.0, 60.0], "60.0 us, target 50 us (20 % over)")],
)
def test_check_prints_a_slow_planner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plans: list[float], missed: str
) -> None:
    assert check([*rows_at_target(), *map(planned, plans)], tmp_path) == 1
    assert capsys.readouterr().out == f"8x2048/256x512 planned: {missed}\n"


def test_markdown_has_a_line_per_case_and_shows_losses() -> None:
    rows = rows_at_target()
    rows[0]["us"] = 80.0
    lines = markdown(rows).splitlines()
    losing = "80.0 · – · 17.0 | 12 · – · 50 | 0.50 · – · 2.00"
    assert f"| 4x(32768+512) | 80 | 40 | – | {losing} |" in lines
    assert sum(line.startswith("| ") for line in lines) == len(TARGETS) + 2
    assert "commit abc" in lines[-1]


def test_commit_without_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git
    assert git_commit() is None
    monkeypatch.setenv("PATTERNKV_COMMIT", "abc")
    assert git_commit() == "abc"


# Against attention written out, on the CPU.


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and base-2 log-sum-exp of rows ``[n, h_q, d]`` over K and V ``[length, h_kv, d]``."""
    k, v = (x.float().repeat_interleave(H_Q // H_KV, dim=1) for x in (k, v))
    logits = torch.einsum("nhd,thd->nht", q.float(), k) * HEAD_DIM**-0.5
    out = torch.einsum("nht,thd->nhd", logits.softmax(2), v)
    return out, logits.logsumexp(2) * torch.tensor(2.0).log().reciprocal()


def dense(tree: Tree, q: torch.Tensor, kv: KV) -> torch.Tensor:
    """Every branch over its own pages."""
    contexts = [[x[pages.long()].flatten(0, 1) for x in kv] for pages in tree.pages]
    return torch.cat([attention(q[i : i + 1], k, v)[0] for i, (k, v) in enumerate(contexts)])


class FakeWrapper:
    """A FlashInfer wrapper of the same calls: ``indptr`` of queries, lists of pages, a run."""

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert layout == "NHD" and options["backend"] == "fa2"
        self.is_decode = options.get("use_tensor_cores", False)

    def plan(self, *args: Any, **dtypes: Any) -> None:
        one_each = torch.arange(len(args[0]), dtype=torch.int32)
        args = (one_each, *args) if self.is_decode else args
        self.queries, self.indptr, self.pages, self.last, *shape = args
        assert shape[:3] == [H_Q, H_KV, HEAD_DIM] and set(self.last.tolist()) == {shape[3]}
        assert self.indptr[-1] == len(self.pages) and dtypes["q_data_type"] == torch.bfloat16
        assert {x.dtype for x in args[:4]} == {torch.int32}

    def run(
        self,
        q: torch.Tensor,
        kv: KV,
        *,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> None:
        assert return_lse == (lse is not None) and len(q) == self.queries[-1]
        for node in range(len(self.last)):
            rows = slice(int(self.queries[node]), int(self.queries[node + 1]))
            pages = self.pages[self.indptr[node] : self.indptr[node + 1]].long()
            output, log_sum = attention(q[rows], *(x[pages].flatten(0, 1) for x in kv))
            out[rows] = output.to(out.dtype)
            if lse is not None:
                lse[rows] = log_sum


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor
) -> None:
    total = torch.logaddexp2(s, s_other)
    weight, weight_other = (torch.exp2(x - total).unsqueeze(2) for x in (s, s_other))
    v.copy_(weight * v + weight_other * v_other)
    s.copy_(total)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashInfer:
    fake = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=FakeWrapper,
        BatchPrefillWithPagedKVCacheWrapper=FakeWrapper,
        merge_state_in_place=merge_state_in_place,
        cascade=SimpleNamespace(get_cascade_module=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(baselines, "_WORKSPACE_BYTES", 16)
    return FlashInfer(CPU)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("case", SMALL, ids=names(SMALL))
def test_baselines_attend_each_branch_to_its_context(
    case: Case, page_size: int, flashinfer: FlashInfer
) -> None:
    flashinfer.compile()
    tree = build_tree(case, page_size, CPU, shuffle=True)
    q, kv = random_queries(case, CPU), random_kv(tree, torch.bfloat16)
    expected = dense(tree, q, kv)
    for decode in (flashinfer.flat(tree, torch.bfloat16), flashinfer.cascade(tree)):
        torch.testing.assert_close(decode(q, kv).float(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [(4, 4), (4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
def test_our_plan_and_the_dequantized_cache_agree(bits: tuple[int, int], page_size: int) -> None:
    case = SMALL[4]
    tree = build_tree(case, page_size, CPU)
    fmt = SlotFormat(*bits, HEAD_DIM, page_size, h_kv=H_KV)
    tables = random_tables(case, 16, CPU)
    cache = PackedCache(fmt, random_pool(fmt, tree, 16), tables)
    q, scale = random_queries(case, CPU), HEAD_DIM**-0.5
    out = tree_decode(q, fmt, cache.pool, tables, tree.plan, window=None, sm_scale=scale)
    expected = dense(tree, q, dequantized(tree, cache))
    assert float((out - expected).norm() / expected.norm()) < 0.01


def test_headers_alone_are_no_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__path__=["/site/flashinfer"]))
    with pytest.raises(ImportError, match="/site/flashinfer"):
        FlashInfer(CPU)


def test_a_missing_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^error: --device cuda: no GPU here; --device cpu "):
        main(["--out", str(tmp_path / "rows.jsonl")])


def test_smoke_run_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 0
    assert sum(line.startswith("2x(64+64)") for line in capsys.readouterr().out.splitlines()) == 3
