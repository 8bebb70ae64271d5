"""Every cache method on the same problems: KL, attention error, pass@k and maj@k.

    python -m benchmarks.bench_quality --small
    python -m benchmarks.bench_quality --problems 1000 --samples 32 --levels easy demo long

Measurements are appended to ``--cells`` and never repeated, so an interrupted run goes on where it
stopped; ``python -m benchmarks.report_quality`` makes the published tables of them.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.attention import prepare
from benchmarks.quality.cells import CURVE_STEP, Cell
from benchmarks.quality.decoding import (
    Decoder,
    Prefilled,
    Step,
    attention_errors,
    force,
    prefill,
    sample,
)
from benchmarks.quality.methods import EXACT, SETTINGS, Setting
from benchmarks.quality.outliers import add_k_outliers
from benchmarks.quality.tasks import (
    Chains,
    Prompts,
    ledger_chains,
    loops,
    problem_set,
    prompt_batches,
)
from recipes.config import GRADERS
from recipes.demo.ledger import Level
from recipes.environment import git_commit
from recipes.problems import ProblemSet
from recipes.records import Records

DEMO = Path(__file__).parent.parent / "recipes" / "demo" / "model"
CELLS = Path(__file__).parent / "results" / "quality_cells.jsonl"
MODELS = ("demo", "demo_outliers_8", "demo_outliers_32")
KINDS = ("forced", "greedy", "sampled")


class Bench:
    """Runs settings on one model and appends what is missing to a file of cells.

    Args:
        name: ``demo``, ``demo_outliers_STRENGTH``, or a Hugging Face name or folder; cells have a
            folder's last part.
    """

    def __init__(self, name: str, settings: Sequence[Setting], args: argparse.Namespace) -> None:
        self.name, self.settings, self.args = Path(name).name, settings, args
        strength = re.fullmatch(r"demo_outliers_(\d+)", name)
        path = DEMO if strength or name == "demo" else name
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        if strength:
            add_k_outliers(self.model, int(strength[1]))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        prepare(self.model)
        self.records = Records(args.cells, Cell)
        self._done = {cell.key for cell in self.records.items}
        self._commit = git_commit()

    def forced(self, task: str, chains: Chains) -> None:
        """KL and attention error along chains, by every setting that has not seen them."""
        missing = self._missing(task, chains.ids)
        if not missing:
            return
        start = prefill(self.model, chains.prompts)
        tokens = chains.tokens.to(self.model.device)
        scored = chains.scored.to(self.model.device)
        steps: list[list[Step]] = []
        length = tokens.shape[1]
        decoder = Decoder(self.model, start, 1, EXACT.maker(1, length), steps)
        exact = force(decoder, start, tokens)
        for setting in missing:
            begin = time.perf_counter()
            decoder = Decoder(self.model, start, 1, setting.maker(1, length))
            log_probs = force(decoder, start, tokens)
            kl = (exact.exp() * (exact - log_probs)).sum(-1)
            curve = [
                part[:, mask].mean().item() if mask.any() else None
                for part, mask in zip(
                    kl.split(CURVE_STEP, 1), scored.split(CURVE_STEP), strict=True
                )
            ]
            caches = [setting.maker(1, length)(prompt) for prompt in start.layers]
            flatness = [cache.flatness for cache in caches]
            self._add(
                setting,
                task,
                chains.ids,
                begin,
                start,
                decoder,
                kl=kl[:, scored].mean(1).tolist(),
                kl_curve=curve,
                attn_err=attention_errors(caches, steps),
                flatness=[list(astuple(layer)) for layer in flatness if layer is not None],
            )

    def sampled(
        self, task: str, prompts: Prompts, problems: ProblemSet, branches: int, temperature: float
    ) -> None:
        """Answers to problems, by every setting that has not answered them."""
        ids = [problem.id for problem in prompts.problems]
        missing = self._missing(task, ids)
        if not missing:
            return
        start = prefill(self.model, prompts.tokens)
        stop_ids = _stop_ids(self.model, self.tokenizer)
        limit = self.args.max_new_tokens
        for setting in missing:
            begin = time.perf_counter()
            decoder = Decoder(self.model, start, branches, setting.maker(branches, limit))
            rows = sample(
                decoder,
                start,
                branches=branches,
                temperature=temperature,
                max_new_tokens=limit,
                stop_ids=stop_ids,
                seeds=[self.args.seed + _number(name) for name in ids],
            )
            right: list[int] = []
            wrong: list[dict[str, int]] = []
            no_answer = looped = 0
            for problem, group in zip(prompts.problems, rows, strict=True):
                texts = self.tokenizer.batch_decode(group, skip_special_tokens=True)
                graded = [problems.grade(problem, text) for text in texts]
                right.append(sum(correct for _, correct in graded))
                wrong.append(dict(Counter(a for a, correct in graded if a and not correct)))
                for row, (answer, _) in zip(group, graded, strict=True):
                    loop = loops(row, row[-1] in stop_ids)
                    looped += loop
                    no_answer += answer is None and not loop
            self._add(
                setting,
                task,
                ids,
                begin,
                start,
                decoder,
                samples=branches,
                right=right,
                wrong=wrong,
                no_answer=no_answer,
                loops=looped,
            )

    def greedy_chains(self, prompts: Prompts) -> Iterator[Chains]:
        """The model's own exact greedy completions, one prompt at a time."""
        stop_ids = _stop_ids(self.model, self.tokenizer)
        limit = self.args.max_new_tokens
        for problem, row in zip(prompts.problems, prompts.tokens, strict=True):
            start = prefill(self.model, row[None])
            decoder = Decoder(self.model, start, 1, EXACT.maker(1, limit))
            ((tokens,),) = sample(
                decoder,
                start,
                branches=1,
                temperature=0,
                max_new_tokens=limit,
                stop_ids=stop_ids,
                seeds=[0],
            )
            scored = torch.ones(len(tokens), dtype=torch.bool)
            yield Chains([problem.id], row[None], torch.tensor([tokens]), scored)

    def _missing(self, task: str, ids: list[str]) -> list[Setting]:
        seed = self.args.seed
        return [
            setting
            for setting in self.settings
            if (self.name, setting.method, *setting.bits, task, seed, tuple(ids)) not in self._done
        ]

    def _add(
        self,
        setting: Setting,
        task: str,
        ids: list[str],
        begin: float,
        start: Prefilled,
        decoder: Decoder,
        **measured: Any,
    ) -> None:
        cell = Cell(
            model=self.name,
            method=setting.method,
            bits_k=setting.bits[0],
            bits_v=setting.bits[1],
            task=task,
            seed=self.args.seed,
            commit=self._commit,
            problems=ids,
            context=start.length,
            generated=decoder.caches[0].length - start.length,
            bits_per_element=decoder.bits_per_element,
            seconds=round(time.perf_counter() - begin, 1),
            **measured,
        )
        self.records.append(cell)
        self._done.add(cell.key)


