"""Draws the next tokens of many branches in one pass over their logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.speculative.dspark.markov_sample import MarkovSampleStep
from sglang.srt.layers.sampler import Sampler

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


class BranchSampler(Sampler):  # type: ignore[misc]
    """SGLang's sampler (layers/sampler.py), which draws by temperature alone straight from logits.

    Stock's divides, exponentiates, normalises, draws noise and compares in passes of their own over
    float32 ``[b, vocab]``, which takes 2 % of a step of 64 branches. The kernel that SGLang has
    for drafts of a Markov head takes the largest of ``logit / temperature + Gumbel noise``, which
    has the same distribution. Batches with filters (top-p, top-k, min-p), log-probabilities or
    seeds, and greedy ones, are left to stock.
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
        if return_logprob or not len(logits) or not self._by_temperature_alone(sampling_info):
            return super().forward(logits_output, sampling_info, return_logprob, *args, **kwargs)
        logits = self._preprocess_logits(logits, sampling_info)
        if self._noise is None:
            self._noise = _Noise(logits)
        token_ids = self._noise.draw(logits, sampling_info.temperatures)
        self._sync_token_ids_across_tp(token_ids, sampling_info)
        return token_ids

    @staticmethod
    def _by_temperature_alone(info: SamplingBatchInfo) -> bool:
        filters = info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling
        asks = info.sampling_seed is not None or info.sampling_mask_batch_indices is not None
        return not (filters or asks or info.is_all_greedy)


class _Noise:
    """Gumbel noise of a process, new at every draw.

    Args:
        logits: float32 ``[b, vocab]`` of the first draw.
    """

    # The kernels are compiled for one row, for multiples of 16 and for other numbers.
    _NUM_ROWS = (1, 2, 16)

    def __init__(self, logits: torch.Tensor) -> None:
        # SGLang has seeded torch alike on all ranks, which must draw the same tokens.
        self._key = torch.initial_seed()
        self._num_draws = torch.zeros(1, dtype=torch.int64, device=logits.device)
        # Nothing is added to the logits.
        self._bias = torch.zeros_like(logits[:1])
        for rows in self._NUM_ROWS:
            self.draw(self._bias.repeat(rows, 1), self._bias.new_ones(rows, 1))

    def draw(self, logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 ``[b]``, of float32 ``[b, vocab]`` and positive ``[b, 1]``."""
        self._num_draws.add_(1)
        return MarkovSampleStep.execute(
            base_logits=logits,
            bias=self._bias.expand_as(logits),
            temperatures=temperatures.view(-1),
            key=self._key,
            offset=self._num_draws,
            step=0,
            step_dtype=torch.float32,
        )
