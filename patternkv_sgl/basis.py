"""The basis in which K is stored: channels balanced, then mixed by a Hadamard rotation.

Two bits per channel round a residual badly that is large in a few channels, and tokens that are
looked up have such residuals: the channels queries look for. Rotated, every residual is spread over
all channels. Products of queries and keys stay what they were, since queries are turned as well.

A rotation alone would spread the error of channels that are large in K and small in queries over
the others; balancing first makes K and the queries equally large in every channel, which
(Cauchy-Schwarz) minimises the error of their products. Sizes are read off the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from functools import cache

import torch
from torch import nn

from patternkv_kernels import hadamard, rotate, rotate_heads

logger = logging.getLogger(__name__)

MAX_LOG2_BALANCE = 8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class KBasis:
    """One layer's basis. All its factors are powers of two, so that only results are rounded.

    The rotation mixes blocks of the largest power of two that divides ``head_dim``. Its signs are
    part of the factors.

    Args:
        h_q: query heads.
        balance: factors of K's channels, float32 ``[h_kv, head_dim]``, powers of two.
        dtype, device: of the vectors.
    """

    def __init__(
        self,
        h_q: int,
        balance: torch.Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        h_kv, head_dim = balance.shape
        block = head_dim & -head_dim
        # Products gain the factor ``block`` by the turns; queries and K get rid of about half each.
        log2 = block.bit_length() - 1
        signs = _signs(block).repeat(head_dim // block).to(balance.device)
        of_q = signs * balance.reciprocal().repeat_interleave(h_q // h_kv, 0) * 2.0 ** -(log2 // 2)
        of_k = signs * balance * 2.0 ** -(log2 - log2 // 2)
        self._factors = torch.cat([of_q, of_k]).to(device, dtype)
        self._of_q, self._of_k = self._factors.split([h_q, h_kv])
        self._k_back = (1 / (block * of_k)).to(device)

    def turn(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`q` of ``q [n, h_q, d]``, :meth:`k` of ``k [n, h_kv, d]``: views of one tensor."""
        return rotate(q, k, self._factors)

    def k(self, k: torch.Tensor) -> torch.Tensor:
        """``k [..., h_kv, d]`` as it is stored."""
        return rotate_heads(k, self._of_k)

    def q(self, q: torch.Tensor) -> torch.Tensor:
        """``q [..., h_q, d]`` as it meets stored K."""
        return rotate_heads(q, self._of_q)

    def k_back(self, k: torch.Tensor) -> torch.Tensor:
        """Stored ``k [..., h_kv, d]`` as the model knows it, in ``k``'s dtype."""
        return (k @ hadamard(k.shape[-1], k.dtype, k.device)) * self._k_back.to(k.dtype)


@cache
def _signs(n: int) -> torch.Tensor:
    """``n`` ones and minus ones at random, so that no simple vector stays simple when turned."""
    return torch.randint(2, (n,), generator=torch.Generator().manual_seed(0)) * 2 - 1


def balance(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Factors of K's channels, powers of two, float32 ``[h_kv, d]``.

    ``q [h_q, d]`` and ``k [h_kv, d]`` are the sizes of queries and keys in every channel. Channels
    ``j`` and ``j + d / 2``, which RoPE mixes, get one factor. It is the root of the queries' size
    over K's, relative to the head's median.
    """
    h_kv, d = k.shape
    q = q.view(h_kv, -1, d).square().mean(1)
    pairs = [x.view(h_kv, 2, d // 2).sum(1).clamp_min(1e-30).log2() for x in (q, k.square())]
    log2 = (pairs[0] - pairs[1]) / 4
    log2 = (log2 - log2.median(1, keepdim=True).values).round()
    return log2.clamp(-MAX_LOG2_BALANCE, MAX_LOG2_BALANCE).exp2().repeat(1, 2)


def projected_sizes(
    attention: nn.Module, h_q: int, h_kv: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Sizes of queries and keys in every channel, ``[h_q, d]`` and ``[h_kv, d]``, up to one factor
    each.

    Those of the norm's weights where the module normalises both, else those of the projections'
    rows: ``qkv_proj`` or ``q_proj`` and ``k_proj``. None where these cannot be read.
    """
    norms = [getattr(getattr(attention, name, None), "weight", None) for name in _NORMS]
    if all(norm is not None and norm.shape == (head_dim,) for norm in norms):
        q, k = (norm.detach().float().abs() for norm in norms if norm is not None)
        return q.expand(h_q, -1), k.expand(h_kv, -1)
    rows = (h_q * head_dim, h_kv * head_dim)
    if hasattr(attention, "qkv_proj"):
        weight = _rows(attention, "qkv_proj", rows[0] + 2 * rows[1])
        found = [None, None] if weight is None else [*weight.split([*rows, rows[1]])[:2]]
    else:
        found = [_rows(attention, *wanted) for wanted in zip(_PROJECTIONS, rows, strict=True)]
    q, k = (
        None if x is None else torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        for x in found
    )
    if q is None or k is None:
        return None
    return q.view(h_q, head_dim), k.view(h_kv, head_dim)


_NORMS = ("q_norm", "k_norm")
_PROJECTIONS = ("q_proj", "k_proj")


def _rows(attention: nn.Module, name: str, rows: int) -> torch.Tensor | None:
    """The weight of a projection, if it is a plain one with as many rows."""
    weight = getattr(getattr(attention, name, None), "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dtype in _FLOATS and len(weight) == rows:
        return weight.detach()
    return None


def model_bases(
    model: nn.Module, layers: Set[int], dtype: torch.dtype, device: torch.device
) -> dict[int, KBasis]:
    """A basis for those attention layers of an SGLang model whose ids are ``layers``, by id."""
    from sglang.srt.layers.radix_attention import RadixAttention

    bases, unread = {}, []
    for path, layer in model.named_modules():
        if not isinstance(layer, RadixAttention) or layer.layer_id not in layers:
            continue
        heads = layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim
        sizes = projected_sizes(model.get_submodule(path.rpartition(".")[0]), *heads)
        if sizes is None:
            unread.append(path)
        factors = torch.ones(heads[1:]) if sizes is None else balance(*sizes).cpu()
        bases[layer.layer_id] = KBasis(heads[0], factors, dtype=dtype, device=device)
    if unread:
        logger.warning(
            "PatternKV rotates K without balancing its channels in %d layers (first: %s): their "
            "weights are quantized or laid out unusually; if answers suffer, use "
            "--kv-quant-rotate off or --kv-quant-bits 4:2",
            len(unread),
            unread[0],
        )
    return bases
