"""Train the demo model on one GPU, by the clock.

``python -m recipes.demo.train --minutes 14 --out recipes/demo/model --checkpoint demo.pt`` trains
for 14 minutes in all; a run that stops early (``--stop-at``) continues from its checkpoint.
``--variant k_bias`` or ``head_dim_128`` trains a relative of the demo model for a few minutes.

Retrieval among many facts does not emerge from long ledgers directly, but it does from short ones
and then carries over. So training climbs ``STAGES``: it mixes all stages reached so far, and
reaches for the next one when the newest is answered well. The loss is on the reasoning only. Every
batch is drawn afresh, so accuracy on training batches is accuracy on unseen problems.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch, draw_batch
from .llama import Llama, LlamaShape, export
from .variants import VARIANTS, load_demo
from .vocabulary import FIRST_DELTA, FIRST_NUMBER, FIRST_SYLLABLE


@dataclass(frozen=True)
class Stage:
    """Rows of ``length`` tokens, ``rows`` of them per step, chains of a depth from ``depths``."""

    length: int
    rows: int
    depths: tuple[int, int]


STAGES = (
    Stage(128, 512, (2, 3)),
    Stage(256, 256, (2, 5)),
    Stage(512, 256, (2, 6)),
    Stage(1024, 128, (2, 8)),
    Stage(2048, 64, (3, 10)),
    Stage(4096, 32, (4, 12)),
)
TINY_STAGES = (Stage(96, 32, (1, 2)), Stage(128, 16, (1, 3)))
TINY_SHAPE = LlamaShape(128, 256, 2, 2, 1)

ASKED_SHARES = (1.0, 1.0, 0.5, 0.2)
"""Shares of a context's chains that a batch asks: few questions leave room for longer contexts."""
GAP_SHARE = 0.15
"""Share of batches with a jump in position before the questions, to train all distances."""
NEWEST_SHARE = 0.6
PROMOTE_AT = 0.6
"""Share of fully correct chains on the newest stage at which the next one opens."""
PEAK_LR, WARMUP_STEPS, DECAY_FROM, FINAL_LR_SHARE = 1e-3, 500, 0.6, 0.03
VARIANT_PEAK_LR, VARIANT_WARMUP_STEPS = 3e-4, 100
"""Of a model that answers well already."""
MEASURE_EVERY = 8
KINDS = {"syllable": FIRST_SYLLABLE, "delta": FIRST_DELTA, "number": FIRST_NUMBER}


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimizer state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    newest: int = 0
    accuracy: list[float] = field(default_factory=list)


def learning_rate(step: int, share: float, peak: float, warmup: int) -> float:
    """Warm-up over steps, under a trapezoid over the share of the time that is spent."""
    left = min(1.0, max(0.0, (1 - share) / (1 - DECAY_FROM)))
    decayed = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * left
    return peak * min((step + 1) / warmup, decayed)


def new_model(args: argparse.Namespace) -> Llama:
    """The model a run without a checkpoint begins with."""
    if args.variant is not None:
        return VARIANTS[args.variant](load_demo())
    return Llama(TINY_SHAPE if args.tiny else LlamaShape())


def pick_stage(newest: int, rng: random.Random) -> int:
    if newest == 0 or rng.random() < NEWEST_SHARE:
        return newest
    return rng.randrange(newest)


def positions_of(batch: Batch, limit: int, rng: random.Random) -> Tensor:
    """Positions ``[length]``; sometimes with a jump between context and questions."""
    length = batch.tokens.shape[1]
    positions = torch.arange(length, device=batch.tokens.device)
    if rng.random() < GAP_SHARE:
        positions[batch.context_length :] += rng.randint(0, limit - length)
    return positions


def predict(model: Llama, batch: Batch, positions: Tensor) -> Tensor:
    """Logits of the reasoning, ``[rows, questions * m, vocab]``."""
    hidden = model(batch.tokens, positions)
    return model.logits(hidden[:, batch.predictors.flatten()])


