"""The cache's arithmetic inside a Hugging Face model, without a server.

Tokens of the prompt attend exactly (prefill), tokens after it attend the stored vectors and the
exact window, as the attention backend does. Used to compare settings; the serving path is measured
by the recipes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from benchmarks.attention import attending
from patternkv_kernels import (
    LayerTables,
    dequantize,
    mine_kv,
    store_kv,
)
from patternkv_sgl.basis import KBasis, balance, projected_sizes
from patternkv_sgl.config import PatternKVConfig


@dataclass
class Cache:
    """What one simulated run does with K and V.

    Attributes:
        config: bits, patterns, sinks and window.
        prompt_len: tokens that are prefilled; the table is mined from them.
        tables: per layer, a table to inherit; None mines one from the prompt.
    """

    config: PatternKVConfig
    prompt_len: int
    tables: dict[int, LayerTables] | None = None


mined: dict[int, LayerTables] = {}


def _attend(
    cache: Cache | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Of one sequence: query [1, h_q, n, d]; key, value [1, h_kv, n, d]."""
    q, k, v = query[0].float(), key[0].float(), value[0].float()
    group, n = len(q) // len(k), q.shape[1]
    column = torch.arange(n, device=q.device)
    row = column[:, None]
    visible, exact = column <= row, torch.ones(n, n, dtype=torch.bool, device=q.device)
    stored_k, stored_v = k, v
    if cache is not None:
        stored_k, stored_v = _store(cache, module, query[0], key[0], value[0])
        prompt = cache.prompt_len
        first_exact = torch.clamp(row + 1 - cache.config.window, min=prompt)
        exact = (row < prompt) | (column >= first_exact)
    q = q.view(len(k), group, n, -1) * scaling
    logits = torch.where(exact, q @ k[:, None].mT, q @ stored_k[:, None].mT)
    p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    out = (p * exact) @ v[:, None] + (p * ~exact) @ stored_v[:, None]
    return out.flatten(0, 1)[None]


def _store(
    cache: Cache, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    config, device, (h_kv, n, d) = cache.config, key.device, key.shape
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    basis = None
    fmt = config.slot_formats(module.config.num_hidden_layers, h_kv, d, page_size=1)[
        module.layer_idx
    ]
    if config.rotates(fmt.k_bits):
        sizes = projected_sizes(module, len(query), h_kv, d)
        factors = torch.ones(h_kv, d) if sizes is None else balance(*sizes)
        basis = KBasis(len(query), factors, dtype=key.dtype, device=device)
        q, k = basis.q(q), basis.k(k)
    if cache.tables is None:
        tables = LayerTables.allocate(1, h_kv, config.patterns, d, device)
        mined_kv = mine_kv(
            *(x[: cache.prompt_len] for x in (q, k, v)),
            num_patterns=config.patterns,
            num_sinks=config.sinks,
        )
        tables.write(0, *mined_kv)
    else:
        tables = cache.tables[module.layer_idx]
    mined[module.layer_idx] = tables
    buffer, slots = fmt.allocate(n, device), torch.arange(n, device=device)
    table_ids = torch.zeros(n, dtype=torch.int32, device=device)
    store_kv(fmt, buffer, slots, k, v, tables, table_ids)
    k, v = dequantize(fmt, buffer, slots, tables, table_ids)
    if basis is not None:
        k = basis.k_back(k)
    return k.transpose(0, 1), v.transpose(0, 1)


def simulated(cache: Cache | None) -> AbstractContextManager[None]:
    """Run prepared models with ``cache``, or with exact attention for None."""
    return attending(partial(_attend, cache))


@torch.inference_mode()
def divergence(
    model: PreTrainedModel, token_ids: list[int], exact: torch.Tensor, first: int, cache: Cache
) -> float:
    """Mean KL(exact || simulated) in nats of the tokens from position ``first`` on.

    Args:
        token_ids: prompt and continuation, teacher-forced.
        exact: log-probabilities [n, vocab] of the exact run.
        first: first position that counts.
    """
    with simulated(cache):
        logits = model(torch.tensor([token_ids], device=model.device)).logits[0].float()
    after = slice(first, len(token_ids))
    mean_kl: torch.Tensor = kl_div(
        log_softmax(logits[after], -1), exact[after], reduction="batchmean", log_target=True
    )
    return mean_kl.item()
