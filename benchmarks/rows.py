"""Rows of results: one JSON object a line, with what they were made with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows in ``path``; without such a file the program ends with a message."""
    if not path.exists():
        sys.exit(f"error: {path}: there is no such file of results; name another, or measure first")
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def table(lines: Iterable[list[str]]) -> str:
    """Markdown of cells line by line, the first two the head and its rule."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def packages(row: Row) -> str:
    """Names and versions of what was installed when ``row`` was made."""
    return ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
