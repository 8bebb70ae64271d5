"""How many bytes of KV a problem takes whose branches all run at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .records import Sample


@dataclass(frozen=True)
class Footprint:
    """Bytes of KV that one problem with branches occupies, everything counted.

    Attributes:
        bytes_per_token: of one token in its slots. window_bytes: unquantized tokens that each
            running branch has besides. table_bytes: of the pattern table of the prompt.
        prompt_tokens, branch_tokens: means over problems; the prompt is stored once.
    """

    bytes_per_token: int
    window_bytes: int
    table_bytes: int
    prompt_tokens: float
    branch_tokens: float

    def bytes(self, branches: int) -> float:
        """Bytes at the moment that all branches have their last token."""
        tokens = self.prompt_tokens + branches * self.branch_tokens
        return tokens * self.bytes_per_token + branches * self.window_bytes + self.table_bytes

    def branches(self, budget: float) -> int:
        """The most branches that fit into ``budget`` bytes; 0 if none does."""
        each = self.bytes(1) - self.bytes(0)
        return max(0, int((budget - self.bytes(0)) / each + 1e-9))

    @classmethod
    def of(cls, name: str, row: Mapping[str, Any], groups: Sequence[Sequence[Sample]]) -> Footprint:
        """What a problem of these samples occupies in a cache with these metrics.

        Raises:
            ValueError: the run does not know how many bytes a token takes.
        """
        if row["kv_bytes_per_token"] is None:
            raise ValueError(
                f"{name}: kv_bytes_per_token is not known; run where the model's files are"
            )
        lengths = [[sample.completion_tokens for sample in group] for group in groups]
        flat = [length for group in lengths for length in group]
        return cls(
            bytes_per_token=row["kv_bytes_per_token"],
            window_bytes=row["window_bytes"],
            table_bytes=row["table_bytes"],
            prompt_tokens=sum(group[0].prompt_tokens for group in groups) / len(groups),
            branch_tokens=sum(flat) / len(flat),
        )
