"""Training batches of the ledger task, drawn on the training device.

The same task as ``ledger.py``, vectorised: the layout of a batch is the same for all its rows (only
names, numbers and the order of facts differ), so a batch is a few gathers and costs a millisecond.

The reasoning trained on comes from a teacher who slips: it forgets to carry in a share ``SLIP`` of
the additions that have a carry (its total is ten too low) and goes on from there. A model that has
learned the task therefore slips as often when it samples at temperature 1, at random places, while
the right total stays the most likely one at every step: what sampling more can repair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ledger import MODULUS, NAMES, OPENING, SPLIT_MODULUS, SYLLABLES
from .vocabulary import EOS, FIRST_DELTA, FIRST_NUMBER, FIRST_SYLLABLE, PAD, TOKEN_IDS

SLIP = 0.15


@dataclass(frozen=True)
class Batch:
    """Rows of one context followed by several questions with their reasoning.

    ``tokens``: ``[rows, length]`` int64, padded at the end. ``predictors``: ``[questions, m]``
    int64, the positions whose next token is reasoning; ``m = 7 * depth + 1``. ``expected``: the
    tokens, with what a teacher without slips would have written next at every slip.
    ``context_length``: tokens before the first question.
    """

    tokens: Tensor
    expected: Tensor
    predictors: Tensor
    context_length: int


def draw_batch(
    rows: int, length: int, depth: int, asked: float, generator: torch.Generator
) -> Batch:
    """Fill ``rows`` rows of ``length`` tokens with ledgers of chains ``depth`` facts long.

    ``asked`` is the share of chains that is asked (at least one). As many chains as fit in
    ``length``, or as there are names for. Raises ``ValueError`` if not even one fits.
    """
    device = generator.device
    context_cost, question_cost = 6 * depth - 2, 7 * depth + 4
    chains = int((length - 1) / (context_cost + asked * question_cost))
    chains = min(chains, len(NAMES) // depth)
    questions = min(round(asked * chains), (length - 1 - chains * context_cost) // question_cost)
    if chains < 1 or length - 1 < chains * context_cost + question_cost:
        raise ValueError(
            f"length {length}: one chain of depth {depth} and its question need "
            f"{1 + context_cost + question_cost} tokens; use longer rows or a smaller depth"
        )
    questions = max(1, questions)

    shuffled = torch.rand(rows, len(NAMES), device=device, generator=generator).argsort(1)
    names = shuffled[:, : chains * depth].view(rows, chains, depth)
    numbers = torch.randint(MODULUS, (rows, chains, depth), device=device, generator=generator)
    # Held-out contexts are those whose numbers sum to a multiple: step off it (see ledger.py).
    held_out = numbers.sum((1, 2)) % SPLIT_MODULUS == 0
    numbers[:, -1, -1] = (numbers[:, -1, -1] + held_out.long()) % MODULUS

    pad = TOKEN_IDS[PAD]
    semicolon = torch.full_like(names, TOKEN_IDS[";"])
    first = names // len(SYLLABLES) + FIRST_SYLLABLE
    second = names % len(SYLLABLES) + FIRST_SYLLABLE
    third, fourth = first.roll(-1, 2), second.roll(-1, 2)
    fifth = numbers + FIRST_DELTA
    third[..., -1] = numbers[..., -1] + FIRST_NUMBER
    fourth[..., -1] = fifth[..., -1] = pad
    facts = torch.stack((semicolon, first, second, third, fourth, fifth), -1)
    order = torch.rand(rows, chains * depth, device=device, generator=generator).argsort(1)
    facts = facts.view(rows, -1, 6).gather(1, order[..., None].expand(-1, -1, 6))
    # Every row has the same number of last facts, which are two tokens shorter than the others.
    context = facts[facts != pad].view(rows, chains * context_cost)

    # Forgetting a carry leaves the units right, so what carries does not depend on earlier slips.
    totals = numbers.cumsum(2)
    carries = totals % 10 < numbers % 10
    chances = torch.rand(numbers.shape, device=device, generator=generator)
    slips = 10 * (carries & (chances < SLIP)).long()
    written = (totals - slips.cumsum(2)) % MODULUS
    meant = (written + slips) % MODULUS

    def constant(word: str) -> Tensor:
        return torch.full((rows, questions, 1), TOKEN_IDS[word], device=device)

    def dialogue(totals: Tensor) -> Tensor:
        total_tokens = totals + FIRST_NUMBER
        step = [semicolon, first, second, third, fourth, fifth, total_tokens]
        step[4] = torch.cat((fourth[..., :-1], total_tokens[..., -1:]), -1)
        steps = torch.stack(step, -1)[:, :questions].reshape(rows, questions, 7 * depth)
        names = (first[:, :questions, :1], second[:, :questions, :1])
        ends = (constant("answer"), written[:, :questions, -1:] + FIRST_NUMBER, constant(EOS))
        parts = (constant("?"), *names, steps[..., :-2], *ends)
        return torch.cat(parts, -1).view(rows, questions * question_cost)

    opening = torch.full((rows, 1), TOKEN_IDS[OPENING], device=device)
    context_length = 1 + context.shape[1]
    filling = length - context_length - questions * question_cost
    padding = torch.full((rows, filling), pad, device=device)
    tokens = torch.cat((opening, context, dialogue(written), padding), 1)
    expected = torch.cat((opening, context, dialogue(meant), padding), 1)
    starts = context_length + question_cost * torch.arange(questions, device=device)
    predictors = starts[:, None] + torch.arange(2, question_cost - 1, device=device)
    return Batch(tokens, expected, predictors, context_length)
