"""The best-of-n recipe: configuration, problems, records, and going on after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

import patternkv_kernels
import patternkv_sgl
import recipes.environment
from recipes.config import RunConfig
from recipes.environment import source_digest
from recipes.folder import run_folder
from recipes.grading import normal
from recipes.model import fingerprint, local_model
from recipes.problems import load_problems, read_problems
from recipes.records import Records, Sample
from recipes.report import variant_metrics
from recipes.runner import Run
from recipes.settings import parse
from tests.recipe_fakes import FakeClient, config_of, sample


def parsed(argv: list[str]) -> RunConfig:
    return parse(RunConfig, "best_of_n", "", argv)


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text("model: weights\nn: 4\ntemperature: 1\nengine_args: {page_size: 16}\n")
    config = parsed(["--config", str(path), "--n", "16", "--variants", "bf16", "2/2"])
    assert config.model == str(tmp_path / "weights")
    assert (config.n, config.temperature, config.variants) == (16, 1.0, ("bf16", "2/2"))
    assert config.engine_args == {"page_size": 16}
    assert parsed(["--model", "m", "--num-problems", "3", "--num_problems", "5"]).num_problems == 5


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("temprature: 1", [], "unknown key 'temprature'; known keys: model, base_url"),
        ("model: m", ["--temprature=1"], "unknown key 'temprature'; known keys: model, base_url"),
        ("model: m\nn: eight", [], "n: 'eight' is no int"),
        ("model: m\nn: true", [], "n: True is no int"),
        ("model: m\nn: 0", [], "n 0: expected at least 1"),
        ("model: m\nvariants: bf16", [], "variants: 'bf16' is no list"),
        ("model: m\nvariants: [4/4, 4/4]", [], "each once"),
        ("model: m\nvariants: [four]", [], "expected bf16, fp8 or K/V bits"),
        ("model: m\ntemperature: 0", [], "greedy samples are all the same"),
        ("model: m\nmem_fraction_static: 1.5", [], "expected between 0 and 1"),
        ("model: m\nprompt: hello", [], "expected {question} in it"),
        ("n: 4", [], "model is missing"),
        ("- a list", [], "expected a mapping"),
    ],
)
def test_bad_configuration_is_refused(
    text: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parsed(["--config", str(path), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_is_named_by_what_samples_depend_on(tmp_path: Path) -> None:
    base = config_of(tmp_path)
    problems = load_problems(base)

    def folder(config: RunConfig) -> Path:
        return run_folder(config, load_problems(config))

    assert folder(base) == run_folder(
        config_of(tmp_path, variants=("2/2",), concurrency=9), problems
    )
    changes: list[dict[str, Any]] = [
        {"temperature": 0.7}, {"n": 4}, {"problem_seed": 1}, {"prompt": "{context} {question}"},
        {"engine_args": {"page_size": 16}}, {"model": "other"}, {"max_new_tokens": 9},
    ]  # fmt: skip
    assert len({folder(config_of(tmp_path, **change)) for change in [{}, *changes]}) == 8


def test_folder_depends_on_the_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    config = config_of(tmp_path, model=str(tmp_path))
    problems = load_problems(config)
    weights.write_bytes(b"one")
    first = run_folder(config, problems)
    weights.write_bytes(b"two")
    assert run_folder(config, problems) != first


def test_folder_depends_on_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    problems = load_problems(config)
    first = run_folder(config, problems)
    monkeypatch.setattr("recipes.folder.source_digest", lambda: "other sources")
    second = run_folder(config, problems)
    monkeypatch.setattr("recipes.folder.versions", lambda: {"sglang": "0.5.24"})
    assert len({first, second, run_folder(config, problems)}) == 3


def test_source_digest_covers_every_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {source_digest()}
    copies = []
    for module in (patternkv_kernels, patternkv_sgl, recipes.environment):
        there = Path(module.__file__ or "")
        copy = shutil.copytree(there.parent, tmp_path / there.parent.name) / there.name
        monkeypatch.setattr(module, "__file__", str(copy))
        copies.append(copy)
    seen.add(source_digest())
    assert len(seen) == 1
    for copy in copies:
        with copy.open("a") as file:
            file.write("# changed\n")
        seen.add(source_digest())
    assert len(seen) == 4


def test_generated_problems_share_contexts(tmp_path: Path) -> None:
    problems = load_problems(config_of(tmp_path))
    assert len(problems.problems) == 6
    for problem in problems.problems:
        assert problems.prompt(problem) == problem.context + problem.question
        assert problems.shared_prompt(problem) == problem.context
        assert problems.grade(problem, f" answer {problem.answer}") == (problem.answer, True)
        assert problems.grade(problem, "no idea") == (None, False)
    assert len({problem.context for problem in problems.problems}) == 2


def test_problems_from_a_file_are_grouped_by_context(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [
        {"id": "a", "context": "X", "question": "1+1?", "answer": 2, "level": 3},
        {"id": "b", "context": "Y", "problem": "1000+234?", "expected_answer": "1,234.0"},
        {"context": "X", "question": "{2+2}?", "answer": "4"},
    ]
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    config = config_of(
        tmp_path, problems=str(path), num_problems=3, prompt="<{context}>{question}!"
    )
    problems = load_problems(config)
    assert [problem.id for problem in problems.problems] == ["a", "3", "b"]
    assert problems.prompt(problems.problems[1]) == "<X>{2+2}?!"
    assert problems.problems[0].level == "3"
    assert problems.grade(problems.problems[2], "so 17, no, 1234.") == ("1234", True)
    with pytest.raises(ValueError, match="has only 3"):
        load_problems(config_of(tmp_path, problems=str(path), num_problems=4))
    boxed = config_of(
        tmp_path, problems=str(path), num_problems=3, answer_pattern=r"\\boxed\{([^}]*)\}"
    )
    found = load_problems(boxed)
    assert found.grade(found.problems[0], r"\boxed{5} then \boxed{6} 7") == ("6", False)


def test_bad_problem_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "q", "answer": 1}\n{"question": "q"}\n')
    with pytest.raises(ValueError, match=r"problems.jsonl:2: expected a JSON object with question"):
        read_problems(path)
    path.write_text('{"id": 1, "question": "q", "answer": 1}\n' * 2)
    with pytest.raises(ValueError, match=r"problems.jsonl:2: id '1' comes twice"):
        read_problems(path)


def test_answers_compare_by_value() -> None:
    assert normal(" 1,234.50 ") == normal("1234.5")
    assert normal("100") == "100"
    assert normal("-0.0") != normal("0.01")
    assert normal("x + 1.") == "x + 1"


def test_records_round_trip_and_lose_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    items = [
        sample("p", 0, True, text='line\n"quoted" ünïcode'),
        sample("p", 1, False, answer=None),
    ]
    Records(path, Sample).append(*items)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:25])
    assert Records(path, Sample).items == items
    assert path.read_bytes() == whole
    path.write_bytes(b"{]\n" + whole)
    with pytest.raises(ValueError, match=r"samples.jsonl:1: not JSON"):
        Records(path, Sample)
    path.write_bytes(whole + b'{"problem": "p"}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl:3: not a Sample with keys answer"):
        Records(path, Sample)


def test_a_run_prefills_each_context_once_and_ahead(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    problems = load_problems(config)
    client = FakeClient()
    drawn = Run(tmp_path, "4-4", config, problems)
    drawn.draw(client, "4/4", seed=5)
    contexts = [prompt for prompt, n in client.calls if n == 0]
    assert contexts == list(dict.fromkeys(problem.context for problem in problems.problems))
    for problem in problems.problems:
        at = client.calls.index((problems.prompt(problem), config.n))
        assert client.calls.index((problem.context, 0)) < at
    assert client.most_in_flight <= config.concurrency + 1
    keys = [(item.problem, item.index) for item in drawn.samples.items]
    assert sorted(keys) == sorted((p.id, i) for p in problems.problems for i in range(2))
    assert {item.seed for item in drawn.samples.items} == {5}
    (session,) = drawn.sessions.items
    assert (session.kv_reads, session.kv_reads_shared) == (600, 300)
    assert session.completion_tokens == 120
    assert drawn.finished
    assert Run(tmp_path, "4-4", config, problems).finished


def test_an_interrupted_run_repeats_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, concurrency=1)
    problems = load_problems(config)
    with pytest.raises(RuntimeError, match="broken"):
        Run(tmp_path, "4-4", config, problems).draw(FakeClient(breaks_after=4), "4/4", seed=0)
    path = tmp_path / "samples-4-4.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    path.write_bytes(b"".join(lines)[:-20])
    resumed = Run(tmp_path, "4-4", config, problems)
    assert not resumed.finished
    assert resumed.next_seed == 1
    client = FakeClient()
    resumed.draw(client, "4/4", resumed.next_seed)
    fourth, fifth, sixth = (problems.prompt(problem) for problem in problems.problems[3:])
    assert [call for call in client.calls if call[1]] == [(fourth, 1), (fifth, 2), (sixth, 2)]
    keys = [(item.problem, item.index) for item in Records(path, Sample).items]
    assert sorted(keys) == sorted((p.id, i) for p in problems.problems for i in range(2))
    assert Run(tmp_path, "4-4", config, problems).finished


@pytest.mark.parametrize(
    "change", [{"version": "0.5.24"}, {"kv_quant_window": 0}, {"model_path": "other"}]
)
def test_samples_of_another_engine_are_not_mixed(change: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path, concurrency=1)
    problems = load_problems(config)
    with pytest.raises(RuntimeError, match="broken"):
        Run(tmp_path, "4-4", config, problems).draw(FakeClient(breaks_after=2), "4/4", seed=0)
    there = (tmp_path / "samples-4-4.jsonl").read_bytes()
    (name, value) = next(iter(change.items()))
    message = f"drawn with another engine .{name} was .* and is {value!r}"
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, "4-4", config, problems).draw(FakeClient(info=change), "4/4", seed=1)
    assert (tmp_path / "samples-4-4.jsonl").read_bytes() == there
    origin = tmp_path / "origin-4-4.json"
    origin.unlink()
    with pytest.raises(ValueError, match=r"origin-4-4\.json is missing"):
        Run(tmp_path, "4-4", config, problems).draw(FakeClient(), "4/4", seed=1)


def test_the_origin_is_the_first_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, concurrency=1)
    problems = load_problems(config)
    monkeypatch.setattr("recipes.origin.git_commit", lambda: "first")
    with pytest.raises(RuntimeError, match="broken"):
        Run(tmp_path, "4-4", config, problems).draw(FakeClient(breaks_after=2), "4/4", seed=0)
    monkeypatch.setattr("recipes.origin.git_commit", lambda: "second")
    resumed = Run(tmp_path, "4-4", config, problems)
    resumed.draw(FakeClient(), "4/4", seed=1)
    assert variant_metrics(resumed, {})["origin"]["git_commit"] == "first"


def test_a_model_is_a_folder_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_model(str(tmp_path)) == tmp_path
    assert local_model("nobody/nothing") is None
    assert local_model("/not/a/name/of a model") is None
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_model("some/model") == snapshot
    before = fingerprint(snapshot)
    (snapshot / "config.json").write_text("[]")
    assert fingerprint(snapshot) != before
