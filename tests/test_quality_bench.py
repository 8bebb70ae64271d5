"""The quality bench around its methods: decoding, tasks, statistics, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import report_quality
from benchmarks.attention import prepare
from benchmarks.bench_quality import DEMO, main
from benchmarks.quality.cells import Cell
from benchmarks.quality.decoding import Decoder, attention_errors, force, prefill, sample
from benchmarks.quality.flatness import Flatness
from benchmarks.quality.methods import EXACT, Setting
from benchmarks.quality.outliers import add_k_outliers
from benchmarks.quality.served import difference, simulate
from benchmarks.quality.statistics import Paired
from benchmarks.quality.tasks import ledger_chains, loops, problem_set, prompt_batches
from recipes.demo.ledger import Level
from recipes.records import Records

LEVEL = Level(12, 4)


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    model = load()
    prepare(model)
    return model


def test_forced_decoding_gives_the_models_own_log_probs(model: Any, tokenizer: Any) -> None:
    (chains,) = ledger_chains(tokenizer, LEVEL, 2, 2, seed=0, batch=2)
    start = prefill(model, chains.prompts)
    steps: list[Any] = []
    decoder = Decoder(model, start, 1, EXACT.maker(1, chains.tokens.shape[1]), steps)
    found = force(decoder, start, chains.tokens)
    with torch.inference_mode():
        whole = load()(torch.cat([chains.prompts, chains.tokens], 1)).logits
    wanted = whole[:, start.length - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    # An exact cache repeats an exact run; a coarse one does not.
    for name, low, high in (("bf16", 0.0, 1e-6), ("int_pth:2/2", 0.1, 2.0)):
        (setting,) = Setting.parse(name)
        caches = [setting.maker(1, len(steps))(layer) for layer in start.layers]
        assert all(low <= error <= high for error in attention_errors(caches, steps))


def test_the_simulator_follows_given_tokens(model: Any, tokenizer: Any) -> None:
    (chains,) = ledger_chains(tokenizer, LEVEL, 1, 1, seed=0, batch=1)
    prompt, tokens = chains.prompts[0].tolist(), chains.tokens[0].tolist()
    with torch.inference_mode():
        whole = load()(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    wanted = [whole[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]
    exact = simulate(model, EXACT, prompt, tokens)
    assert exact == pytest.approx(wanted, abs=1e-3)
    (coarse,) = Setting.parse("int_pth:2/2")
    assert difference(exact, simulate(model, coarse, prompt, tokens)) > 0.05


def test_samples_depend_on_seed_and_branch_and_greedy_follows_the_argmax(
    model: Any, tokenizer: Any
) -> None:
    problems = problem_set(str(LEVEL), 2, 0, "{context}{question}", None)
    (prompts,) = prompt_batches(tokenizer, problems, 2)
    start = prefill(model, prompts.tokens)

    def draw(branches: int, temperature: float, seeds: list[int]) -> list[list[list[int]]]:
        return sample(
            Decoder(model, start, branches, EXACT.maker(branches, 40)),
            start,
            branches=branches,
            temperature=temperature,
            max_new_tokens=40,
            stop_ids=[1],
            seeds=seeds,
        )

    first, second = draw(4, 5.0, [5, 6]), draw(4, 5.0, [6, 5])
    assert first == draw(4, 5.0, [5, 6]) and first[0] != second[0] and first[1] != second[1]
    assert all(len(set(map(tuple, rows))) == 4 for rows in first)
    greedy = draw(1, 0.0, [0, 0])
    for problem, (tokens,) in zip(prompts.problems, greedy, strict=True):
        assert tokens[-1] == 1
        assert problems.grade(problem, tokenizer.decode(tokens, skip_special_tokens=True))[1]


def test_outliers_change_k_and_no_logit(model: Any, tokenizer: Any) -> None:
    (chains,) = ledger_chains(tokenizer, LEVEL, 1, 1, seed=0, batch=1)
    changed = load()
    add_k_outliers(changed, 32)
    prepare(changed)
    before, after = prefill(model, chains.prompts), prefill(changed, chains.prompts)
    assert torch.equal(before.logits, after.logits)
    for old, new in zip(before.layers, after.layers, strict=True):
        ratio = (new.k / old.k)[0].mean(1)  # [h_kv, d]
        assert ((ratio - 32).abs() < 0.01).sum(1).tolist() == [4, 4]
        assert ((ratio - 1).abs() < 0.01).sum(1).tolist() == [60, 60]


@pytest.mark.parametrize("strength", [0, -2, 3])
def test_outliers_need_a_power_of_two(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength {strength}: use a power of two"):
        add_k_outliers(None, strength)  # type: ignore[arg-type]


def test_chains_score_reasoning_only(tokenizer: Any) -> None:
    (chains,) = ledger_chains(tokenizer, LEVEL, 2, 3, seed=0, batch=4)
    words = tokenizer.convert_ids_to_tokens(chains.tokens[0].tolist())
    questions = [word for word, scored in zip(words, chains.scored, strict=True) if not scored]
    assert len(questions) == 9 and questions[::3] == ["?"] * 3
    assert words.count("<eos>") == words.count("answer") == 3


@pytest.mark.parametrize(
    ("tokens", "stopped", "looped"),
    [
        ([1, 2, 3, 4, 3, 4, 3, 4], False, True),
        ([1, 2, 3, 4, 3, 4, 3, 4], True, False),
        ([5, 5, 5], False, True),
        ([3, 4, 3, 4, 3, 4, 9], False, False),
        ([4, 3, 4, 9, 3, 4], False, False),
    ],
)
def test_loops_are_ends_that_repeat_three_times(
    tokens: list[int], stopped: bool, looped: bool
) -> None:
    assert loops(tokens, stopped) is looped


def test_paired_test_by_hand() -> None:
    # Differences 1, 0, 1, 0: mean 0.5, standard error 0.2887, z = 1.732.
    result = Paired.test([1, 1, 1, 0], [0, 1, 0, 0])
    assert (result.difference, result.n) == (0.5, 4)
    assert result.stderr == pytest.approx(0.288675)
    assert result.p == pytest.approx(0.083265, abs=1e-5)
    assert result.detectable == pytest.approx(2.801585 * 0.288675, abs=1e-4)
    assert Paired.test([1, 0], [1, 0]).p == 1.0
    with pytest.raises(ValueError, match="1 and 1 problems"):
        Paired.test([1], [0])


def test_flatness_by_hand() -> None:
    x = torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    flat = Flatness.of(x, x / 2, x, x * 0)
    assert (flat.k_range, flat.k_variance, flat.v_range, flat.v_variance) == (0.5, 0.25, 0, 0)


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    cells = tmp_path / "cells.jsonl"
    small = ["--models", "demo", "--levels", str(LEVEL), "--problems", "3", "--samples", "2"]
    small += ["--chains", "1", "--questions", "1", "--cells", str(cells), "--methods"]
    main([*small, "bf16"])
    before = cells.read_bytes()
    main([*small, "bf16", "int_pth:2/2"])
    after = cells.read_bytes()
    assert after.startswith(before)
    rows = Records(cells, Cell).items
    assert [(row.method, row.task) for row in rows] == [
        (method, f"{kind} {LEVEL}")
        for method in ("bf16", "int_pth")
        for kind in ("forced", "greedy", "sampled")
    ]
    exact, coarse = rows[:3], rows[3:]
    assert exact[0].kl == [0.0] and coarse[0].kl[0] > 0.01
    assert [len(row.right) for row in exact] == [0, 3, 3]
    assert [row.samples for row in exact] == [0, 1, 2]
    for row in exact[1:]:
        votes = [n + sum(given.values()) for n, given in zip(row.right, row.wrong, strict=True)]
        assert votes == [row.samples] * 3


def test_a_problem_file_is_led_along_the_models_own_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = problem_set(str(LEVEL), 1, 0, "{context}{question}", None).problems[0]
    file, cells = tmp_path / "few.jsonl", tmp_path / "cells.jsonl"
    file.write_text(
        f'{{"question": "{drawn.context}{drawn.question}", "answer": {drawn.answer}}}\n'
    )
    flags = ["--models", str(DEMO), "--levels", str(file), "--problems", "1", "--chains", "1"]
    flags += ["--kinds", "forced", "greedy", "--methods", "bf16", "--cells", str(cells)]
    main([*flags, "--answer-pattern", r"answer (\d+)"])
    forced, greedy = Records(cells, Cell).items
    assert (forced.task, greedy.task) == ("forced few", "greedy few")
    assert forced.kl == [0.0] and greedy.right == [1]
    report_quality.main(["--cells", str(cells), "--tables"])
    printed = capsys.readouterr().out
    assert (
        "**model, greedy**" in printed and "| bf16 16/16 | few | 1 × 1 | 16.00 | 100.0" in printed
    )


def test_answers_of_a_problem_file_may_be_expressions(tmp_path: Path) -> None:
    file = tmp_path / "halves.jsonl"
    file.write_text('{"question": "half of one", "answer": "1/2"}\n')
    problems = problem_set(str(file), 1, 0, "{question}", None, "math")
    assert problems.grade(problems.problems[0], r"\boxed{0.5}")[1]
