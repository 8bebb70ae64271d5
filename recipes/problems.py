"""Problems: read from JSONL or generated, in the order that reuses the radix cache best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson

from .config import TaskConfig
from .grading import LAST_NUMBER, Extract, Grader, MathGrader, TextGrader, last_match


@dataclass(frozen=True)
class Problem:
    """A question about a context, and the answer that counts as correct.

    Attributes:
        id: unique in its set. level: difficulty, None if the set has none.
        context: text that several problems may share. question: the problem's own text.
        answer: the expected answer.
    """

    id: str
    context: str
    question: str
    answer: str
    level: str | None = None


@dataclass(frozen=True)
class ProblemSet:
    """Problems, how they become prompts and how answers are read.

    Attributes:
        problems: those over one context follow each other.
        template: prompt template with ``{context}`` and ``{question}``.
        grader: reads and compares answers.
    """

    problems: tuple[Problem, ...]
    template: str
    grader: Grader

    def prompt(self, problem: Problem) -> str:
        """The whole prompt; it starts with ``shared_prompt``."""
        tail = self.template.partition("{question}")[2]
        return self.shared_prompt(problem) + problem.question + self._filled(tail, problem)

    def shared_prompt(self, problem: Problem) -> str:
        """What the prompts of all problems over this context start with."""
        return self._filled(self.template.partition("{question}")[0], problem)

    def grade(self, problem: Problem, text: str) -> tuple[str | None, bool]:
        """The answer in ``text`` and whether it is the expected one."""
        return self.grader(text, problem.answer)

    @staticmethod
    def _filled(part: str, problem: Problem) -> str:
        return part.replace("{context}", problem.context)


def load_problems(config: TaskConfig) -> ProblemSet:
    """The problems a configuration names.

    Raises:
        ValueError: a line of the file is no problem, an answer is none that the grader could
            compare, or there are fewer problems than asked for.
        RuntimeError: a package that the grader needs is not installed.
    """
    if config.problems == "demo":
        problems, extract = _generate(config)
    else:
        problems, extract = read_problems(Path(config.problems)), None
    if config.answer_pattern is not None:
        extract = last_match(config.answer_pattern)
    grader: Grader
    if config.grader == "math":
        grader = MathGrader(extract)
    else:
        grader = TextGrader(extract or last_match(LAST_NUMBER))
    if len(problems) < config.num_problems:
        raise ValueError(
            f"num_problems {config.num_problems}: {config.problems} has only {len(problems)}"
        )
    groups: dict[str, list[Problem]] = {}
    for problem in problems[: config.num_problems]:
        grader.check(problem.answer)
        groups.setdefault(problem.context, []).append(problem)
    ordered = tuple(problem for group in groups.values() for problem in group)
    return ProblemSet(ordered, config.prompt, grader)


def read_problems(path: Path) -> list[Problem]:
    """Problems from JSONL: ``question`` or ``problem``, ``answer`` or ``expected_answer``, and if
    wanted ``id`` (else the line number), ``context`` and ``level``.

    Raises:
        ValueError: a line is no such object, or an id comes twice; names file and line.
    """
    problems: dict[str, Problem] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            question = row["question"] if "question" in row else row["problem"]
            answer = row["answer"] if "answer" in row else row["expected_answer"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: expected a JSON object with question (or problem) and answer "
                "(or expected_answer), and optionally id, context, level"
            ) from None
        name = str(row.get("id", number))
        if name in problems:
            raise ValueError(f"{path}:{number}: id {name!r} comes twice; ids must be unique")
        level = row.get("level")
        problems[name] = Problem(
            id=name,
            context=row.get("context", ""),
            question=question,
            answer=str(answer),
            level=None if level is None else str(level),
        )
    return list(problems.values())


def _generate(config: TaskConfig) -> tuple[list[Problem], Extract | None]:
    from .demo import ledger

    questions = min(config.questions_per_context, config.num_problems)
    drawn = ledger.make_problems(
        ledger.Level.parse(config.level),
        contexts=-(-config.num_problems // questions),
        questions=questions,
        seed=config.problem_seed,
    )
    problems = [Problem(p.id, p.context, p.question, p.answer, p.level) for p in drawn]
    return problems, ledger.extract_answer
