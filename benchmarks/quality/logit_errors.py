"""What the guard of ``patternkv_sgl/guard.py`` would see of each cache, for its limit.

python -m benchmarks.quality.logit_errors --out benchmarks/results/quality_logits.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson
import torch
from tqdm import tqdm

from benchmarks.bench_quality import Bench
from benchmarks.quality.cache import LayerPrompt
from benchmarks.quality.decoding import prefill
from benchmarks.quality.methods import Setting
from benchmarks.quality.tasks import problem_set, prompt_batches
from patternkv_sgl.guard import logit_error
from recipes.environment import git_commit

MODELS = ("demo", "demo_outliers_8", "demo_outliers_32")
METHODS = (
    "patternkv_sgl:4/2",
    "patternkv_sgl:2/2",
    "patternkv_sgl[protect=0]:2/2",
    "patternkv_sgl[protect=0,rotate=0]:2/2",
    "patternkv_sgl[protect=0,patterns=16]:2/2",
    "patternkv_sgl[protect=0,balance=0]:2/2",
    "patternkv_paper:2/2",
    "kivi_g32:2/2",
    "hadamard_lloyd:2/2",
    "int_pth:2/2",
)


def worst_head(prompt: LayerPrompt, setting: Setting) -> float:
    """:func:`logit_error` of the worst KV head of the first of a layer's prompts."""
    cache = setting.maker(1, 1)(prompt)
    stored = torch.cat([cache.shared_k, cache.own_k[:, 0, :, : cache.held]], 2)
    q, k, stored_k = (x[0].transpose(0, 1)[::2] for x in (prompt.q, prompt.k, stored))
    return float(logit_error(q, k, stored_k).max())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--level", default="demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.cells = args.out.with_suffix(".cells")  # never written
    settings = [setting for text in args.methods for setting in Setting.parse(text)]
    rows = []
    for model in args.models:
        bench = Bench(model, settings, args)
        problems = problem_set(args.level, 1, args.seed, "{context}{question}", None)
        prompts = next(iter(prompt_batches(bench.tokenizer, problems, 1)))
        layers = prefill(bench.model, prompts.tokens).layers
        for setting in tqdm(settings, desc=model):
            errors = [round(worst_head(prompt, setting), 4) for prompt in layers]
            row = {"model": bench.name, "method": str(setting), "errors": errors}
            rows.append(row | {"commit": git_commit()})
    args.out.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


if __name__ == "__main__":
    main()
