"""The attention backend on small random batches against dense float64 attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

import patternkv_sgl.backend
from patternkv_kernels import dequantize
from patternkv_sgl.backend import PatternKVBackend
from patternkv_sgl.basis import KBasis
from patternkv_sgl.batch import (
    MAX_TREE_TOKENS,
    Batch,
    CurrentBatch,
    ExtendBatch,
    may_decode,
    plan_extend,
    read_batch,
)
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.metadata import DecodeBuffers
from patternkv_sgl.pool import PatternKVPool
from patternkv_sgl.scratch import Scratch, ScratchShape
from patternkv_sgl.segments import build_segments
from patternkv_sgl.tables import ZERO_TABLE
from tests.fakes import Scheduler

LAYERS, H_Q, H_KV, D = 2, 6, 2, 64
SCALING = D**-0.5
TIGHT = {"rtol": 2e-5, "atol": 2e-5}


pytestmark = pytest.mark.usefixtures("published")


def config(window: int = 0, **options: Any) -> PatternKVConfig:
    options = {"patterns": 8, "sinks": 2, "mine_tokens": 32, "check": True} | options
    return PatternKVConfig(window=window, **options)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logit_cap: float = 0.0
) -> torch.Tensor:
    """Attention of one query ``[h_q, d]`` over ``k``, ``v [n, h_kv, d]``, in float64."""
    k, v = (x.double().repeat_interleave(H_Q // H_KV, dim=1) for x in (k, v))
    logits = torch.einsum("hd,nhd->hn", q.double(), k) * SCALING
    if logit_cap:
        logits = logit_cap * torch.tanh(logits / logit_cap)
    return torch.einsum("hn,nhd->hd", logits.softmax(-1), v)


class Model(Scheduler):
    """A scheduler whose forwards run the backend, layer by layer, on random vectors.

    K and V of a token depend on its id and position alone, so equal prefixes have equal vectors.
    ``outputs`` holds what the last forward returned and ``expected`` the same from dense float64
    attention over the vectors that the pool holds and the exact ones that must not come from it.
    """

    def __init__(
        self,
        options: PatternKVConfig,
        *,
        dtype: torch.dtype = torch.float32,
        logit_cap: float = 0.0,
        **shape: Any,
    ) -> None:
        super().__init__(
            options,
            size=shape.pop("size", 1024),
            num_layers=LAYERS,
            h_kv=H_KV,
            head_dim=D,
            dtype=dtype,
            **shape,
        )
        self.current = CurrentBatch()
        geometry = self.pool.geometry
        balance = torch.ones(H_KV, D)
        balance[0, [3, 3 + D // 2]] = 0.125
        basis = KBasis(H_Q, balance, dtype=dtype, device="cpu")
        formats = geometry.slot_formats
        self.bases = {
            layer: basis for layer, fmt in enumerate(formats) if options.rotates(fmt.k_bits)
        }
        rows, context = self.rows.req_to_token.shape
        self.scratch_shape = ScratchShape(
            tuple(dict.fromkeys(formats)), options.patterns, H_Q, rows - 1, context, dtype
        )
        self.backend = PatternKVBackend(
            self.pool,
            self.rows.req_to_token,
            self.current,
            self.stats,
            Scratch(self.scratch_shape, torch.device("cpu")),
            self.bases,
        )
        self.dtype, self.logit_cap = dtype, logit_cap
        self.random = torch.Generator().manual_seed(5)
        # Clustered, with an outlier channel, as K is.
        self.vectors = torch.randn(LAYERS, 2, 512, H_KV, D, generator=self.random)
        self.vectors[:, 0, :, :, 3] *= 8
        self.queries = torch.randn(LAYERS, 512, H_Q, D, generator=self.random)
        self.exact_from: dict[str, int] = {}
        self.outputs: list[torch.Tensor] = []
        self.expected: list[torch.Tensor] = []

    @staticmethod
    def index(req: Req, positions: Sequence[int]) -> list[int]:
        """Which vectors the tokens at ``positions`` have."""
        text = [*req.origin_input_ids, *req.output_ids]
        return [(31 * text[p] + 7 * p) % 512 for p in positions]

    def exact(self, layer: int, req: Req, positions: Sequence[int]) -> torch.Tensor:
        """K and V of ``positions``, ``[2, n, h_kv, d]``."""
        return self.vectors[layer][:, self.index(req, positions)].to(self.dtype)

    def stored(self, layer: int, req: Req, end: int) -> torch.Tensor:
        """What the pool holds of positions [0, end), ``[2, end, h_kv, d]``, as the model knows
        K."""
        slots = self.row(req)[:end]
        pool = self.pool
        tables = pool.slot_table[slots]
        packed = pool.packed[layer]
        fmt = pool.slot_formats[layer]
        k, v = dequantize(fmt, packed, slots, pool.tables[layer], tables)
        return torch.stack([self.bases[layer].k_back(k) if layer in self.bases else k, v])

    def forward(self, batch: Batch, reqs: Sequence[Req], slots: torch.Tensor) -> None:
        extending = isinstance(batch, ExtendBatch)
        ends = [req.kv.kv_allocated_len for req in reqs]
        starts = [e.prefix_len for e in batch.extends] if extending else [n - 1 for n in ends]
        if isinstance(batch, ExtendBatch):
            kept = (extend.num_exact for extend in batch.extends)
            self.exact_from |= {
                req.rid: end - n for req, end, n in zip(reqs, ends, kept, strict=True)
            }
        for req, end in zip(reqs, ends, strict=True):
            # A step that joins a stored prompt has its last token in the window.
            self.exact_from.setdefault(req.rid, end - 1)
        forward_batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND if extending else ForwardMode.DECODE,
            req_pool_indices=torch.tensor([req.kv.req_pool_idx for req in reqs]),
            out_cache_loc=slots,
            seq_lens=torch.tensor(ends),
        )
        self.current.put(batch)
        self.backend.init_forward_metadata(forward_batch)
        self.outputs, self.expected = [], []
        run = self.backend.forward_extend if extending else self.backend.forward_decode
        for index in range(LAYERS):
            k, v = torch.cat(
                [
                    self.exact(index, req, range(start, end))
                    for req, start, end in zip(reqs, starts, ends, strict=True)
                ],
                dim=1,
            )
            positions = [
                position
                for req, start, end in zip(reqs, starts, ends, strict=True)
                for position in self.index(req, range(start, end))
            ]
            q = self.queries[index][positions].to(self.dtype)
            out = run(q.flatten(1), k.flatten(1), v.flatten(1), self.layer(index), forward_batch)
            assert out.shape == (len(slots), H_Q * D) and out.dtype == self.dtype
            self.outputs.append(out.view(-1, H_Q, D))
            self.expected.append(self.reference(index, q, reqs, starts, ends, extending))

    def layer(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            layer_id=index,
            tp_q_head_num=H_Q,
            tp_k_head_num=H_KV,
            tp_v_head_num=H_KV,
            qk_head_dim=D,
            v_head_dim=D,
            scaling=SCALING,
            logit_cap=self.logit_cap,
        )

    def reference(
        self,
        index: int,
        q: torch.Tensor,
        reqs: Sequence[Req],
        starts: list[int],
        ends: list[int],
        extending: bool,
    ) -> torch.Tensor:
        queries, out = iter(q), []
        window = self.backend.config.window
        for req, start, end in zip(reqs, starts, ends, strict=True):
            # From here on attention sees the exact vectors: the new tokens of an extend, those in
            # the window of a decode.
            first = start if extending else max(self.exact_from[req.rid], end - window)
            held = self.stored(index, req, first)
            recent = self.exact(index, req, range(first, end)).float()
            k, v = torch.cat([held, recent], dim=1)
            for seen in range(start + 1, end + 1):
                out.append(attend(next(queries), k[:seen], v[:seen], self.logit_cap))
        return torch.stack(out)

    def check(self, **tolerance: float) -> None:
        assert len(self.outputs) == LAYERS
        for out, expected in zip(self.outputs, self.expected, strict=True):
            torch.testing.assert_close(out.double(), expected, **(tolerance or TIGHT))


def tokens(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def sampled(reqs: Sequence[Req], step: int) -> list[int]:
    return [400 + 17 * step + 5 * req.kv.req_pool_idx for req in reqs]


# Extend


@pytest.mark.parametrize("logit_cap", [0.0, 20.0])
@pytest.mark.parametrize("page_size", [1, 16])
def test_extend_without_prefix_is_exact_causal_attention(page_size: int, logit_cap: float) -> None:
    model = Model(config(), page_size=page_size, logit_cap=logit_cap)
    reqs = [model.admit(tokens(100 * i, count)) for i, count in enumerate([1, 40, 7, 33])]
    model.extend(reqs)
    model.check()


@pytest.mark.parametrize("page_size", [1, 4])
def test_extend_over_a_stored_prefix(page_size: int) -> None:
    """Chunks anywhere, a prefix from the tree, prefixes of several tables and of none."""
    model = Model(config(), page_size=page_size)
    (base,) = model.prefill(tokens(0, 50))
    chunked = model.admit(tokens(200, 90))
    for length in (1, 37, 52):
        model.extend([chunked], [length])
        model.check()
        model.checkpoint(chunked)
    model.finish(base)
    reqs = [
        model.admit(prompt)
        for prompt in (
            tokens(0, 50) + tokens(300, 40),
            [*tokens(200, 90), 9],
            tokens(400, 5),
            [*tokens(0, 30), 1],
        )
    ]
    extends = model.extend(reqs)
    assert [e.prefix_len for e in extends] == [n // page_size * page_size for n in (50, 90, 0, 30)]
    model.check()


# Decode


@pytest.mark.parametrize("window", [0, 5])
def test_stored_k_may_be_rotated(window: int) -> None:
    """Every path that reads or writes stored K: mining, prefixes, decode, its window."""
    model = Model(config(window, k_bits=2, v_bits=2, rotate=True))
    model.prefill(tokens(0, 64))
    reqs = [*model.running, *model.prefill([*tokens(0, 64), 1], tokens(0, 64) + tokens(100, 34))]
    model.check()
    for step in range(2 * window + 2):
        model.decode(reqs, sampled(reqs, step))
        model.check()
    table = int(model.slot_table[model.row(reqs[0])[0]])
    first = model.exact(0, reqs[0], [0])[0]
    sink = model.pool.tables[0].k_patterns[table, :, 0]
    torch.testing.assert_close(sink.float(), model.bases[0].k(first)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [(4, 4), (4, 2), (2, 2)])
@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_is_dense_attention_over_what_is_stored(
    page_size: int, window: int, bits: tuple[int, int]
) -> None:
    """Branches of one prompt, a branch of a branch, and a stranger; three windows long."""
    k_bits, v_bits = bits
    model = Model(config(window, k_bits=k_bits, v_bits=v_bits), page_size=page_size)
    prompt = tokens(0, 64)
    model.prefill(prompt)
    model.prefill(prompt + tokens(100, 34))
    reqs = [
        *model.running,
        *model.prefill([*prompt, 1], prompt + tokens(100, 34) + [2], tokens(200, 21)),
    ]
    for step in range(3 * window + 2):
        assert model.decode(reqs, sampled(reqs, step))
        model.check()
    assert model.stats.max_branches == 4
    assert model.stats.kv_reads_shared > 0
    model.tree.check_integrity(model.slot_table)


def test_a_stored_question_is_answered_like_a_new_one() -> None:
    """Its end is in the window of every branch, whoever stored it first."""
    model = Model(config(5))
    model.prefill(tokens(0, 64))
    prompt = tokens(0, 64) + tokens(200, 3)
    answers = []
    for _ in range(3):
        (req,) = model.prefill(prompt)
        model.check()
        outputs = []
        for step in range(8):
            model.decode([req], [300 + step])
            model.check()
            outputs += model.outputs
        answers.append(torch.stack(outputs))
    for warm in answers[1:]:
        torch.testing.assert_close(warm, answers[0], **TIGHT)


def test_decode_in_the_model_dtype() -> None:
    model = Model(config(4), dtype=torch.bfloat16)
    reqs = model.prefill(tokens(0, 64), tokens(0, 64))
    for step in range(6):
        model.decode(reqs, sampled(reqs, step))
        model.check(rtol=2.0**-6, atol=2.0**-6)


def test_decode_with_a_logit_cap() -> None:
    model = Model(config(4), logit_cap=20.0)
    reqs = model.prefill(tokens(0, 64), tokens(0, 64))
    for step in range(6):
        model.decode(reqs, sampled(reqs, step))
        model.check()


def test_a_batch_padded_for_a_graph_decodes_the_same() -> None:
    """What a CUDA graph of four rows replays for two requests, run eagerly."""
    model = Model(config(4))
    reqs = model.prefill(tokens(0, 64), [*tokens(0, 64), 5])
    for step in range(5):
        batch = model.decode(reqs, sampled(reqs, step))
    assert batch is not None
    slots = torch.stack([model.row(req)[-1] for req in reqs])
    view = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=4, out_cache_loc=slots)
    model.current.put(batch)
    assert model.backend.can_replay()
    model.backend.init_forward_metadata_out_graph(view)
    padded = SimpleNamespace(out_cache_loc=torch.cat([slots, torch.zeros(2, dtype=torch.int64)]))
    for index in range(LAYERS):
        k, v = torch.cat(
            [model.exact(index, req, [req.kv.kv_allocated_len - 1]) for req in reqs], dim=1
        )
        at = [model.index(req, [req.kv.kv_allocated_len - 1])[0] for req in reqs]
        q = model.queries[index][at]
        q, k, v = (torch.cat([x, torch.full_like(x, 7.0)]) for x in (q, k, v))
        out = model.backend.forward_decode(
            q.flatten(1), k.flatten(1), v.flatten(1), model.layer(index), padded
        )
        assert torch.equal(out[:2].view(2, H_Q, D), model.outputs[index])
        assert (out[2:] == 0).all()
    model.tree.check_integrity(model.slot_table)


def test_a_capture_batch_reads_and_writes_only_padding() -> None:
    model = Model(config(4))
    before = [x.clone() for x in slot_bytes(model.pool)]
    batch = dummy(ForwardMode.DECODE, [0, 0])
    batch.batch_size = 2
    model.backend.init_forward_metadata_out_graph(batch, in_capture=True)
    q, kv = torch.ones(2, H_Q * D), torch.ones(2, H_KV * D)
    out = model.backend.forward_decode(q, kv, kv, model.layer(0), batch)
    assert out.isfinite().all()
    page = model.pool.page_size
    after = slot_bytes(model.pool)
    assert all(torch.equal(a[page:], b[page:]) for a, b in zip(before, after, strict=True))


def test_a_batch_larger_than_the_prepared_memory_decodes_outside_of_graphs() -> None:
    model = Model(config(4))
    reqs = model.prefill(tokens(0, 64), [*tokens(0, 64), 5], [*tokens(0, 64), 6])
    model.backend.planner.buffers = DecodeBuffers(model.rows.req_to_token, 2, 100, 1000)
    for step in range(3):
        batch = model.decode(reqs, sampled(reqs, step))
        model.check()
    model.current.put(batch)
    assert not model.backend.can_replay()


def test_graphs_without_kernels_are_refused() -> None:
    model = Model(config(4))
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu.*--disable-cuda-graph"):
        model.backend.init_cuda_graph_state(4, 4)


def test_a_request_joins_and_another_leaves_between_steps() -> None:
    """Rings belong to request rows, and a row's next request does not see its predecessor's."""
    model = Model(config(4), num_rows=2)
    first, second = model.prefill(tokens(0, 40), tokens(100, 40))
    for step in range(3):
        model.decode([first, second], sampled([first, second], step))
    row = second.kv.req_pool_idx
    model.finish(second)
    (third,) = model.prefill(tokens(200, 20))
    assert third.kv.req_pool_idx == row
    for step in range(3, 9):
        model.decode([third, first], sampled([third, first], step))
        model.check()


def test_a_retracted_request_decodes_from_its_own_stored_tokens() -> None:
    model = Model(config(4))
    (req,) = model.prefill(tokens(0, 40))
    for step in range(6):
        model.decode([req], sampled([req], step))
    model.retract(req)
    model.readmit(req)
    model.extend([req])
    model.check()
    model.decode([req], [3])
    model.check()


def run_steps(steps: int, window: int) -> list[torch.Tensor]:
    model = Model(config(window))
    prompt = tokens(0, 64)
    model.prefill(prompt)
    reqs = [*model.running, *model.prefill([*prompt, 1], prompt + tokens(100, 20), [*prompt, 1, 2])]
    outputs = []
    for step in range(steps):
        model.decode(reqs, sampled(reqs, step))
        outputs += model.outputs
    return [*outputs, torch.tensor([model.stats.kv_reads_shared])]


@pytest.mark.parametrize("window", [0, 4])
def test_grouped_decode_equals_ungrouped(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *grouped, saved = run_steps(6, window)
    monkeypatch.setattr(patternkv_sgl.batch, "build_segments", partial(build_segments, share=False))
    *alone, none_saved = run_steps(6, window)
    assert saved > 0 and none_saved == 0
    for a, b in zip(grouped, alone, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_decode_is_bitwise_the_same_from_run_to_run() -> None:
    for a, b in zip(run_steps(4, 4), run_steps(4, 4), strict=True):
        assert torch.equal(a, b)


def test_the_same_requests_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a request joins or leaves, or the tree changes a path, only ends of segments move."""
    built = []

    def count(*args: object, **kwargs: object) -> object:
        built.append(1)
        return build_segments(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(patternkv_sgl.batch, "build_segments", count)
    model = Model(config())
    reqs = model.prefill(tokens(0, 64), tokens(0, 64))

    def built_by_decoding(reqs: list[Req], step: int) -> int:
        built.clear()
        model.decode(reqs, sampled(reqs, step))
        return len(built)

    assert [built_by_decoding(reqs, step) for step in range(4)] == [1, 0, 0, 0]
    assert built_by_decoding(reqs[:1], 4) == 1
    model.admit([*tokens(0, 32), 999])  # splits the node of the prompt
    assert built_by_decoding(reqs[:1], 5) == 1
    (other,) = model.prefill(tokens(200, 40))
    assert built_by_decoding([*reqs, other], 6) == 1


def test_decode_counts_reads() -> None:
    model = Model(config())
    reqs = model.prefill(tokens(0, 64), tokens(0, 64), tokens(0, 64))
    model.decode(reqs, [1, 2, 3])
    assert model.stats.kv_reads == 3 * 65
    assert model.stats.kv_reads_shared == 2 * 64
    assert model.stats.max_branches == 3


# Bytes


def slot_bytes(pool: PatternKVPool) -> list[torch.Tensor]:
    """uint8 [num_slots, h_kv, bytes] of every layer."""
    layers = zip(pool.slot_formats, pool.packed, strict=True)
    return [
        torch.cat(list(fmt.sections(packed)), 3).transpose(1, 2).flatten(0, 1)
        for fmt, packed in layers
    ]


def stored_bytes(model: Model, req: Req) -> list[torch.Tensor]:
    """Packed slots of the prompt, and the content of its table, for every layer."""
    slots = model.row(req)[: len(req.origin_input_ids)]
    (table,) = set(model.slot_table[slots].tolist())
    assert table != ZERO_TABLE
    out = []
    for packed, tables in zip(slot_bytes(model.pool), model.pool.tables, strict=True):
        out += [
            packed[slots],
            tables.patterns[table],
            tables.channel_scale[table],
            tables.channel_weight[table],
        ]
    return out


@pytest.mark.parametrize("bits", [(4, 4), (4, 2), (2, 2)])
def test_the_bytes_of_a_prompt_do_not_depend_on_its_batch(bits: tuple[int, int]) -> None:
    k_bits, v_bits = bits
    options = config(k_bits=k_bits, v_bits=v_bits)
    prompt = tokens(0, 70)
    alone = Model(options)
    (req,) = alone.prefill(prompt)
    expected = stored_bytes(alone, req)
    assert all(x.any() for x in expected)
    for batch in ([prompt, tokens(100, 50)], [tokens(100, 33), tokens(300, 3), prompt]):
        model = Model(options)
        reqs = model.prefill(*batch)
        found = stored_bytes(model, reqs[batch.index(prompt)])
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


def test_later_steps_leave_stored_bytes_alone() -> None:
    model = Model(config(4), page_size=1)
    (req,) = model.prefill(tokens(0, 70))
    before = [x.clone() for x in stored_bytes(model, req)]
    others = model.prefill(tokens(0, 70) + tokens(300, 40), tokens(100, 60))
    for step in range(5):
        model.decode([req, *others], sampled([req, *others], step))
    for other in others:
        model.finish(other)
    model.evict(200)
    for a, b in zip(before, stored_bytes(model, req), strict=True):
        assert torch.equal(a, b)


def test_sinks_are_stored_exactly() -> None:
    model = Model(config(sinks=2), dtype=torch.bfloat16)
    (req,) = model.prefill(tokens(0, 70))
    for layer in range(LAYERS):
        held, exact = model.stored(layer, req, 2), model.exact(layer, req, [0, 1])
        assert torch.equal(held, exact.half().float())


def test_only_the_first_tokens_of_a_sequence_are_sinks() -> None:
    """A later chunk mines patterns for all its tokens; none of them is a sink."""
    model = Model(config(sinks=2), dtype=torch.bfloat16)
    req = model.admit(tokens(0, 110))
    for length in (1, 49, 60):
        model.extend([req], [length])
        model.checkpoint(req)
    for layer in range(LAYERS):
        held, exact = model.stored(layer, req, 110), model.exact(layer, req, range(110))
        same = (held == exact.half().float()).flatten(2).all(2)
        assert same[:, 1].all()  # position 1 starts the first chunk that mines
        assert not same[:, [2, 3, 50, 51]].any()


@pytest.mark.parametrize(("bits", "error"), [((4, 4), 0.02), ((2, 2), 0.3)])
def test_stored_tokens_are_near_the_exact_ones(bits: tuple[int, int], error: float) -> None:
    """Of the prompt and of decoded tokens: relative squared error, over K and V each."""
    model = Model(config(4, k_bits=bits[0], v_bits=bits[1]))
    (req,) = model.prefill(tokens(0, 64))
    for step in range(20):
        model.decode([req], sampled([req], step))
    for layer in range(LAYERS):
        held, exact = model.stored(layer, req, 84), model.exact(layer, req, range(84))
        squares = (held - exact).square().sum((2, 3)) / exact.square().sum((2, 3))
        for part in (squares[:, :64], squares[:, 64:]):
            assert part.mean(1).max() < error


# Prefill of one token each, run as a decode step


@pytest.mark.parametrize("window", [0, 4])
def test_branches_join_a_stored_prompt_in_a_decode_step(window: int) -> None:
    model = Model(config(window))
    model.prefill(tokens(0, 64))
    reqs = [model.admit(tokens(0, 64)) for _ in range(3)]
    model.extend(reqs, as_decode=True)
    model.check()
    assert (model.stats.kv_reads, model.stats.kv_reads_shared) == (3 * 64, 2 * 63)
    for req in reqs:
        model.checkpoint(req)
    for step in range(6):
        model.decode(reqs, sampled(reqs, step))
        model.check()


def test_branches_that_may_not_decode_stay_a_prefill() -> None:
    model = Model(config())
    model.prefill(tokens(0, 64))
    extends = model.extend([model.admit(tokens(0, 64)) for _ in range(2)])
    model.check()
    assert [extend.num_tokens for extend in extends] == [1, 1]
    assert model.stats.kv_reads == 0


@pytest.mark.parametrize("prompts", [[tokens(0, 64), tokens(0, 66)], [tokens(300, 1)]])
def test_more_tokens_or_no_prefix_stay_a_prefill(prompts: list[list[int]]) -> None:
    model = Model(config())
    model.prefill(tokens(0, 64))
    model.extend([model.admit(prompt) for prompt in prompts], as_decode=True)
    model.check()
    assert model.stats.kv_reads == 0


def test_few_tokens_read_their_prefix_as_rows_of_a_tree_while_there_are_rows() -> None:
    model = Model(config())
    model.prefill(tokens(0, 64))
    counts = [MAX_TREE_TOKENS, MAX_TREE_TOKENS + 1, 3, 1]
    reqs = [model.admit(tokens(0, 64) + tokens(100 * n, n)) for n in counts]
    reqs.append(model.admit(tokens(5000, 1)))  # has no prefix
    extends = model.extend(reqs)
    assert [extend.num_tokens for extend in extends] == [*counts, 1]

    def chosen(max_tree_rows: int) -> frozenset[int]:
        return plan_extend(model.tree, reqs, extends, max_tree_rows).tree_requests

    assert chosen(64) == chosen(MAX_TREE_TOKENS + 4) == {0, 2, 3}
    assert chosen(MAX_TREE_TOKENS + 3) == {0, 2}
    assert chosen(MAX_TREE_TOKENS + 2) == {0, 3}
    assert chosen(0) == frozenset()


PLAIN = {
    "forward_mode": ForwardMode.EXTEND,
    "return_logprob": False,
    "capture_hidden_mode": CaptureHiddenMode.NULL,
    "contains_mm_inputs": lambda: False,
    "input_embeds": None,
    "replace_embeds": None,
    "token_indices_to_pool": None,
    "mrope_positions": None,
    "spec_info": None,
    "global_num_tokens_cpu": None,
}


@pytest.mark.parametrize(
    "special",
    [
        {"forward_mode": ForwardMode.MIXED},
        {"forward_mode": ForwardMode.DECODE},
        {"return_logprob": True},
        {"capture_hidden_mode": CaptureHiddenMode.LAST},
        {"contains_mm_inputs": lambda: True},
        {"input_embeds": 0},
        {"replace_embeds": 0},
        {"token_indices_to_pool": 0},
        {"mrope_positions": 0},
        {"spec_info": 0},
        {"global_num_tokens_cpu": [1]},
    ],
)
def test_what_only_a_prefill_gives_keeps_it_one(special: dict[str, Any]) -> None:
    server = {"is_generation": True, "has_adapters": False}
    assert may_decode(SimpleNamespace(**PLAIN), **server)
    assert not may_decode(SimpleNamespace(**PLAIN), **server | {"is_generation": False})
    assert not may_decode(SimpleNamespace(**PLAIN), **server | {"has_adapters": True})
    assert not may_decode(SimpleNamespace(**PLAIN | special), **server)


# Batches without requests


def dummy(mode: ForwardMode, slots: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=torch.zeros(len(slots), dtype=torch.int64),
        out_cache_loc=torch.tensor(slots),
        seq_lens=torch.ones(len(slots), dtype=torch.int64),
        extend_prefix_lens_cpu=[0] * len(slots),
        extend_seq_lens_cpu=[1] * len(slots),
    )


def run_dummy(model: Model, batch: SimpleNamespace) -> torch.Tensor:
    model.backend.init_forward_metadata(batch)
    n = len(batch.out_cache_loc)
    q, k, v = torch.ones(n, H_Q * D), torch.ones(n, H_KV * D), torch.ones(n, H_KV * D)
    decode = batch.forward_mode.is_decode()
    run = model.backend.forward_decode if decode else model.backend.forward_extend
    return run(q, k, v, model.layer(0), batch)


MODES = [ForwardMode.EXTEND, ForwardMode.DECODE]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [0, 4])
def test_a_dummy_batch_touches_only_the_padding_page(mode: ForwardMode, window: int) -> None:
    model = Model(config(window), page_size=16)
    model.prefill(tokens(0, 70))
    before = [packed[1:].clone() for packed in model.pool.packed]
    tables = model.slot_table[16:].clone()
    assert run_dummy(model, dummy(mode, [0, 3, 15])).isfinite().all()
    assert all(torch.equal(a, b[1:]) for a, b in zip(before, model.pool.packed, strict=True))
    assert torch.equal(tables, model.slot_table[16:])
    assert not model.slot_table[:16].any()
    assert not model.pool.tables[0].patterns[ZERO_TABLE].any()
    assert model.stats.kv_reads == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_lost_its_requests_is_an_error(mode: ForwardMode) -> None:
    model = Model(config(), page_size=16)
    model.prefill(tokens(0, 70))
    with pytest.raises(AssertionError, match=r"writes slot 16, beyond the padding page of 16"):
        run_dummy(model, dummy(mode, [0, 16]))