@torch.no_grad()
def measure(logits: Tensor, batch: Batch) -> dict[str, float]:
    """Share of chains whose every most likely token is right, and of right tokens by kind."""
    targets = batch.expected[:, batch.predictors.flatten() + 1]
    correct = logits.argmax(-1) == targets
    chains = correct.view(-1, batch.predictors.shape[1])
    out = {"chain": chains.all(1).float().mean().item()}
    starts = [*KINDS.values(), logits.shape[-1]]
    for kind, start, stop in zip(KINDS, starts, starts[1:], strict=False):
        of_kind = (targets >= start) & (targets < stop)
        out[kind] = (correct & of_kind).sum().item() / max(1, of_kind.sum().item())
    return out


def save_checkpoint(path: Path, model: Llama, optimizer: Any, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "progress": asdict(progress)}, part)
    part.replace(path)


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    stages = TINY_STAGES if args.tiny else STAGES
    model = new_model(args).to(device)
    shape = model.shape
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    progress = Progress(accuracy=[0.0] * len(stages))
    if args.variant is not None:
        progress.newest = len(stages) - 1
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # Flash attention serves these shapes; cuDNN's fails where the installed cuDNN is older
        # than the one that torch was built with.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not args.eager:
            torch._dynamo.config.recompile_limit = 64
            for layer in model.model.layers:
                layer.compile(dynamic=False)
    # A resumed run draws new batches, not those it began with.
    rng = random.Random(f"{args.seed}/{progress.step}")
    generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + progress.step)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {device}, from step {progress.step}", flush=True)

    peak, warmup = PEAK_LR, WARMUP_STEPS
    if args.variant is not None:
        peak, warmup = VARIANT_PEAK_LR, VARIANT_WARMUP_STEPS
    stop_at = min(args.minutes, args.stop_at) * 60
    before, start = progress.seconds, time.monotonic()
    logged, logged_tokens, loss = start, progress.tokens, torch.zeros(())
    measured: dict[str, float] = {}
    while progress.seconds < stop_at:
        index = pick_stage(progress.newest, rng)
        stage = stages[index]
        depth, asked = rng.randint(*stage.depths), rng.choice(ASKED_SHARES)
        batch = draw_batch(stage.rows, stage.length, depth, asked, generator)
        positions = positions_of(batch, shape.max_position_embeddings, rng)
        with torch.autocast(device.type, torch.bfloat16):
            logits = predict(model, batch, positions)
        targets = batch.tokens[:, batch.predictors.flatten() + 1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = learning_rate(progress.step, progress.seconds / (args.minutes * 60), peak, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        progress.tokens += batch.tokens.numel()
        if progress.step % MEASURE_EVERY == 0:
            measured = {"length": stage.length, "depth": depth, **measure(logits, batch)}
            old = progress.accuracy[index]
            progress.accuracy[index] = 0.8 * old + 0.2 * measured["chain"]
            mastered = progress.accuracy[progress.newest] > PROMOTE_AT
            progress.newest = min(progress.newest + mastered, len(stages) - 1)
        now = time.monotonic()
        progress.seconds = before + now - start
        if now - logged > args.log_every:
            line = {
                "step": progress.step,
                "seconds": round(progress.seconds, 1),
                "tokens_m": round(progress.tokens / 1e6, 1),
                "tokens_per_s": round((progress.tokens - logged_tokens) / (now - logged)),
                "lr": round(lr, 6),
                "loss": round(loss.item(), 4),
                **{kind: round(value, 4) for kind, value in measured.items()},
                "accuracy": [round(value, 3) for value in progress.accuracy],
            }
            print(json.dumps(line), flush=True)
            if args.log is not None:
                with args.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
            save_checkpoint(args.checkpoint, model, optimizer, progress)
            export(model, args.out)
            logged, logged_tokens = now, progress.tokens
    save_checkpoint(args.checkpoint, model, optimizer, progress)
    export(model, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, required=True, help="training time in all")
    parser.add_argument("--stop-at", type=float, default=float("inf"), help="minute to stop at")
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported model")
    parser.add_argument("--checkpoint", type=Path, required=True, help="resumed from if it exists")
    parser.add_argument("--log", type=Path, help="JSON lines, appended")
    parser.add_argument("--log-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variant", choices=list(VARIANTS), help="start from the demo model")
    parser.add_argument("--eager", action="store_true", help="compile nothing: for short runs")
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds on a CPU")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
