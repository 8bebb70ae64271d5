"""Names the folder of a run by everything that its samples depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson

from .config import RunConfig
from .environment import source_digest, versions
from .problems import ProblemSet

# Problems and template enter as prompts. What is left out changes no sample's distribution.
SAMPLE_KEYS = (
    "base_url", "grader", "answer_pattern", "n", "temperature", "top_p", "top_k", "max_new_tokens",
    "stop", "seed", "mem_fraction_static", "engine_args", "logprob_request",
)  # fmt: skip
EDGE_BYTES = 1 << 20


def run_folder(config: RunConfig, problems: ProblemSet) -> Path:
    """The folder under ``config.output``: what a reader looks for, then a digest of the rest.

    Runs that differ in anything a sample depends on, versions included, never meet in one folder;
    the variants of one run do.
    """
    digest = hashlib.sha256(
        orjson.dumps(
            {
                **{name: getattr(config, name) for name in SAMPLE_KEYS},
                "model": model_fingerprint(config.model or "") or config.model,
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
        Path(config.model or "server").name,
        f"n{config.n}",
        f"t{config.temperature:g}",
        f"seed{config.seed}",
        digest.hexdigest()[:8],
    )
    return Path(config.output) / "__".join(parts)


def model_fingerprint(model: str) -> str | None:
    """Digest of a model folder: each file's name and size, and its first and last MiB, so that
    retrained weights differ and large ones need not be read whole. None if it is no folder."""
    folder = Path(model)
    if not model or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
