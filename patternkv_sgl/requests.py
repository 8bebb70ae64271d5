"""What a running request knows of its tables: which it reads, and whether it mines one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from patternkv_sgl.tables import TableRuns

ATTRIBUTE = "patternkv"  # where a RequestTables hangs on an sglang Req


@dataclass(eq=False)
class RequestTables:
    """Tables of one running request.

    Attributes:
        runs: tables along the sequence; the request owns one reference to each.
        mined_end: end of the tokens whose table was mined from them.
        window_start: position from which tokens are also in the bf16 window.
        prefilling: the tokens that the request prefills now, see ``PatternRadixCache.upcoming``.
    """

    runs: TableRuns = field(default_factory=TableRuns)
    mined_end: int = 0
    window_start: int = 0
    prefilling: Hashable | None = None


@dataclass(frozen=True)
class Extend:
    """New tokens of one request in an extend batch.

    Attributes:
        prefix_len: tokens already stored.
        num_tokens: new tokens, in the batch's order.
        table: table that the new tokens are quantized with.
        mine: whether the table is mined from these tokens first.
        num_exact: how many of the new tokens, the last ones, the window keeps as well.
    """

    prefix_len: int
    num_tokens: int
    table: int
    mine: bool
    num_exact: int = 0
