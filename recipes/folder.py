"""Names the folder of a run by everything that its samples depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson

from .config import RunConfig
from .environment import source_digest, versions
from .model import fingerprint
from .problems import ProblemSet

# Problems and template enter as prompts. What is left out changes no sample's distribution.
SAMPLE_KEYS = (
    "base_url", "grader", "answer_pattern", "n", "temperature", "top_p", "top_k", "max_new_tokens",
    "stop", "seed", "mem_fraction_static", "engine_args", "logprob_request",
)  # fmt: skip


def run_folder(config: RunConfig, problems: ProblemSet) -> Path:
    """The folder under ``config.output``: what a reader looks for, then a digest of the rest.

    Runs that differ in anything a sample depends on, versions included, never meet in one folder;
    the variants of one run do.
    """
    model = Path(config.model or "server")
    digest = hashlib.sha256(
        orjson.dumps(
            {
                **{name: getattr(config, name) for name in SAMPLE_KEYS},
                "model": fingerprint(model) if model.is_dir() else config.model,
                "versions": versions(),
                "source": source_digest(),
                "problems": [(p.id, problems.prompt(p), p.answer) for p in problems.problems],
            },
            option=orjson.OPT_SORT_KEYS,
        )
    )
    source = f"demo-{config.level}" if config.problems == "demo" else Path(config.problems).stem
    parts = (
        f"{source}-{len(problems.problems)}",
        model.name,
        f"n{config.n}",
        f"t{config.temperature:g}",
        f"seed{config.seed}",
        digest.hexdigest()[:8],
    )
    return Path(config.output) / "__".join(parts)
