"""Settings of a recipe: a frozen dataclass, filled from one YAML file and from ``--key value``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")

# Metadata of a field that names files: a YAML file's own folder is searched for them first.
PATH = {"path": True}


def checked(kind: type, name: str, value: Any) -> Any:
    """``value`` as the type that field ``name`` of dataclass ``kind`` has.

    Raises:
        ValueError: the key is unknown, or the value is of another type.
    """
    types = get_type_hints(kind)
    if name not in types:
        raise ValueError(f"unknown key {name!r}; known keys: {', '.join(_keys(kind))}")
    kinds = get_args(types[name]) if type(None) in get_args(types[name]) else (types[name],)
    for accepted in kinds:
        plain = get_origin(accepted) or accepted
        if plain is tuple and isinstance(value, list | tuple):
            return tuple(str(item) for item in value)
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join("null" if item is type(None) else str(_word(item)) for item in kinds)
    raise ValueError(f"{name}: {value!r} is no {wanted}")


def load_yaml(kind: type, path: Path) -> dict[str, Any]:
    """The keys of a YAML file for dataclass ``kind``.

    Raises:
        ValueError: the file is no mapping, or a key or value is not accepted.
    """
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values")
    try:
        values = {str(name): checked(kind, str(name), value) for name, value in loaded.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def beside(name: str) -> str:
        return str(path.parent / name) if (path.parent / name).exists() else name

    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if field.metadata.get("path") and value is not None:
            many = isinstance(value, tuple)
            values[field.name] = tuple(map(beside, value)) if many else beside(value)
    return values


def parse(kind: type[T], prog: str, description: str, argv: Sequence[str] | None = None) -> T:
    """The ``kind`` that ``--config FILE`` and ``--key value`` describe; the latter win.

    Unknown keys, wrong types and values out of range end the program with a message.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.{prog}", description=description, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the keys below")
    types = get_type_hints(kind)
    for name in _keys(kind):
        many = get_origin(types[name]) is tuple
        flags = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(
            *flags, dest=name, nargs="+" if many else None, default=argparse.SUPPRESS
        )
    options, unknown = parser.parse_known_args(argv)
    given = vars(options)
    config: Path | None = given.pop("config")
    try:
        for word in unknown:
            checked(kind, word.lstrip("-").partition("=")[0], None)
        values = load_yaml(kind, config) if config else {}
        for name, text in given.items():
            value = text if _is_text(types[name]) else yaml.safe_load(text)
            values[name] = checked(kind, name, value)
        return kind(**values)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def as_dict(settings: Any) -> dict[str, Any]:
    """Plain values of a settings dataclass, as they go into YAML and JSON."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
    }


def _keys(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(kind))


def _is_text(kind: Any) -> bool:
    return str in get_args(kind) or kind is str


def _word(kind: Any) -> str:
    return "list" if get_origin(kind) is tuple else (get_origin(kind) or kind).__name__
