"""The plug-in without ``--kv-quant``, and the command line's refusals."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest

from patternkv_sgl.config import PatternKVConfig
from tests.servers import LAUNCH_SERVER, SERVE, START_SECONDS, Model, environment

pytest_plugins = ["tests.fixtures"]
pytestmark = pytest.mark.slow

PATTERNKV = ("--kv-quant", "patternkv")
REFUSED = {
    "scheme": (LAUNCH_SERVER, ("--kv-quant", "int4"), "invalid choice: 'int4'"),
    "bits": (LAUNCH_SERVER, (*PATTERNKV, "--kv-quant-bits", "3"), "--kv-quant-bits '3'"),
    "option": (
        SERVE,
        (*PATTERNKV, "--enable-hierarchical-cache"),
        "--enable-hierarchical-cache does not work with --kv-quant patternkv",
    ),
}


@pytest.fixture(scope="module")
def runs(model: Model) -> dict[str, subprocess.CompletedProcess[str]]:
    """Each refused command line, and ``help``, run to its end, two at a time."""
    commands = {"help": [*LAUNCH_SERVER, "--help"]}
    for name, (command, arguments, _) in REFUSED.items():
        commands[name] = [*command, "--model-path", str(model.path), "--device", "cpu", *arguments]

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_bad_command_lines_end_with_the_reason(
    runs: dict[str, subprocess.CompletedProcess[str]], name: str
) -> None:
    run = runs[name]
    assert run.returncode not in (0, None)
    assert REFUSED[name][2] in run.stderr
    assert "Load weight begin" not in run.stdout + run.stderr


def test_help_lists_every_flag(runs: dict[str, subprocess.CompletedProcess[str]]) -> None:
    names = [field.name for field in fields(PatternKVConfig) if not field.name.endswith("_bits")]
    flags = ["--kv-quant-" + name.replace("_", "-") for name in [*names, "bits"]]
    assert runs["help"].returncode == 0
    missing = [flag for flag in ["--kv-quant ", *flags] if flag not in runs["help"].stdout]
    assert not missing


def test_without_the_flag_every_logprob_is_stocks(engines: dict[str, Any]) -> None:
    stock, plugged = engines["stock"], engines["plugged"]
    assert not any(stock["stats"] + plugged["stats"])
    names = ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs")
    for ours, theirs in zip(plugged["answers"], stock["answers"], strict=True):
        assert ours["text"] == theirs["text"]
        for name in names:
            assert ours["meta_info"][name] == theirs["meta_info"][name]
