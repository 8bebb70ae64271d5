"""Measure pass@1 and maj@k of a model folder on held-out problems, with Hugging Face's Llama.

``python -m recipes.demo.evaluate --model recipes/demo/model --levels demo --out eval.json``
One question per context, so problems are independent and standard errors are over problems.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ledger import LEVELS, MODULUS, Level, extract_answer, level_argument, make_problems

SUBSETS = 64
"""Random subsets of the samples over which maj@k is averaged."""


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Tensor,
    *,
    n: int,
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator,
) -> Tensor:
    """Sample ``n`` completions of each of ``prompts`` ``[problems, length]`` (0 degrees: greedy).

    Returns ``[problems, n, max_new_tokens]``; after its end of text a completion is padding.
    """
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    out = model(prompts, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    done = torch.zeros(len(logits), dtype=torch.bool, device=prompts.device)
    steps = []
    for _ in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probabilities = (logits.float() / temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        token = token.masked_fill(done, pad)
        steps.append(token)
        done |= token == eos
        if done.all():
            break
        out = model(token[:, None], past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1]
    tokens = torch.stack(steps, -1).view(len(prompts), n, -1)
    return torch.nn.functional.pad(tokens, (0, max_new_tokens - tokens.shape[-1]), value=pad)


def majority(votes: Tensor, truth: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Chance per problem ``[problems]`` that the most frequent of ``k`` answers is right.

    ``votes`` ``[problems, n]`` holds answers, ``MODULUS`` where a sample gave none (it does not
    vote); a tie is broken evenly. Averaged over random subsets of ``k`` of the ``n`` samples.
    """
    problems, n = votes.shape
    total = torch.zeros(problems)
    for _ in range(SUBSETS):
        chosen = torch.rand(problems, n, generator=generator).argsort(1)[:, :k]
        ballots = votes.gather(1, chosen)
        counts = torch.zeros(problems, MODULUS + 1)
        counts.scatter_add_(1, ballots, torch.ones(ballots.shape))
        counts[:, MODULUS] = 0
        best = counts.max(1).values
        winners = (counts == best[:, None]) & (best[:, None] > 0)
        right = winners.gather(1, truth[:, None])[:, 0]
        total += right / winners.sum(1).clamp(min=1)
    return total / SUBSETS


def evaluate(
    model: Any,
    tokenizer: Any,
    level: Level,
    *,
    temperature: float,
    problems: int,
    n: int,
    seed: int,
    rows: int,
) -> dict[str, Any]:
    """Sample every problem ``n`` times (once if greedy), ``rows`` sequences at a time."""
    n = n if temperature > 0 else 1
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    drawn = list(make_problems(level, contexts=problems, questions=1, seed=seed))
    prompts = torch.tensor([tokenizer(p.context + p.question)["input_ids"] for p in drawn])
    start = time.monotonic()
    votes = []
    for chunk in prompts.split(max(1, rows // n)):
        tokens = sample(
            model,
            chunk.to(device),
            n=n,
            temperature=temperature,
            max_new_tokens=7 * level.depth + 8,
            generator=generator,
        )
        texts = tokenizer.batch_decode(tokens.flatten(0, 1).tolist(), skip_special_tokens=True)
        answers = [extract_answer(text) for text in texts]
        votes += [MODULUS if answer is None else int(answer) for answer in answers]
    ballots = torch.tensor(votes).view(len(drawn), n)
    truth = torch.tensor([int(p.answer) for p in drawn])
    share = (ballots == truth[:, None]).float().mean(1)
    host = torch.Generator().manual_seed(seed)
    voted = {k: majority(ballots, truth, k, host) for k in range(1, n + 1)}
    return {
        "level": str(level),
        "temperature": temperature,
        "problems": len(drawn),
        "samples": n,
        "prompt_tokens": prompts.shape[1],
        "pass@1": share.mean().item(),
        "pass@1_se": standard_error(share),
        "no_answer": (ballots == MODULUS).float().mean().item(),
        "maj": {k: value.mean().item() for k, value in voted.items()},
        "maj_se": {k: standard_error(value) for k, value in voted.items()},
        "seconds": round(time.monotonic() - start, 1),
    }


def standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure pass@1 and maj@k on held-out problems.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--levels", type=level_argument, nargs="+", default=[LEVELS["demo"]])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2048, help="sequences at a time")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="results as JSON")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    results = []
    for level in args.levels:
        for temperature in args.temperatures:
            result = evaluate(
                model,
                tokenizer,
                level,
                temperature=temperature,
                problems=args.problems,
                n=args.samples,
                seed=args.seed,
                rows=args.rows,
            )
            results.append(result)
            maj = {k: round(v, 3) for k, v in result["maj"].items() if k in (4, 8, 16)}
            print(
                f"{result['level']:>8} T={temperature} pass@1 {result['pass@1']:.3f}"
                f" ± {result['pass@1_se']:.3f} maj {maj} none {result['no_answer']:.3f}"
                f" {result['seconds']} s",
                flush=True,
            )
            if args.out is not None:
                args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
