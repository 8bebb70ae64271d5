"""Scores of samples by a function of the user's, or by a reward model behind an SGLang server."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from .config import RunConfig
from .endpoint import Endpoint
from .model import fingerprint, local_model
from .problems import Problem, ProblemSet
from .records import Records, Sample
from .selection import SCORED, Score, Scores

BATCH = 64  # samples a scorer gets at a time; what an interruption can cost


class Scorer(Protocol):
    """Scores samples; higher is better.

    Attributes:
        identity: changes with whatever changes a score.
    """

    identity: str

    def score(self, items: Sequence[tuple[Problem, Sample]]) -> list[float]:
        """One score per item."""


class Verifier:
    """A function ``(problem: Problem, text: str) -> float`` or ``bool``, named by dotted path; a
    leading dot is this package.

    ``problem.answer`` is there for tests of verifiers; one that reads it measures pass@k.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, path: str) -> None:
        module, _, name = path.rpartition(".")
        try:
            self._function: Callable[[Problem, str], float] = getattr(
                importlib.import_module(module, __package__), name
            )
            source = Path(inspect.getfile(self._function)).read_bytes()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"verifier {path!r}: {error}; expected package.module.function of a Python file"
            ) from None
        self.identity = f"{path}@{hashlib.sha256(source).hexdigest()[:12]}"

    def __call__(self, problem: Problem, text: str) -> float:
        return float(self._function(problem, text))

    def score(self, items: Sequence[tuple[Problem, Sample]]) -> list[float]:
        return [self(problem, sample.text) for problem, sample in items]


class RewardModel:
    """A reward model that an SGLang server serves (``--is-embedding``), by its ``/classify``.

    Raises:
        RuntimeError: the server cannot be reached, or gives no single score per text.
    """

    def __init__(self, config: RunConfig, problems: ProblemSet) -> None:
        assert config.reward_url is not None
        self._server = Endpoint(config.reward_url, config.timeout)
        self._template = config.reward_prompt
        self._problems = problems
        about = self._server.ask("model_info")
        template = hashlib.sha256(self._template.encode()).hexdigest()[:12]
        folder = local_model(about["model_path"])
        parts = (
            fingerprint(folder) if folder else about["model_path"],
            about.get("weight_version"),
            template,
        )
        self.identity = " ".join(map(str, parts))

    def score(self, items: Sequence[tuple[Problem, Sample]]) -> list[float]:
        texts = [self._text(problem, sample) for problem, sample in items]
        answers = self._server.ask("classify", {"text": texts})
        scores = [answer["embedding"] for answer in answers]
        odd = next((score for score in scores if len(score) != 1), None)
        if odd is not None or len(scores) != len(texts):
            raise RuntimeError(
                f"{self._server.url}/classify: {len(scores)} answers to {len(texts)} texts, one of "
                f"{len(odd or [0])} numbers; expected one number each: serve a reward model"
            )
        return [float(score[0]) for score in scores]

    def _text(self, problem: Problem, sample: Sample) -> str:
        before, _, after = self._template.partition("{answer}")
        prompt = self._problems.prompt(problem)
        filled = [part.replace("{prompt}", prompt) for part in (before, after)]
        return sample.text.join(filled)


def make_scorer(select: str, config: RunConfig, problems: ProblemSet) -> Scorer:
    """The scorer of selection ``verifier`` or ``reward``."""
    if select == "verifier":
        assert config.verifier is not None
        return Verifier(config.verifier)
    return RewardModel(config, problems)


def score_samples(
    path: Path, config: RunConfig, problems: ProblemSet, samples: Sequence[Sample]
) -> dict[str, Scores]:
    """Scores of ``samples`` by every selection of ``config`` that needs a scorer.

    Effects: appends to ``path`` what it has not, a batch at a time; scores of another scorer stay
    there and are not used.
    """
    records = Records(path, Score)
    by_id = {problem.id: problem for problem in problems.problems}
    found: dict[str, Scores] = {}
    for select in (name for name in config.select if name in SCORED):
        scorer = make_scorer(select, config, problems)
        known = {
            (item.problem, item.index): item.value
            for item in records.items
            if (item.select, item.scorer) == (select, scorer.identity)
        }
        missing = [sample for sample in samples if (sample.problem, sample.index) not in known]
        with tqdm(total=len(samples), initial=len(known), desc=select, unit="sample") as bar:
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                values = scorer.score([(by_id[item.problem], item) for item in batch])
                new = [
                    Score(item.problem, item.index, select, scorer.identity, value)
                    for item, value in zip(batch, values, strict=True)
                ]
                records.append(*new)
                known |= {(item.problem, item.index): item.value for item in new}
                bar.update(len(new))
        found[select] = known
    return found
