"""What a running request knows of its tables: which it reads, and whether it mines one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from patternkv_sgl.tables import TableRuns

ATTRIBUTE = "patternkv"  # where a RequestTables hangs on an sglang Req


@dataclass(eq=False)
class RequestTables:
    """Tables of one running request.

    Attributes:
        runs: tables along the sequence; the request owns one reference to each.
        window_start: position from which generated tokens are also in the bf16 window, that is
            the end of the last extend.
    """

    runs: TableRuns = field(default_factory=TableRuns)
    window_start: int = 0


@dataclass(frozen=True)
class Extend:
    """New tokens of one request in an extend batch.

    Attributes:
        prefix_len: tokens already stored.
        num_tokens: new tokens, in the batch's order.
        table: table that the new tokens are quantized with.
        mine: whether the table is mined from these tokens first.
    """

    prefix_len: int
    num_tokens: int
    table: int
    mine: bool


@dataclass(frozen=True)
class Minable:
    """A prefill of this batch that mines: later ones that start alike share its table."""

    token_ids: np.ndarray  # int64 [num_tokens]
    table: int

    def covers(self, token_ids: np.ndarray, mine_tokens: int) -> bool:
        """Whether ``token_ids`` differ by less than what would repay a table of their own."""
        limit = min(len(self.token_ids), len(token_ids))
        differs = np.flatnonzero(self.token_ids[:limit] != token_ids[:limit])
        common = int(differs[0]) if len(differs) else limit
        return common >= mine_tokens and len(token_ids) - common < mine_tokens