def _number(name: str) -> int:
    """A seed that depends on a problem's id alone."""
    return int.from_bytes(name.encode()[-6:], "big")


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    return [stop] if isinstance(stop, int) else list(stop)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few easy problems, in minutes")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="demo, demo_outliers_N, or any HF path"
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], help="NAME or NAME:K/V; all of them by default"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--levels", nargs="+", default=["demo"], help="ledger levels or problem files (.jsonl)"
    )
    parser.add_argument("--problems", type=int, default=64, help="greedy and sampled, per level")
    parser.add_argument("--samples", type=int, default=8, help="branches of a sampled problem")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--chains", type=int, default=8, help="forced, per level")
    parser.add_argument("--questions", type=int, default=6, help="questions of a ledger chain")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16, help="prompts at a time")
    parser.add_argument("--prompt", default="{context}{question}")
    parser.add_argument("--answer-pattern", help="of a problem file; its last match is the answer")
    parser.add_argument("--grader", default="text", choices=GRADERS, help="of a problem file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=CELLS)
    args = parser.parse_args(argv)
    if args.small:
        args.models, args.levels = ["demo"], ["easy"]
        args.problems, args.samples, args.chains, args.questions = 8, 4, 4, 3
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    chosen = list(
        dict.fromkeys(setting for text in args.methods for setting in Setting.parse(text))
    )
    for name in args.models:
        bench = Bench(name, chosen or SETTINGS, args)
        for level in args.levels:
            for kind in args.kinds:
                for run in tqdm(list(_runs(bench, kind, level, args)), desc=f"{name} {kind}"):
                    run()


def _runs(
    bench: Bench, kind: str, level: str, args: argparse.Namespace
) -> Iterator[Callable[[], None]]:
    """One call per batch of problems."""
    file = level.endswith(".jsonl")
    task = f"{kind} {Path(level).stem if file else Level.parse(level)}"
    if kind == "forced" and not file:
        for chains in ledger_chains(
            bench.tokenizer,
            Level.parse(level),
            args.chains,
            args.questions,
            args.seed,
            args.batch,
        ):
            yield lambda chains=chains: bench.forced(task, chains)  # type: ignore[misc]
        return
    count = args.chains if kind == "forced" else args.problems
    problems = problem_set(level, count, args.seed, args.prompt, args.answer_pattern, args.grader)
    for prompts in prompt_batches(bench.tokenizer, problems, args.batch):
        if kind == "forced":
            for chains in bench.greedy_chains(prompts):
                yield lambda chains=chains: bench.forced(task, chains)  # type: ignore[misc]
        else:
            greedy = kind == "greedy"
            how = (1, 0.0) if greedy else (args.samples, args.temperature)
            yield lambda prompts=prompts, how=how: bench.sampled(  # type: ignore[misc]
                task, prompts, problems, *how
            )


if __name__ == "__main__":
    main()
