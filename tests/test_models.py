"""Every architecture that is served, each with a tiny random model, against two references.

``transformers`` in float32 says what the model means: its log-probabilities must be those of an
engine as far as bfloat16 and the cache allow. The torch ops (``PATTERNKV_IMPL=reference``) say what
the stored bytes mean: on a GPU an engine with kernels and CUDA graphs answers as one with these,
whose tables and bytes come from the kernels too.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig

from patternkv_sgl.refusals import refuse_model
from tests.answers import assert_close, cached, greedy, outputs
from tests.engines import EngineRun
from tests.models import SERVED, WORDS, make_model
from tests.servers import environment

ON_CPU = ("qwen2", "qwen3_moe")
CHUNK = 512  # prompt tokens that attend each other exactly
PROMPTS = [12, 80, 300, 500]  # tokens
NEW_TOKENS = 24
BRANCHES = 3
# Mean nats per token; random weights are unsure of every token, so that errors are not hidden.
EXACT = 0.1  # prompt tokens of a first chunk
STORED = 0.4  # generated tokens, which attend a prefix at 4 bits
KERNELS = 0.5  # most that kernels and torch ops may differ on one token: bfloat16 logits, near ties


def body(ids: list[int], **params: Any) -> dict[str, Any]:
    request = greedy("", NEW_TOKENS, **params)
    del request["text"]
    return request | {"input_ids": ids}


def engine(folder: Path, environment: dict[str, str], **kwargs: Any) -> dict[str, Any]:
    """A job for `EngineRun`: every prompt greedily, then the last two again, one with branches."""
    prompts = [random.Random(length).choices(range(WORDS), k=length) for length in PROMPTS]
    requests = [body(ids) | {"logprob_start_len": 0} for ids in prompts]
    # A request that wants the logprobs of its prompt finds nothing in the cache.
    requests += [body(prompts[-2]), body(prompts[-1], n=BRANCHES)]
    options = {
        "model_path": str(folder),
        "dtype": "bfloat16",
        "mem_fraction_static": 0.6,
        "max_total_tokens": 8192,
        "max_running_requests": 16,
        "chunked_prefill_size": CHUNK,
        "random_seed": 0,
        "log_level": "warning",
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "kv_quant": "patternkv",
        "kv_quant_check": True,
        "kv_quant_tables": 64,
    }
    return {"kwargs": options | kwargs, "environment": environment, "requests": requests}


def meant(folder: Path, answer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities that transformers gives to the tokens of prompt and answer."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [token for _, token, _ in answer["meta_info"]["input_token_logprobs"]]
    ids = torch.tensor([*prompt, *(token for _, token in outputs(answer))])
    with torch.no_grad():
        logprobs = reference(ids[None]).logits[0].log_softmax(-1)
    found = logprobs[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return found[: len(prompt) - 1], found[len(prompt) - 1 :]


def check_meaning(folder: Path, answers: list[Any]) -> None:
    """Assert that prompts and answers are as likely as transformers finds them."""
    exact, stored = [], []
    for length, answer in zip(PROMPTS, answers, strict=False):
        assert len(outputs(answer)) == NEW_TOKENS and length <= CHUNK
        prompt, generated = meant(folder, answer)
        given = [logprob for logprob, _, _ in answer["meta_info"]["input_token_logprobs"][1:]]
        exact.extend(np.abs(prompt - given))
        stored.extend(np.abs(generated - [logprob for logprob, _ in outputs(answer)]))
    print(f"{folder.name}: {np.mean(exact):.3f} nats in prompts, {np.mean(stored):.3f} in answers")
    assert np.mean(exact) < EXACT
    assert np.mean(stored) < STORED


def check_sharing(answers: list[Any], stats: list[dict[str, Any]]) -> None:
    """Assert that prefixes are found, branches agree and share, and tables are mined."""
    warm, branches = answers[len(PROMPTS) :]
    assert cached(warm) == PROMPTS[-2] - 1
    assert {cached(branch) for branch in branches} == {PROMPTS[-1] - 1}
    for branch in branches[1:]:
        assert_close(branches[0], branch, KERNELS)
    assert stats[-1]["tables_mined"] >= 2
    assert stats[-1]["max_branches"] == BRANCHES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of every architecture."""
    root = tmp_path_factory.mktemp("models")
    for name in SERVED:
        (root / name).mkdir()
        make_model(root / name, name)
    return {name: root / name for name in SERVED}


@pytest.mark.slow
def test_on_a_cpu(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = {}
    for name in ON_CPU:
        (tmp_path / name).mkdir()
        job = engine(folders[name], {}, device="cpu")
        runs[name] = EngineRun([job], tmp_path / name, environment())
    for name, run in runs.items():
        (result,) = run.results()
        check_meaning(folders[name], result["answers"])
        check_sharing(result["answers"], result["stats"])


@pytest.fixture(scope="module")
def gpu_runs(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EngineRun]:
    """Kernels in CUDA graphs, then torch ops, of all architectures at the same time."""
    reference = {"PATTERNKV_IMPL": "reference"}
    reference |= dict.fromkeys(("PATTERNKV_IMPL_MINING", "PATTERNKV_IMPL_STORE"), "cuda")
    runs = {}
    for name in SERVED:
        log = tmp_path_factory.mktemp(name)
        jobs = [
            engine(folders[name], {"PATTERNKV_IMPL": "cuda"}, cuda_graph_max_bs_decode=8),
            engine(folders[name], reference, disable_cuda_graph=True),
        ]
        runs[name] = EngineRun(jobs, log, environment())
    return runs


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_on_a_gpu(folders: dict[str, Path], gpu_runs: dict[str, EngineRun], name: str) -> None:
    kernels, reference = gpu_runs[name].results()
    check_meaning(folders[name], kernels["answers"])
    check_sharing(kernels["answers"], kernels["stats"])
    pairs = zip(kernels["answers"][:-1], reference["answers"][:-1], strict=True)
    for ours, theirs in pairs:
        assert_close(ours, theirs, KERNELS)


@pytest.mark.parametrize("name", SERVED)
def test_its_configuration_is_accepted(folders: dict[str, Path], name: str) -> None:
    refuse_model(ModelConfig(str(folders[name])))


def test_sliding_windows_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    make_model(tmp_path, "gemma2")
    with pytest.raises(
        ValueError, match="Gemma2ForCausalLM mixes sliding-window and full"
    ) as error:
        refuse_model(ModelConfig(str(tmp_path)))
    assert "without --kv-quant" in str(error.value)
