"""What a recipe that asks a model needs to know, and what best-of-n needs besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .selection import SELECTIONS
from .settings import PATH
from .variant import Variant

GRADERS = ("text", "math")


@dataclass(frozen=True)
class TaskConfig:
    """A model, problems, and how answers are sampled and read.

    Attributes:
        model: folder (or Hugging Face name) of the model; not used with ``base_url``.
        base_url: address of a running SGLang server; its cache is then the only variant.
        mem_fraction_static: share of the memory for weights and KV, equal for all variants.
        cpu_threads: threads of an engine on the CPU; None leaves it to torch, which takes all
            cores: too many for a small model.
        engine_args: more keyword arguments of ``sglang.Engine``; those that start with
            ``kv_quant_`` reach PatternKV variants only.
        timeout: seconds to wait for one answer of a server.
        problems: ``demo`` (generated ledgers) or a JSONL file, see ``problems.py``.
        num_problems: how many problems, the first ones of a file.
        level: difficulty of generated problems, a name or FACTSxDEPTH of ``demo/ledger.py``.
        questions_per_context: how many generated problems share a context.
        problem_seed: seed of the problem generator, apart from the sampling seed.
        prompt: prompt template with ``{context}`` and ``{question}``.
        grader: ``text`` compares answers as numbers or strings, ``math`` as expressions.
        answer_pattern: regular expression whose last match is the answer (group 1 if there is
            one); None takes the task's own rule: for a file the last number, with ``math`` the
            expression that math-verify finds.
        temperature, top_p, top_k, max_new_tokens, stop: sampling, as SGLang names them.
        seed: seed of the engine's sampler.

    Raises:
        ValueError: a value out of its range, or keys that contradict each other.
    """

    model: str | None = field(default=None, metadata=PATH)
    base_url: str | None = None
    mem_fraction_static: float | None = None
    cpu_threads: int | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0
    problems: str = field(default="demo", metadata=PATH)
    num_problems: int = 64
    level: str = "demo"
    questions_per_context: int = 8
    problem_seed: int = 0
    prompt: str = "{context}{question}"
    grader: str = "text"
    answer_pattern: str | None = None
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least_one("num_problems", "questions_per_context", "max_new_tokens", "cpu_threads")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature}: expected at least 0")
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
        if self.grader not in GRADERS:
            raise ValueError(f"grader {self.grader!r}: expected one of {', '.join(GRADERS)}")
        if self.base_url is None and self.model is None:
            raise ValueError("model is missing: name a model folder, or a server with base_url")

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

    def _at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")

    def _branches_differ(self, name: str) -> None:
        if self.temperature == 0 and getattr(self, name) > 1:
            raise ValueError(
                f"temperature 0 with {name} {getattr(self, name)}: greedy samples are all the "
                f"same; use a temperature above 0 or {name} 1"
            )


@dataclass(frozen=True)
class RunConfig(TaskConfig):
    """Every key of a best-of-n run; the YAML file and the command line take exactly these.

    Attributes:
        variants: caches to compare, ``bf16``, ``fp8`` and K/V bits such as ``4/4``.
        n: samples per problem.
        concurrency: problems in flight; each has ``n`` branches.
        select: how one of k answers is picked, see ``selection.py``.
        top_logprobs: most likely tokens per position that ``self_certainty`` looks at.
        verifier: ``package.module.function`` that scores an answer, for ``verifier``.
        reward_url: SGLang server with a reward model, for ``reward``.
        reward_prompt: what the reward model reads, with ``{prompt}`` and ``{answer}``.
        output: folder under which the run's own folder is made.
    """

    variants: tuple[str, ...] = ("bf16", "4/4", "2/2")
    n: int = 8
    concurrency: int = 4
    select: tuple[str, ...] = ("majority",)
    top_logprobs: int = 20
    verifier: str | None = None
    reward_url: str | None = None
    reward_prompt: str = "{prompt}{answer}"
    output: str = "results"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("n", "concurrency", "top_logprobs")
        self._branches_differ("n")
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants {list(self.variants)}: expected at least one, each once")
        for name in self.variants:
            Variant.parse(name)
        if not self.select or len(set(self.select)) < len(self.select):
            raise ValueError(f"select {list(self.select)}: expected at least one, each once")
        for name in self.select:
            if name not in SELECTIONS:
                raise ValueError(f"select {name!r}: expected one of {', '.join(SELECTIONS)}")
        for name, key in (("verifier", "verifier"), ("reward", "reward_url")):
            if (name in self.select) != (getattr(self, key) is not None):
                raise ValueError(
                    f"select {name!r} and key {key} need each other: give both or neither"
                )
        if "{answer}" not in self.reward_prompt:
            raise ValueError(f"reward_prompt {self.reward_prompt!r}: expected {{answer}} in it")

    @property
    def logprob_request(self) -> dict[str, Any]:
        """Fields of a request that ask for the log-probabilities ``select`` needs."""
        if "self_certainty" in self.select:
            return {"return_logprob": True, "top_logprobs_num": self.top_logprobs}
        return {"return_logprob": True} if "logprob" in self.select else {}
