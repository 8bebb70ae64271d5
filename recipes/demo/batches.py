"""Training batches of the ledger task, drawn on the training device.

The same task as ``ledger.py``, vectorised: the layout of a batch is the same for all its rows (only
names, numbers and the order of facts differ), so a batch is a few gathers and costs a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ledger import MODULUS, NUM_NAMES, OPENING, SPLIT_MODULUS
from .vocabulary import EOS, FIRST_DELTA, FIRST_NAME, FIRST_NUMBER, PAD, TOKEN_IDS


@dataclass(frozen=True)
class Batch:
    """Rows of one context followed by several questions with their reasoning.

    ``tokens``: ``[rows, length]`` int64, padded at the end. ``predictors``: ``[questions, m]``
    int64, the positions whose next token is reasoning; ``m = 5 * depth + 2``. ``context_length``:
    tokens before the first question.
    """

    tokens: Tensor
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
    context_cost, question_cost = 4 * depth - 1, 5 * depth + 4
    chains = int((length - 1) / (context_cost + asked * question_cost))
    chains = min(chains, NUM_NAMES // depth)
    questions = min(round(asked * chains), (length - 1 - chains * context_cost) // question_cost)
    if chains < 1 or length - 1 < chains * context_cost + question_cost:
        raise ValueError(
            f"length {length}: one chain of depth {depth} and its question need "
            f"{1 + context_cost + question_cost} tokens; use longer rows or a smaller depth"
        )
    questions = max(1, questions)

    shuffled = torch.rand(rows, NUM_NAMES, device=device, generator=generator).argsort(1)
    names = shuffled[:, : chains * depth].view(rows, chains, depth)
    numbers = torch.randint(MODULUS, (rows, chains, depth), device=device, generator=generator)
    # Held-out contexts are those whose numbers sum to a multiple: step off it (see ledger.py).
    held_out = numbers.sum((1, 2)) % SPLIT_MODULUS == 0
    numbers[:, -1, -1] = (numbers[:, -1, -1] + held_out.long()) % MODULUS

    semicolon = torch.full_like(names, TOKEN_IDS[";"])
    name_tokens = names + FIRST_NAME
    total_tokens = numbers.cumsum(2) % MODULUS + FIRST_NUMBER
    second = name_tokens.roll(-1, 2)
    third = numbers + FIRST_DELTA
    second[..., -1] = numbers[..., -1] + FIRST_NUMBER
    third[..., -1] = TOKEN_IDS[PAD]
    facts = torch.stack((semicolon, name_tokens, second, third), -1).view(rows, -1, 4)
    order = torch.rand(rows, chains * depth, device=device, generator=generator).argsort(1)
    facts = facts.gather(1, order[..., None].expand(-1, -1, 4))
    # Every row has the same number of last facts, which are one token shorter than the others.
    context = facts[facts != TOKEN_IDS[PAD]].view(rows, chains * context_cost)

    fourth = total_tokens.clone()
    third[..., -1] = total_tokens[..., -1]
    steps = torch.stack((semicolon, name_tokens, second, third, fourth), -1)
    steps = steps[:, :questions].reshape(rows, questions, 5 * depth)[..., :-1]
    answers = total_tokens[:, :questions, -1]

    def constant(word: str) -> Tensor:
        return torch.full_like(answers, TOKEN_IDS[word])[..., None]

    asks = (constant("?"), name_tokens[:, :questions, :1], steps)
    ends = (constant("answer"), answers[..., None], constant(EOS))
    dialogue = torch.cat((*asks, *ends), -1).view(rows, questions * question_cost)

    tokens = torch.full((rows, length), TOKEN_IDS[PAD], device=device)
    context_length = 1 + context.shape[1]
    tokens[:, 0] = TOKEN_IDS[OPENING]
    tokens[:, 1:context_length] = context
    tokens[:, context_length : context_length + dialogue.shape[1]] = dialogue
    starts = context_length + question_cost * torch.arange(questions, device=device)
    predictors = starts[:, None] + torch.arange(1, question_cost - 1, device=device)
    return Batch(tokens, predictors, context_length)