def test_requests_are_taken_once() -> None:
    """A batch whose hook did not run must not get the requests of the batch before."""
    model = Model(config())
    (req,) = model.prefill(tokens(0, 40))
    assert model.current.take() is None
    with pytest.raises(AssertionError, match="did not see it"):
        run_dummy(model, dummy(ForwardMode.DECODE, [int(model.row(req)[-1])]))


@pytest.mark.parametrize("mode", MODES)
def test_requests_of_another_kind_of_batch_are_an_error(mode: ForwardMode) -> None:
    model = Model(config())
    (req,) = model.prefill(tokens(0, 40))
    batch = model.decode([req], [1])
    model.current.put(batch if mode == ForwardMode.EXTEND else ExtendBatch([], []))
    with pytest.raises(AssertionError, match=r"in an? (decode|extend) forward"):
        model.backend.init_forward_metadata(dummy(mode, [0]))


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2])
def test_a_speculative_batch_is_refused(mode: ForwardMode) -> None:
    model = Model(config())
    with pytest.raises(RuntimeError, match=f"{mode.name} is not available with --kv-quant"):
        read_batch(model.tree, model.planner, SimpleNamespace(forward_mode=mode), 8)


def test_an_idle_batch_has_no_plan() -> None:
    model = Model(config())
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    assert read_batch(model.tree, model.planner, idle, 8) is None
    model.backend.init_forward_metadata(dummy(ForwardMode.IDLE, []))
    assert model.backend.forward_metadata is None
    with pytest.raises(AssertionError, match="plan=None"):
        model.backend.forward_decode(
            torch.ones(0, H_Q * D), torch.ones(0), torch.ones(0), model.layer(0), None
        )


