"""Draws the next tokens of many branches in one pass over their logits."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.speculative.dspark.markov_sample import MarkovSampleStep
from sglang.srt.layers.sampler import Sampler
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


class BranchSampler(Sampler):  # type: ignore[misc]
    """SGLang's sampler (layers/sampler.py), which draws by temperature alone straight from logits.

    Stock's divides, exponentiates, normalises, draws noise and compares in passes of their own over
    float32 ``[b, vocab]``, which takes 2 % of a step of 64 branches. The kernel that SGLang has
    for drafts of a Markov head takes the largest of ``logit / temperature + Gumbel noise``, which
    has the same distribution. Batches with filters (top-p, top-k, min-p), log-probabilities or
    seeds, and greedy ones, are left to stock. So are those whose logits something masks: once in
    2^25 draws a token's noise is minus infinity, and a masked one could be drawn in its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self._noise: _Noise | None = None

    def forward(
        self,
        logits_output: LogitsProcessorOutput,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Next token ids ``[b]``, as `Sampler.forward`."""
        logits = logits_output.next_token_logits
        if return_logprob or not len(logits) or not _by_temperature_alone(sampling_info):
            return super().forward(logits_output, sampling_info, return_logprob, *args, **kwargs)
        logits = self._preprocess_logits(logits, sampling_info)
        token_ids = self._noise_for(logits).draw(logits, sampling_info.temperatures)
        self._sync_token_ids_across_tp(token_ids, sampling_info)
        return token_ids

    def warm_up(self, vocab_size: int, device: torch.device | str) -> None:
        """Have the kernels compiled ahead of the first request, for float32 ``[b, vocab_size]``."""
        self._noise_for(torch.zeros(1, vocab_size, device=device))

    def _noise_for(self, logits: torch.Tensor) -> _Noise:
        if self._noise is None or self._noise.vocab_size != logits.shape[1]:
            self._noise = _Noise(logits.shape[1], logits.device)
        return self._noise


def _by_temperature_alone(info: SamplingBatchInfo) -> bool:
    filters = info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling
    asks = info.sampling_seed is not None or info.sampling_mask_batch_indices is not None
    masks = (
        info.grammars
        or info.logit_bias is not None
        or info.has_custom_logit_processor
        or info.has_watermark_candidates
    )
    return not (filters or asks or masks or info.is_all_greedy)


class _Noise:
    """Gumbel noise of a process, new at every draw, for logits ``[b, vocab_size]``."""

    # The kernels are compiled for one row, for multiples of 16 and for other numbers, and for odd
    # keys beyond 32 bits, such as the one that there will be once SGLang has seeded torch.
    _NUM_ROWS = (1, 2, 16)
    _KEY = 1 << 62 | 1

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self._num_draws = torch.zeros(1, dtype=torch.int64, device=device)
        # Nothing is added to the logits.
        self._bias = torch.zeros(1, vocab_size, device=device)
        for rows in self._NUM_ROWS:
            temperatures = torch.ones(rows, device=device)
            self._draw(self._bias.repeat(rows, 1), temperatures, self._KEY)

    @cached_property
    def _key(self) -> int:
        """By the seed that SGLang has given torch, the same one on all ranks, and the replica:
        tensor-parallel ranks must draw the same tokens, branches on two replicas must not."""
        seed = torch.initial_seed() % (1 << 40)
        return self._KEY | seed << 20 | (get_parallel().dp_rank or 0) << 1

    def draw(self, logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 ``[b]``; ``temperatures`` are positive float32 ``[b, 1]``."""
        self._num_draws.add_(1)
        return self._draw(logits, temperatures.view(-1), self._key)

    def _draw(self, logits: torch.Tensor, temperatures: torch.Tensor, key: int) -> torch.Tensor:
        return MarkovSampleStep.execute(
            base_logits=logits,
            bias=self._bias.expand_as(logits),
            temperatures=temperatures,
            key=key,
            offset=self._num_draws,
            step=0,
            step_dtype=torch.float32,
        )
