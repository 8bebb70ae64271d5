"""Our cache through a real engine, and the same tokens through the simulator.

    python -m benchmarks.quality.served --out benchmarks/results/quality_served.jsonl

An engine answers greedily; the simulator is then led along the engine's own tokens. Both say how
likely each token was; the mean difference is compared with that to an engine without
quantization.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import orjson
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.attention import prepare
from benchmarks.quality.decoding import Decoder, force, prefill
from benchmarks.quality.methods import EXACT, Setting
from benchmarks.quality.tasks import problem_set
from recipes.config import RunConfig
from recipes.engines import engine_args
from recipes.environment import git_commit, versions
from recipes.variant import Variant

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"
Answer = tuple[list[int], list[float]]
"""Token ids of an answer, and the log-probability of each."""


def serve(model: str, variant: str, prompts: list[list[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy answers of a fresh engine, one prompt at a time so that batches do not differ."""
    import sglang

    config = RunConfig(model=model, mem_fraction_static=0.3, cpu_threads=1)
    args = engine_args(config, Variant.parse(variant), 0) | {"grammar_backend": "none"}
    engine = sglang.Engine(**args)
    answers = []
    try:
        for ids in prompts:
            sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
            answer = engine.generate(input_ids=ids, sampling_params=sampling, return_logprob=True)
            engine.flush_cache()
            tokens = answer["meta_info"]["output_token_logprobs"]
            answers.append(([token for _, token, _ in tokens], [lp for lp, _, _ in tokens]))
    finally:
        engine.shutdown()
    return answers


def simulate(model: Any, setting: Setting, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log-probability of each of ``tokens`` after ``prompt`` over a simulated cache."""
    start = prefill(model, torch.tensor([prompt]))
    decoder = Decoder(model, start, 1, setting.maker(1, len(tokens)))
    forced = torch.tensor([tokens], device=model.device)
    log_probs = force(decoder, start, forced)
    chosen: list[float] = log_probs.gather(-1, forced.unsqueeze(-1)).flatten().tolist()
    return chosen


def difference(a: list[float], b: list[float]) -> float:
    return mean(abs(x - y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--level", default="demo")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--bits", nargs="+", default=["4/4", "4/2", "2/2"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problems = problem_set(args.level, args.problems, args.seed, "{context}{question}", None)
    prompts = [tokenizer(problems.prompt(p))["input_ids"] for p in problems.problems]
    answers = {
        name: serve(args.model, name, prompts, args.max_new_tokens) for name in ("bf16", *args.bits)
    }
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    prepare(model)
    rows = []
    for name, served in answers.items():
        setting = EXACT if name == "bf16" else Setting.parse(f"patternkv_sgl:{name}")[0]
        same, other, right = [], [], []
        for problem, prompt, (tokens, log_probs) in zip(
            problems.problems, prompts, served, strict=True
        ):
            same.append(difference(log_probs, simulate(model, setting, prompt, tokens)))
            other.append(difference(log_probs, simulate(model, EXACT, prompt, tokens)))
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            right.append(problems.grade(problem, text)[1])
        rows.append(
            {
                "variant": name,
                "level": args.level,
                "problems": len(prompts),
                "tokens": sum(len(tokens) for tokens, _ in served),
                "correct": sum(right),
                "to_simulator": mean(same),
                "to_exact": mean(other),
                "largest_to_simulator": max(same),
                "versions": versions(),
                "commit": git_commit(),
            }
        )
        print({key: rows[-1][key] for key in list(rows[-1])[:8]}, flush=True)
    args.out.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


if __name__ == "__main__":
    main()