# Corruption


@pytest.mark.parametrize("position", [0, 40, 63])
def test_a_corrupt_slot_table_is_found(position: int) -> None:
    model = Model(config(window=4))
    reqs = model.prefill(tokens(0, 64), tokens(0, 64))
    table = int(model.slot_table[model.row(reqs[0])[position]])
    model.slot_table[model.row(reqs[0])[position]] = 5
    with pytest.raises(AssertionError) as error:
        model.decode(reqs, [1, 2])
    message = str(error.value)
    assert f"reads positions [0, 64) with table {table}" in message
    assert f"quantized with [{table}, 5]" in message


def test_a_pool_with_too_few_windows_is_an_error() -> None:
    model = Model(config(), num_rows=4)
    rows = torch.zeros(6, 8, dtype=torch.int32)
    with pytest.raises(AssertionError, match="5 windows for 6 request rows"):
        PatternKVBackend(model.pool, rows, CurrentBatch(), model.stats, model.backend.scratch)


@pytest.mark.parametrize(
    ("has_kv", "save", "problem"),
    [(False, True, "layer 0 passes no K and V"), (True, False, "save_kv_cache=False")],
)
def test_layers_that_share_or_skip_the_cache_are_an_error(
    has_kv: bool, save: bool, problem: str
) -> None:
    model = Model(config())
    batch = dummy(ForwardMode.DECODE, [0])
    model.backend.init_forward_metadata(batch)
    q, kv = torch.ones(1, H_Q * D), torch.ones(1, H_KV * D) if has_kv else None
    with pytest.raises(AssertionError, match=problem):
        model.backend.forward_decode(q, kv, kv, model.layer(0), batch, save_kv_cache=save)


@pytest.mark.parametrize("layers", [[1], [0, 0]])
def test_windows_need_layers_in_order(layers: list[int]) -> None:
    """Each once: behind the last one a step's tokens are stored."""
    batch = dummy(ForwardMode.DECODE, [0])
    q, kv = torch.ones(1, H_Q * D), torch.ones(1, H_KV * D)
    for window in (0, 5):
        model = Model(config(window))
        model.backend.init_forward_metadata(batch)
        *before, last = layers
        for index in before:
            model.backend.forward_decode(q, kv, kv, model.layer(index), batch)
        if window:
            with pytest.raises(RuntimeError, match=rf"layer {last} where .* --kv-quant-window 0"):
                model.backend.forward_decode(q, kv, kv, model.layer(last), batch)
        else:
            model.backend.forward_decode(q, kv, kv, model.layer(last), batch)
