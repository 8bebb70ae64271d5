"""From how many tokens on does a prompt repay a table of its own? KL on the demo model.

    python -m benchmarks.bench_segments --out benchmarks/results/segments.jsonl

Each row holds one length at one bit width, with the prompt's own table or another prompt's:
teacher-forced KL over worked answers of held-out problems against exact attention, and the bytes
per element of the prompt with its table. Everything else is at its default.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import orjson
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.attention import prepare
from benchmarks.simulate import Cache, divergence, mined, simulated
from patternkv_sgl.config import PatternKVConfig
from recipes.demo.ledger import Level, make_problems
from recipes.environment import git_commit, hardware, versions

MODEL = Path(__file__).parent.parent / "recipes" / "demo" / "model"
BITS = ((4, 4), (4, 2), (2, 2))
SEGMENTS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Sequence:
    """A problem with its worked answer: ``token_ids`` are context, question, answer.

    The context is prefilled once; what follows attends the stored cache, as where many questions
    share a context. ``answer`` is the first position that is scored.
    """

    token_ids: list[int]
    context: int
    answer: int


def token_sequences(tokenizer: Any, level: Level, count: int, seed: int) -> list[Sequence]:
    sequences = []
    for problem in make_problems(level, contexts=count, questions=1, seed=seed):
        context = tokenizer(problem.context)["input_ids"]
        prompt = tokenizer(problem.context + problem.question)["input_ids"]
        answer = tokenizer(problem.reasoning, add_special_tokens=False)["input_ids"]
        sequences.append(Sequence(prompt + answer, len(context), len(prompt)))
    return sequences


def exact_log_probs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode(), simulated(None):
        logits = model(torch.tensor([token_ids], device=model.device)).logits[0]
        return logits.float().log_softmax(-1)


def bits_per_element(
    config: PatternKVConfig, model: PreTrainedModel, tokens: int, *, own_table: bool = True
) -> float:
    """Stored bits of one prompt's K and V per element, with its own tables if it has them, without
    page padding."""
    head_dim, layers = model.config.head_dim, model.config.num_hidden_layers
    slots = sum(fmt.bytes_per_slot for fmt in config.slot_formats(layers, 1, head_dim, 1))
    tables = layers * 2 * 2 * head_dim * (config.patterns + 2) if own_table else 0
    return 8 * (slots * tokens + tables) / (2 * head_dim * tokens * layers)


def row(config: PatternKVConfig, kls: list[float], **extra: Any) -> dict[str, Any]:
    return {
        "bits_k": config.k_bits,
        "bits_v": config.v_bits,
        "patterns": config.patterns,
        "rotate": config.rotates(config.k_bits),
        "window": config.window,
        "sinks": config.sinks,
        "kl": mean(kls),
        "kl_stderr": stdev(kls) / len(kls) ** 0.5,
        "n": len(kls),
        **extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--level", type=Level.parse, default="demo", help="of the other prompt")
    parser.add_argument("--count", type=int, default=16, help="held-out problems per length")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.count < 2:
        parser.error(f"--count {args.count}: a standard error takes at least 2")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prepare(model)
    rows = segment_study(model, tokenizer, args)
    meta = {
        "model": "demo" if args.model == str(MODEL) else args.model,
        "seed": args.seed,
    }
    meta |= {"versions": versions(), "hardware": hardware(), "commit": git_commit()}
    args.out.write_bytes(b"".join(orjson.dumps(row | meta) + b"\n" for row in rows))


def segment_study(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Own table or another prompt's, by length of the prompt: when does mining repay?"""
    rows = []
    for tokens in tqdm(SEGMENTS, desc="segments"):
        level = Level(facts=tokens // 16 * 4, depth=4)
        sequences = token_sequences(tokenizer, level, args.count, args.seed)
        other = token_sequences(tokenizer, args.level, 1, args.seed + 1)[0]
        exact = [exact_log_probs(model, sequence.token_ids) for sequence in sequences]
        for k_bits, v_bits in BITS:
            config = PatternKVConfig(k_bits, v_bits)
            with torch.inference_mode(), simulated(Cache(config, other.context)):
                model(torch.tensor([other.token_ids], device=model.device))
            inherited = dict(mined)
            for tables in (None, inherited):
                kls = [
                    divergence(
                        model, s.token_ids, reference, s.answer, Cache(config, s.context, tables)
                    )
                    for s, reference in zip(sequences, exact, strict=True)
                ]
                own = tables is None
                rows.append(
                    row(
                        config,
                        kls,
                        own_table=own,
                        context=sequences[0].context,
                        bits_per_element=bits_per_element(
                            config, model, sequences[0].context, own_table=own
                        ),
                    )
                )
    return rows


if __name__ == "__main__":
    main()
