"""Pattern tables of one layer: what the ids and codes of a slot refer to."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from patternkv_kernels.format import HEAD_DIMS, MAX_PATTERNS
from patternkv_kernels.mined import MinedTable


@dataclass(frozen=True)
class LayerTables:
    """The patterns, channel scales and channel weights of every table slot of one layer.

    Readers need patterns and channel scales; the weights only steer the store.

    Every table has the full ``num_patterns`` entries, so readers need no count: a table mined with
    fewer repeats its pattern 0 up to the end, and since ties go to the lowest index no token is
    ever assigned to a repeat.
    Channel scales are float16 like the patterns: :func:`~patternkv_kernels.mining.mine_table`
    normalises them to a root mean square of 1 and floors them, so the format's range is never in
    question, and store and readers use the same rounded value, so its precision costs nothing.
    """

    patterns: torch.Tensor
    """float16 ``[num_tables, 2, h_kv, num_patterns, d]``: K, then V"""
    channel_scale: torch.Tensor
    """float16 ``[num_tables, 2, h_kv, d]``, positive: K, then V"""
    channel_weight: torch.Tensor
    """float16 ``[num_tables, 2, h_kv, d]``, positive: K, then V"""

    @classmethod
    def allocate(
        cls, num_tables: int, h_kv: int, num_patterns: int, d: int, device: torch.device | str
    ) -> LayerTables:
        """``num_tables`` zero tables: all patterns zero, all channel scales and weights one."""
        if num_tables < 1 or h_kv < 1:
            raise ValueError(f"num_tables={num_tables}, h_kv={h_kv}: both must be at least 1")
        if not 1 <= num_patterns <= MAX_PATTERNS:
            raise ValueError(
                f"num_patterns={num_patterns}: must be in 1..{MAX_PATTERNS} "
                "(a pattern id is one byte)"
            )
        if d not in HEAD_DIMS:
            raise ValueError(f"d={d}: supported head dims are {HEAD_DIMS}")
        shape = (num_tables, 2, h_kv, num_patterns, d)
        one = torch.ones(num_tables, 2, h_kv, d, dtype=torch.float16, device=device)
        patterns = torch.zeros(shape, dtype=torch.float16, device=device)
        return cls(patterns, channel_scale=one, channel_weight=one.clone())

    @property
    def k_patterns(self) -> torch.Tensor:
        """float16 ``[num_tables, h_kv, num_patterns, d]``, a view"""
        return self.patterns[:, 0]

    @property
    def v_patterns(self) -> torch.Tensor:
        """float16 ``[num_tables, h_kv, num_patterns, d]``, a view"""
        return self.patterns[:, 1]

    @property
    def num_tables(self) -> int:
        return self.patterns.shape[0]

    @property
    def num_patterns(self) -> int:
        """Capacity of every table."""
        return self.patterns.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all tables of the layer."""
        return self.patterns.nbytes + self.channel_scale.nbytes + self.channel_weight.nbytes

    def check(self, h_kv: int, d: int) -> None:
        """Raise ``ValueError`` unless the tables are for ``h_kv`` heads of ``d`` dims."""
        if (self.patterns.shape[2], self.patterns.shape[4]) != (h_kv, d):
            raise ValueError(
                f"tables of {list(self.patterns.shape)} do not fit {h_kv} KV heads of {d} dims: "
                "allocate them with the pool's h_kv and head_dim"
            )

    def is_contiguous(self) -> bool:
        """Whether kernels can address the tables by shape alone."""
        return all(getattr(self, f.name).is_contiguous() for f in fields(self))

    def to(self, device: torch.device | str) -> LayerTables:
        """The same tables on ``device``."""
        return LayerTables(*(getattr(self, f.name).to(device) for f in fields(self)))

    def table(self, table_id: int) -> tuple[MinedTable, MinedTable]:
        """K's and V's content of table ``table_id``: views, to be filled in place."""
        patterns = self.patterns[table_id].unbind(0)
        scale = self.channel_scale[table_id].unbind(0)
        weight = self.channel_weight[table_id].unbind(0)
        return (
            MinedTable(patterns[0], scale[0], weight[0]),
            MinedTable(patterns[1], scale[1], weight[1]),
        )

    def write(self, table_id: int, k: MinedTable, v: MinedTable) -> None:
        """Fill table ``table_id`` with mined content of at most ``num_patterns`` patterns each."""
        for content, mined in zip(self.table(table_id), (k, v), strict=True):
            content.fill(mined)
