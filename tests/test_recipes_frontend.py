"""The frontend programs: their keys, what they read from a server, and counts by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import best_of_n, self_consistency, tree_search
from recipes.compare import CompareConfig
from recipes.config import RunConfig
from recipes.frontend import Reads, generation
from recipes.generation import Generation
from recipes.self_consistency import SelfConsistencyConfig
from recipes.settings import load_yaml
from recipes.tree_search import Level, Tree, TreeSearchConfig, table

DEMO = Path(__file__).parents[1] / "recipes" / "demo"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("best_of_n", RunConfig),
        ("compare_runs", RunConfig),
        ("self_consistency", SelfConsistencyConfig),
        ("tree_search", TreeSearchConfig),
    ],
)
def test_shipped_configurations_are_accepted(name: str, kind: Any) -> None:
    config = kind(**load_yaml(kind, DEMO / f"{name}.yaml"))
    assert config.model == str(DEMO / "model")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SelfConsistencyConfig, {"n": 0}, "n 0: expected at least 1"),
        (SelfConsistencyConfig, {"temperature": 0.0}, "temperature 0 with n 8: greedy samples"),
        (SelfConsistencyConfig, {"variant": "5"}, "expected bf16, fp8 or K/V bits"),
        (SelfConsistencyConfig, {"output": __file__}, "the file is there; name another"),
        (TreeSearchConfig, {"keep": 9}, "keep 9: expected at most width 8"),
        (TreeSearchConfig, {"branches": 0}, "branches 0: expected at least 1"),
        (TreeSearchConfig, {"temperature": 0.0, "width": 1, "keep": 1}, "0 with branches 4"),
    ],
)
def test_bad_keys_are_refused(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(model="m", **changes)


@pytest.mark.parametrize("recipe", [self_consistency, tree_search])
def test_no_server_is_told(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--base-url", "http://127.0.0.1:9"]) == 1
    assert "is an SGLang server running there?" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [best_of_n, self_consistency, tree_search])
def test_a_grader_needs_its_package_before_a_server(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert recipe.main(["--base-url", "http://127.0.0.1:9", "--grader", "math"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: grader math needs math-verify") and ".[demo]" in line


def test_paths_in_a_file_are_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "compare.yaml").write_text("results: [run, elsewhere]\n")
    found = load_yaml(CompareConfig, tmp_path / "compare.yaml")
    assert found == {"results": (str(tmp_path / "run"), "elsewhere")}


def answer(tokens: int, text: str = "") -> Generation:
    return Generation(text, 100, 99, tokens, "stop")


def test_reads_below_the_prompt_by_hand() -> None:
    # In four steps the two longest, in two steps all three branches read the prompt of 100 tokens.
    answers = [answer(4), answer(4), answer(2)]
    by_prompt = 100 * (2 + 2 + 1 + 1)
    assert Level(100, answers, Reads(2000, by_prompt)).saved_below_prompt == 0
    assert Level(100, answers, Reads(2000, by_prompt + 30)).saved_below_prompt == 30
    assert Level(100, answers, Reads(2000, by_prompt - 30)).saved_below_prompt == 0
    assert Level(100, answers, Reads(None, None)).saved_below_prompt is None
    assert Level(100, [], Reads(0, 0)).saved_below_prompt == 0


def test_the_table_sums_trees() -> None:
    def tree(*counts: int | None) -> Tree:
        levels = [Level(10, [answer(2)] * 2, Reads(total, 30)) for total in counts]
        return Tree((levels[0], levels[1]), [])

    lines = table([tree(100, 200), tree(100, 40)]).splitlines()
    assert lines[2].split()[2:] == ["4", "140", "60", "(30.0%)", "20"]
    assert lines[3].split()[2:] == ["4", "180", "60", "(25.0%)", "20"]
    stock = [Level(10, [answer(2)], Reads(None, None))] * 2
    assert table([Tree((stock[0], stock[1]), [])]).splitlines()[2].split()[2:] == ["1", *"–––"]


class FailedState:
    """A program's state whose request failed."""

    def get_meta_info(self, name: str) -> None:
        return None

    def error(self) -> Exception:
        return ConnectionError("the server went away")


def test_a_failed_request_is_told() -> None:
    with pytest.raises(RuntimeError, match="gave no 'answer': the server went away"):
        generation(FailedState(), "answer")


def test_reads_are_printed() -> None:
    assert str(Reads(1000, 750)) == "KV tokens read: 250 of 1,000 (75.0% shared)"
    assert "not counted" in str(Reads(None, None))
