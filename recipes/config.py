"""The configuration of a best-of-n run: one YAML file, overridden by ``--key value``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from .variant import Variant


@dataclass(frozen=True)
class RunConfig:
    """Every key of a run; the YAML file and the command line take exactly these.

    Attributes:
        model: folder (or Hugging Face name) of the model; not used with ``base_url``.
        base_url: address of a running SGLang server; its cache is then the only variant.
        problems: ``demo`` (generated ledgers) or a JSONL file, see ``problems.py``.
        num_problems: how many problems, the first ones of a file.
        level: difficulty of generated problems, a name or FACTSxDEPTH of ``demo/ledger.py``.
        questions_per_context: how many generated problems share a context.
        problem_seed: seed of the problem generator, apart from the sampling seed.
        prompt: prompt template with ``{context}`` and ``{question}``.
        answer_pattern: regular expression whose last match is the answer (group 1 if there is
            one); None takes the task's own rule, which for a file is the last number.
        variants: caches to compare, ``bf16`` and K/V bits such as ``4/4``.
        n: samples per problem.
        temperature, top_p, top_k, max_new_tokens, stop: sampling, as SGLang names them.
        seed: seed of the engine's sampler.
        concurrency: problems in flight; each has ``n`` branches.
        mem_fraction_static: share of the memory for weights and KV, equal for all variants.
        cpu_threads: threads of an engine on the CPU; None leaves it to torch, which takes all
            cores: too many for a small model.
        engine_args: more keyword arguments of ``sglang.Engine``; those that start with
            ``kv_quant_`` reach PatternKV variants only.
        timeout: seconds to wait for one answer of a server.
        output: folder under which the run's own folder is made.

    Raises:
        ValueError: a value out of its range, or keys that contradict each other.
    """

    model: str | None = None
    base_url: str | None = None
    problems: str = "demo"
    num_problems: int = 64
    level: str = "demo"
    questions_per_context: int = 8
    problem_seed: int = 0
    prompt: str = "{context}{question}"
    answer_pattern: str | None = None
    variants: tuple[str, ...] = ("bf16", "4/4", "2/2")
    n: int = 8
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int = 0
    concurrency: int = 4
    mem_fraction_static: float | None = None
    cpu_threads: int | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    output: str = "results"

    def __post_init__(self) -> None:
        counts = ("num_problems", "questions_per_context", "n", "max_new_tokens", "concurrency")
        for name in (*counts, "cpu_threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.temperature < 0 or (self.temperature == 0 and self.n > 1):
            raise ValueError(
                f"temperature {self.temperature} with n {self.n}: greedy samples are all the same; "
                "use a temperature above 0 or n 1"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static < 1:
            raise ValueError(
                f"mem_fraction_static {self.mem_fraction_static}: expected between 0 and 1"
            )
        if self.timeout <= 0:
            raise ValueError(f"timeout {self.timeout}: expected more than 0 seconds")
        if "{question}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r}: expected {{question}} in it")
        if self.base_url is None and self.model is None:
            raise ValueError("model is missing: name a model folder, or a server with base_url")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants {list(self.variants)}: expected at least one, each once")
        for name in self.variants:
            Variant.parse(name)

    @property
    def sampling_params(self) -> dict[str, Any]:
        """Sampling parameters of a request, without ``n``."""
        params: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.max_new_tokens,
        }
        return params | ({"stop": list(self.stop)} if self.stop else {})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they go into ``config.yaml`` and ``metrics.json``."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


TYPES: dict[str, Any] = get_type_hints(RunConfig)
KEYS = tuple(item.name for item in fields(RunConfig))


def checked(name: str, value: Any) -> Any:
    """``value`` as the type that key ``name`` has.

    Raises:
        ValueError: the key is unknown, or the value is of another type.
    """
    if name not in TYPES:
        raise ValueError(f"unknown key {name!r}; known keys: {', '.join(KEYS)}")
    kinds = get_args(TYPES[name]) if type(None) in get_args(TYPES[name]) else (TYPES[name],)
    for kind in kinds:
        plain = get_origin(kind) or kind
        if plain is tuple and isinstance(value, (list, tuple)):
            return tuple(str(item) for item in value)
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join("null" if kind is type(None) else str(_word(kind)) for kind in kinds)
    raise ValueError(f"{name}: {value!r} is no {wanted}")


def _word(kind: Any) -> str:
    return "list" if get_origin(kind) is tuple else (get_origin(kind) or kind).__name__


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; files it names are looked up beside it first.

    Raises:
        ValueError: the file is no mapping, or a key or value is not accepted.
    """
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values")
    try:
        values = {str(name): checked(str(name), value) for name, value in loaded.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in ("model", "problems"):
        if name in values and (path.parent / values[name]).exists():
            values[name] = str(path.parent / values[name])
    return values


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """The configuration that ``--config FILE`` and ``--key value`` describe.

    Unknown keys, wrong types and values out of range end the program with a message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.best_of_n",
        description="Best-of-n on one set of problems, for several KV caches.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the keys below")
    for name in KEYS:
        many = get_origin(TYPES[name]) is tuple
        flags = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        parser.add_argument(
            *flags, dest=name, nargs="+" if many else None, default=argparse.SUPPRESS
        )
    options, unknown = parser.parse_known_args(argv)
    given = vars(options)
    config: Path | None = given.pop("config")
    try:
        for word in unknown:
            checked(word.lstrip("-").partition("=")[0], None)
        values = load_yaml(config) if config else {}
        for name, text in given.items():
            values[name] = checked(name, text if _is_text(name) else yaml.safe_load(text))
        return RunConfig(**values)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def _is_text(name: str) -> bool:
    return str in get_args(TYPES[name]) or TYPES[name] is str
