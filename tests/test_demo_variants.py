"""Relatives of the demo model begin with its function and another KV cache."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.demo import train
from recipes.demo.batches import Batch, draw_batch
from recipes.demo.llama import Llama, export
from recipes.demo.variants import BIAS_PAIRS, VARIANTS, load_demo


@pytest.fixture(scope="module")
def demo() -> Llama:
    return load_demo()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return draw_batch(2, 300, 4, 0.5, torch.Generator().manual_seed(0))


def log_probs(model: Llama, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        positions = torch.arange(batch.tokens.shape[1])
        return train.predict(model, batch, positions).log_softmax(-1)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_begins_with_the_demo_models_function(
    name: str, demo: Llama, batch: Batch, tmp_path: Path
) -> None:
    variant = VARIANTS[name](demo)
    before, after = log_probs(demo, batch), log_probs(variant, batch)
    assert (before.exp() * (before - after)).sum(-1).mean() < 1e-4
    export(variant, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(batch.tokens).logits[:, batch.predictors.flatten()]
    # bfloat16 weights: close, not equal.
    kl = (after.exp() * (after - logits.log_softmax(-1))).sum(-1)
    assert kl.mean() < 1e-3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] == (128 if name == "head_dim_128" else 64)
    assert config["attention_bias"] is (name == "k_bias")


def test_the_bias_is_large_and_only_in_the_outer_layers(demo: Llama) -> None:
    layers = VARIANTS["k_bias"](demo).model.layers
    for layer in (layers[0], layers[-1]):
        k_proj = layer.self_attn.k_proj
        inputs = torch.randn(64, 512) * layer.input_layernorm.weight
        without = torch.nn.functional.linear(inputs, k_proj.weight)
        assert k_proj.bias.abs().max() > 20 * without.abs().mean()
        assert (k_proj.bias != 0).sum() == 2 * 2 * BIAS_PAIRS
    for layer in layers[1:-1]:
        assert not layer.self_attn.k_proj.bias.any()


def test_every_new_channel_of_wide_heads_holds_something(demo: Llama) -> None:
    attention = VARIANTS["head_dim_128"](demo).model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert (projection.weight.square().sum(1) > 0).all()


def test_learning_rate_never_jumps() -> None:
    steps = 400
    rates = [train.learning_rate(i, i / steps, 1.0, warmup=steps) for i in range(steps)]
    assert max(abs(b - a) for a, b in pairwise(rates)) < 0.01
    assert rates[0] < 0.01 and rates[-1] == pytest.approx(train.FINAL_LR_SHARE, abs=0.01)
    assert train.learning_rate(10 * steps, 0.5, 1.0, warmup=steps) == 1.0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_steps_and_continues(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, steps, seconds = tmp_path / "tiny.pt", [0], 0.0
    paths = ["--out", str(tmp_path / "model"), "--checkpoint", str(checkpoint)]
    for _ in range(2):
        arguments = ["--tiny", "--eager", "--device", device, "--minutes", str(seconds / 60 + 0.01)]
        monkeypatch.setattr("sys.argv", ["train", *arguments, *paths])
        train.main()
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        seconds = state["progress"]["seconds"]
        steps.append(state["progress"]["step"])
    assert steps[0] < steps[1] < steps[2]
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert (tmp_path / "model" / "config.json").exists()
