"""How large a scheduler process makes its pool: what the hooks that size SGLang's memory decide for
the pool and the backend that are built later."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.runtime_context import (
    get_memory,
    get_observability,
    get_parallel,
    get_schedule,
)

from patternkv_sgl import canary
from patternkv_sgl.metadata import DecodeBuffers, most_tokens
from patternkv_sgl.pool import SLOTS_PER_PAGE, PoolGeometry
from patternkv_sgl.refusals import refuse_kv_dtype
from patternkv_sgl.scratch import ScratchShape
from patternkv_sgl.server_args import config_of


class Sizing(NamedTuple):
    """What a pool and the memory beside it are made for.

    Attributes:
        scratch_bytes: device memory of kernels, for all layers.
    """

    geometry: PoolGeometry
    scratch: ScratchShape
    scratch_bytes: int

    @classmethod
    def of_model(cls, configurator: Any, num_layers: int) -> Sizing:
        """For the model of SGLang's ``KVCacheConfigurator``, and the server's arguments.

        Raises:
            ValueError: ``--kv-cache-dtype`` or the head shapes are not available.
        """
        dtype = configurator.kv_cache_dtype
        refuse_kv_dtype(dtype)
        model, tp_size = configurator.model_config, get_parallel().attn_tp_size
        geometry = PoolGeometry(
            config_of(get_memory()),
            num_layers,
            model.get_num_kv_heads(tp_size),
            model.head_dim,
            dtype,
        )
        scratch = ScratchShape(
            tuple(dict.fromkeys(geometry.slot_formats)),
            geometry.config.patterns,
            model.get_num_attention_heads(tp_size),
            get_schedule().max_running_requests,
            model.context_len,
            dtype,
        )
        device = torch.device(configurator.device, configurator.gpu_id)
        return cls(geometry, scratch, scratch.nbytes(device))

    def reserved_bytes(self, available_bytes: int) -> int:
        """Of ``available_bytes``, those that hold no tokens: tables, windows, and the memory that
        plans and kernels have."""
        geometry, scratch = self.geometry, self.scratch
        tokens = most_tokens(available_bytes // geometry.bytes_per_token, scratch.max_rows)
        # Slots that fill the last page.
        other = self.scratch_bytes + SLOTS_PER_PAGE * geometry.bytes_per_token
        other += DecodeBuffers.nbytes(scratch.max_rows, scratch.max_entries, tokens)
        if get_observability().kv_canary != "none":
            other += canary.nbytes(tokens)
        return geometry.reserved_bytes(available_bytes, scratch.max_rows + 1, other)
