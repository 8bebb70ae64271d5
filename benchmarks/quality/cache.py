"""One layer's KV cache while several branches continue each of several prompts.

A cache holds what attention reads: exact vectors, or what quantization made of them. A prompt is
attended exactly while it is prefilled, and quantized after; generated tokens are seen as the method
keeps them at that step. All prompts of a batch have the same length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.quality.flatness import Flatness

EXACT_BITS = 16
"""Bits of an element in a cache of the model's dtype, in windows, tails and pools."""


@dataclass(frozen=True)
class LayerPrompt:
    """Exact vectors of prefilled prompts in one layer, K after RoPE.

    ``q`` is ``[p, h_q, n, d]``; ``k`` and ``v`` are ``[p, h_kv, n, d]``; all in the model's dtype.
    ``balance`` ``[h_kv, d]``: factors of K's channels that the layer's weights suggest
    (``patternkv_sgl/basis.py``); None: 1.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer: int
    num_layers: int
    balance: torch.Tensor | None = None


class LayerCache(ABC):
    """K and V of one layer, float32, of ``p`` prompts with ``n`` branches each.

    ``shared_*`` ``[p, h_kv, s, d]`` are the first ``s`` prompt tokens, which never change again;
    ``own_*`` ``[p, n, h_kv, m, d]`` (first ``held`` of ``m``) are all tokens after them.

    Args:
        prompt: what was prefilled.
        branches: continuations of every prompt.
        max_new: tokens that may be appended to each.
        bits: bits of K's and V's codes.
        options: what to do otherwise than by default, of those in ``known_options``.
    """

    name: ClassVar[str]
    bit_widths: ClassVar[tuple[tuple[int, int], ...]]
    """The K and V bits the bench runs this method at."""
    known_options: ClassVar[frozenset[str]] = frozenset()
    flatness: Flatness | None = None
    """Of the prompt; None for methods without patterns."""

    def __init__(
        self,
        prompt: LayerPrompt,
        branches: int,
        max_new: int,
        bits: tuple[int, int],
        options: Mapping[str, int] | None = None,
    ) -> None:
        self.bits, self.options = bits, options or {}
        self.layer, self.num_layers = prompt.layer, prompt.num_layers
        self.p, self.h, self.prompt_len, self.d = prompt.k.shape
        self.n = branches
        self._max_new = max_new
        self.held = 0
        self._open(prompt)

    @abstractmethod
    def _open(self, prompt: LayerPrompt) -> None:
        """Quantize the prompt; calls ``_hold`` once."""

    @abstractmethod
    def stored_bits(self) -> float:
        """Bits that K and V of one branch and one KV head take now, with everything they need."""

    def _hold(self, k: torch.Tensor, v: torch.Tensor, shared: int) -> None:
        """Start from prompt vectors ``[p, h_kv, n, d]``, the first ``shared`` of them for good."""
        tail = self.prompt_len - shared
        self.shared_k, self.shared_v = k[:, :, :shared], v[:, :, :shared]
        shape = (self.p, self.n, self.h, tail + self._max_new, self.d)
        self.own_k, self.own_v = (torch.zeros(shape, device=k.device) for _ in range(2))
        self.own_k[..., :tail, :] = k[:, None, :, shared:]
        self.own_v[..., :tail, :] = v[:, None, :, shared:]
        self.held = tail

    @property
    def length(self) -> int:
        """Tokens of one branch, prompt included."""
        return self.shared_k.shape[2] + self.held

    @property
    def bits_per_element(self) -> float:
        """Everything stored for a branch on its own, per element of its K and V."""
        return self.stored_bits() / (2 * self.d * self.length)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Append one token per branch and attend.

        Args:
            q: ``[p, n, h_q, d]``; k, v: ``[p, n, h_kv, d]``, any float dtype.
            scale: factor of the logits.

        Returns:
            float32 ``[p, n, h_q, d]``.
        """
        self._append(k.float(), v.float())
        out = self._attend(q.float() * scale)
        self._compress()
        return out

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.own_k[..., self.held, :] = k
        self.own_v[..., self.held, :] = v
        self.held += 1

    def _compress(self) -> None:  # noqa: B027
        """What the method does after a step's attention; nothing by default."""

    def _attend(self, q: torch.Tensor) -> torch.Tensor:
        p, n, h, d = self.p, self.n, self.h, self.d
        group = q.shape[2] // h
        grouped = q.view(p, n, h, group, d)
        flat = grouped.transpose(1, 2).reshape(p, h, n * group, d)
        own_k, own_v = self.own_k[..., : self.held, :], self.own_v[..., : self.held, :]
        to_shared = flat @ self.shared_k.mT
        to_own = (grouped @ own_k.mT).transpose(1, 2).reshape(p, h, n * group, self.held)
        weights = torch.cat([to_shared, to_own], -1).softmax(-1)
        on_shared, on_own = weights.split([to_shared.shape[-1], self.held], -1)
        out = (on_shared @ self.shared_v).view(p, h, n, group, d).transpose(1, 2)
        out = out + on_own.view(p, h, n, group, self.held).transpose(1, 2) @ own_v
        return out.reshape(p, n, h * group, d)


class TokenCache(LayerCache):
    """A cache that rounds every vector on its own when it is written: no window, no groups."""

    @abstractmethod
    def _round(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """``x [..., d]`` as the cache gives it back."""

    @abstractmethod
    def _token_bits(self) -> float:
        """Bits of one token's K and V in one KV head."""

    def _open(self, prompt: LayerPrompt) -> None:
        k = self._round(prompt.k.float(), self.bits[0])
        v = self._round(prompt.v.float(), self.bits[1])
        self._hold(k, v, self.prompt_len)

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super()._append(self._round(k, self.bits[0]), self._round(v, self.bits[1]))

    def stored_bits(self) -> float:
        return self._token_bits() * self.length
