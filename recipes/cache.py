"""What an engine says about its KV cache, read from SGLang's ``server_info``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from .model import local_model

COUNTERS = ("kv_reads", "kv_reads_shared", "tables_mined", "tables_inherited")


# Stock caches that store no scales: SGLang's --kv-cache-dtype, our name, bits per element.
STOCK = {
    "auto": ("bf16", 16),
    "bfloat16": ("bf16", 16),
    "bf16": ("bf16", 16),
    "fp8_e4m3": ("fp8", 8),
    "fp8_e5m2": ("fp8_e5m2", 8),
}


@dataclass(frozen=True)
class CacheInfo:
    """One reading of the cache; counters are totals since the engine started.

    None stands for what the engine does not report: stock caches have no tables and count no
    reads. With data parallelism counts are sums over the ranks.

    Attributes:
        variant: name of the cache, ``bf16``, ``fp8``, ``4/4`` …
        bytes_per_token, bf16_bytes_per_token: bytes of KV per token over all layers.
        kv_tokens: tokens there is room for.
        kv_bytes: what they occupy, pattern tables and windows included.
        table_bytes: bytes of one pattern table. window_bytes: of the window of unquantized tokens
            that a running request has besides its slots. 0 for caches that have none.
        tables_live, table_slots: pattern tables held, and room for them.
        tables_mined, tables_inherited: segments that got a table, or use their parent's.
        kv_reads: KV tokens decode would read with every branch on its own.
        kv_reads_shared: those of them saved by reading a shared segment once.
    """

    variant: str
    bytes_per_token: int | None
    bf16_bytes_per_token: int | None
    kv_tokens: int
    kv_bytes: int | None
    table_bytes: int = 0
    window_bytes: int = 0
    tables_live: int | None = None
    table_slots: int | None = None
    tables_mined: int | None = None
    tables_inherited: int | None = None
    kv_reads: int | None = None
    kv_reads_shared: int | None = None

    @classmethod
    def parse(cls, info: dict[str, Any]) -> CacheInfo:
        """The cache behind one ``server_info``."""
        ranks = [state.get("patternkv") for state in info["internal_states"]]
        if ranks[0] is None:
            dtype = info["kv_cache_dtype"]
            bf16 = bf16_bytes_per_token(info["model_path"])
            name, width = STOCK.get(dtype, (dtype, None))
            per_token = bf16 * width // 16 if bf16 and width else None
            tokens = info["max_total_num_tokens"] * len(ranks)
            return cls(
                variant=name,
                bytes_per_token=per_token,
                bf16_bytes_per_token=bf16,
                kv_tokens=tokens,
                kv_bytes=per_token * tokens if per_token else None,
            )
        counts = ("kv_tokens", "tables_live", "table_slots", *COUNTERS)
        return cls(
            variant=ranks[0]["bits"],
            bytes_per_token=ranks[0]["bytes_per_token"],
            bf16_bytes_per_token=ranks[0]["bf16_bytes_per_token"],
            kv_bytes=sum(rank["bytes_allocated"] for rank in ranks),
            # The pool has one more table than slots, for tokens that need none.
            table_bytes=ranks[0]["table_bytes"] // (ranks[0]["table_slots"] + 1),
            window_bytes=ranks[0]["window"] * ranks[0]["bf16_bytes_per_token"],
            **{name: sum(rank[name] for rank in ranks) for name in counts},
        )

    def since(self, start: CacheInfo) -> dict[str, int | None]:
        """How far each counter went since ``start``."""
        gone: dict[str, int | None] = {}
        for name in COUNTERS:
            before, after = getattr(start, name), getattr(self, name)
            gone[name] = None if before is None or after is None else after - before
        return gone


def bf16_bytes_per_token(model: str) -> int | None:
    """Bytes of K and V per token in bf16: 2 × layers × KV heads × head_dim × 2, read from the
    ``config.json`` of a model folder or of Hugging Face's local cache; None if neither is on this
    machine (a server elsewhere)."""
    folder = local_model(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    config = orjson.loads((folder / "config.json").read_bytes())
    config = config.get("text_config") or config
    q_heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads") or q_heads
    head_dim: int = config.get("head_dim") or config["hidden_size"] // q_heads
    layers: int = config["num_hidden_layers"]
    return 2 * layers * kv_heads * head_dim * 2
