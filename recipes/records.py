"""Append-only JSONL files of one dataclass, which survive a run that was cut off."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One answer to one problem.

    Attributes:
        problem: id of the problem; level: its difficulty, None if it has none.
        variant: name of the cache the sample was drawn with.
        index: number of the sample, from 0 to n - 1.
        seed: seed of the engine's sampler in the session that drew it.
        text: what the model wrote; answer: what was read from it, None if nothing.
        prompt_tokens, cached_tokens: tokens of the prompt; those of them found in the cache.
        completion_tokens: tokens generated.
        finish_reason: ``stop`` or ``length``.
        mean_logprob: mean log-probability of the generated tokens, None if not asked for.
        self_certainty: their mean confidence, see ``selection.py``, None if not asked for.
    """

    problem: str
    level: str | None
    variant: str
    index: int
    seed: int | None
    text: str
    answer: str | None
    correct: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str
    mean_logprob: float | None
    self_certainty: float | None


@dataclass(frozen=True)
class Session:
    """What one engine (or one visit to a server) did: a resumed run has several.

    Attributes:
        variant: name of the cache.
        seconds: wall time between the first request and the last answer.
        completion_tokens: tokens generated in that time.
        kv_reads: KV tokens that decode would have read, every branch on its own; None if the
            engine does not count them. kv_reads_shared: those saved by sharing.
        bytes_per_token: bytes of KV per token, all layers; None if unknown.
        bf16_bytes_per_token: the same with KV in bf16.
        kv_tokens: tokens the engine has room for. kv_bytes: what they occupy, pattern tables and
            windows included.
        table_bytes, window_bytes: bytes of one pattern table; of the window of one running request.
        tables_live, table_slots: pattern tables held at the end, and room for them.
        tables_mined, tables_inherited: segments that got their own table, or their parent's.
        server: SGLang's own arguments of this engine.
    """

    variant: str
    seconds: float
    completion_tokens: int
    kv_reads: int | None
    kv_reads_shared: int | None
    bytes_per_token: int | None
    bf16_bytes_per_token: int | None
    kv_tokens: int
    kv_bytes: int | None
    table_bytes: int
    window_bytes: int
    tables_live: int | None
    table_slots: int | None
    tables_mined: int | None
    tables_inherited: int | None
    server: dict[str, Any]


class Records(Generic[T]):
    """The records of type ``kind`` in ``path``, read once and then appended to.

    A last line without its newline is what an interrupted write leaves: it is cut off.

    Raises:
        ValueError: any other line is not a record; the message names file and line.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
        names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
        self.items: list[T] = []
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); remove the line") from None
            if not isinstance(values, dict) or set(values) != names:
                raise ValueError(
                    f"{path}:{number}: not a {kind.__name__} with keys {', '.join(sorted(names))}; "
                    "remove the file or choose another output"
                )
            self.items.append(kind(**values))

    def append(self, *items: T) -> None:
        """Add ``items`` to the file in one write, so that they are there together or not at all."""
        with self.path.open("ab") as file:
            file.write(b"".join(orjson.dumps(item) + b"\n" for item in items))
        self.items.extend(items)
