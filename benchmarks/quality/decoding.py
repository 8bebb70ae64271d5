"""Prefill, teacher-forced and sampled decoding of a Hugging Face model over simulated caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.attention import attending
from benchmarks.quality.cache import LayerCache, LayerPrompt
from patternkv_sgl.basis import balance, projected_sizes

MakeCache = Callable[[LayerPrompt], LayerCache]
PREFILL_TOKENS = {"cuda": 2**15}
"""Prompt tokens in one forward by device; elsewhere prompts are prefilled one by one."""
_NOISE_ELEMENTS = 2**22
"""Noise drawn at a time for one prompt; few launches where the vocabulary is small."""


@dataclass(frozen=True)
class Prefilled:
    """Prompts of one length after prefill: K, V and q of every layer, and the last logits."""

    layers: list[LayerPrompt]
    logits: torch.Tensor  # float32 [p, vocab]
    length: int


@dataclass(frozen=True)
class Step:
    """What one layer attended with in one step of an exact run."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    out: torch.Tensor


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompts: torch.Tensor) -> Prefilled:
    """Attend ``prompts`` int64 ``[p, n]`` exactly, as many at a time as ``PREFILL_TOKENS`` allows,
    and keep their vectors."""
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        seen.setdefault(module.layer_idx, []).append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )

    limit = PREFILL_TOKENS.get(model.device.type, 1)
    with attending(attend):
        logits = [
            model(rows.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
            for rows in prompts.split(max(1, limit // prompts.shape[1]))
        ]
    layers = []
    for layer in sorted(seen):
        q, k, v = (torch.cat(x) for x in zip(*seen[layer], strict=True))
        layers.append(LayerPrompt(q, k, v, layer, len(seen), _balance(model, layer, q, k)))
    return Prefilled(layers, torch.cat(logits).float(), prompts.shape[1])


def _balance(
    model: PreTrainedModel, layer: int, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """Of the attention module of ``layer``, whose vectors are ``[p, heads, n, d]``."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == layer and hasattr(module, "k_proj"):
            sizes = projected_sizes(module, q.shape[1], k.shape[1], k.shape[3])
            return None if sizes is None else balance(*sizes)
    return None


class Decoder:
    """Decodes ``branches`` continuations of each prompt, one token per step.

    Args:
        make: the cache of one layer.
        record: where to append every step's :class:`Step` per layer; None keeps nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: Prefilled,
        branches: int,
        make: MakeCache,
        record: list[list[Step]] | None = None,
    ) -> None:
        self._model, self._branches = model, branches
        self._record = record
        self._position = start.length
        self.caches = [make(prompt) for prompt in start.layers]

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append ``tokens`` int64 ``[p, n]``; float32 logits ``[p, n, vocab]`` of the next."""
        if self._record is not None:
            self._record.append([])
        rows = tokens.reshape(-1, 1)
        position = torch.full_like(rows, self._position)
        with attending(self._attend):
            out = self._model(rows, position_ids=position, use_cache=False, logits_to_keep=1)
        self._position += 1
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits.view(*tokens.shape, -1)

    @property
    def bits_per_element(self) -> float:
        """Mean over layers, at the present length."""
        return sum(cache.bits_per_element for cache in self.caches) / len(self.caches)

    def _attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = (x.squeeze(2).unflatten(0, (-1, self._branches)) for x in (q, k, v))
        out = self.caches[module.layer_idx].step(q, k, v, scale)
        if self._record is not None:
            self._record[-1].append(Step(q, k, v, scale, out))
        return out.flatten(0, 1).unsqueeze(2)


@torch.inference_mode()
def force(decoder: Decoder, start: Prefilled, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 ``[p, t, vocab]`` that predict each of ``tokens`` ``[p, t]``."""
    logits = [start.logits]
    for i in range(tokens.shape[1] - 1):
        logits.append(decoder.step(tokens[:, i : i + 1])[:, 0])
    return torch.stack(logits, 1).log_softmax(-1)


@torch.inference_mode()
def attention_errors(caches: Sequence[LayerCache], steps: Sequence[Sequence[Step]]) -> list[float]:
    """Relative error per layer of attention over ``caches`` fed with an exact run's vectors.

    The norm of the difference to the exact outputs over the norm of these, all steps together.
    """
    errors = []
    for layer, cache in enumerate(caches):
        wrong = torch.zeros(2, dtype=torch.float64, device=cache.shared_k.device)
        for step in steps:
            exact = step[layer]
            out = cache.step(exact.q, exact.k, exact.v, exact.scale)
            wrong[0] += (out - exact.out).square().sum()
            wrong[1] += exact.out.square().sum()
        errors.append((wrong[0] / wrong[1]).sqrt().item())
    return errors


@torch.inference_mode()
def sample(
    decoder: Decoder,
    start: Prefilled,
    *,
    branches: int,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seeds: Sequence[int],
) -> list[list[list[int]]]:
    """Token ids of every branch of every prompt, its stop token (if it came to one) included.

    A token is the argmax of logits plus Gumbel noise that depends on its prompt's seed, its branch
    and its step alone: every method meets the same noise, so differences between methods are
    paired. Temperature 0 is greedy.
    """
    logits = start.logits[:, None].expand(-1, branches, -1)
    device = logits.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    done = torch.zeros(logits.shape[:2], dtype=torch.bool, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    steps: list[torch.Tensor] = []
    drawn = max(1, _NOISE_ELEMENTS // logits[0].numel())
    for i in range(max_new_tokens):
        if temperature > 0:
            if i % drawn == 0:
                shape = (min(drawn, max_new_tokens - i), *logits.shape[1:])
                blocks = [
                    torch.empty(shape, device=device).exponential_(generator=g) for g in generators
                ]
                noise = torch.stack(blocks, 1)
            logits = logits / temperature - noise[i % drawn].log()
        token = logits.argmax(-1)
        steps.append(token.masked_fill(done, -1))
        done |= torch.isin(token, stops)
        if done.all() or i + 1 == max_new_tokens:
            break
        logits = decoder.step(token)
    rows = torch.stack(steps, -1).tolist()
    return [[[token for token in row if token >= 0] for row in prompt] for prompt in rows]
