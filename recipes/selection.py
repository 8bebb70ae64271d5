"""Ways of picking one of k answers, and how often each picks a right one.

==================  ==============================================================================
``majority``        the answer most samples give (``metrics.maj_at_k``)
``logprob``         highest mean log-probability of its tokens
``self_certainty``  highest mean over tokens of -1/K Σ log p of the K most likely tokens. With K the
                    whole vocabulary this ranks as the self-certainty of Kang et al. 2025
                    (arXiv 2502.18581) does; few K is the confidence of Fu et al. 2025 (2508.15260).
``verifier``        highest score of a function of the user's
``reward``          highest score of a reward model
==================  ==============================================================================

SGLang's log-probabilities are those after the temperature and before top-p and top-k.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .records import Sample

SELECTIONS = ("majority", "logprob", "self_certainty", "verifier", "reward")
# Selections whose scores come from outside, after the samples.
SCORED = ("verifier", "reward")


@dataclass(frozen=True)
class Score:
    """What a scorer thinks of one sample; higher is better.

    Attributes:
        problem, index: the sample. select: ``verifier`` or ``reward``.
        scorer: what exactly gave it; scores of another scorer are not comparable.
    """

    problem: str
    index: int
    select: str
    scorer: str
    value: float


Scores = Mapping[tuple[str, int], float]


def best_at_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Chance that the best-scored of ``k`` of the samples, drawn without replacement, is right.

    Exact over all subsets of size ``k``; samples that tie for the best score share the credit.
    """
    tied: defaultdict[float, list[bool]] = defaultdict(list)
    for score, good in zip(scores, correct, strict=True):
        tied[score].append(good)
    below, credit = 0, 0.0
    for score in sorted(tied):
        group = tied[score]
        # Subsets that reach into this group and no higher; within it every member is as likely.
        subsets = math.comb(below + len(group), k) - math.comb(below, k)
        credit += subsets * sum(group) / len(group)
        below += len(group)
    return credit / math.comb(len(scores), k)


def sample_scores(select: str, group: Sequence[Sample], given: Scores) -> list[float]:
    """The scores by which ``select`` (not ``majority``) picks among the samples of ``group``.

    Raises:
        ValueError: a sample has none.
    """
    found = []
    for sample in group:
        if select == "logprob":
            score = sample.mean_logprob
        elif select == "self_certainty":
            score = sample.self_certainty
        else:
            score = given.get((sample.problem, sample.index))
        if score is None or math.isnan(score):
            raise ValueError(
                f"problem {sample.problem!r}, sample {sample.index}: {select} is {score}; "
                f"expected a number: was it drawn with select {select}?"
            )
        found.append(score)
    return found
