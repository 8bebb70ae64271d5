"""What ``--kv-quant patternkv`` refuses at start-up, and what it selects when it accepts."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
import sglang.srt.server_args as sglang_server_args
import torch
from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass
from sglang.srt.configs import FalconH1Config
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from transformers import LlamaConfig

from patternkv_sgl import hooks
from patternkv_sgl.config import PatternKVConfig
from patternkv_sgl.refusals import CONFLICTS, refuse_kv_dtype, refuse_layers, refuse_model
from patternkv_sgl.server_args import (
    DEFAULT_MAX_RUNNING_REQUESTS,
    KVQuantServerArgs,
    config_of,
)

FIELDS = tuple(KVQuantServerArgs.__annotations__)
FLAGS = tuple("--" + name.replace("_", "-") for name in FIELDS)


def serve(**options: Any) -> Any:
    options = {"device": "cpu"} | options
    return KVQuantServerArgs(model_path="m", kv_quant="patternkv", **options)


# Options

# Written out, so that an option cannot leave the table unnoticed.
REFUSED = {
    "attention_backend": "triton",
    "prefill_attention_backend": "patternkv",
    "decode_attention_backend": "flashinfer",
    "radix_cache_backend": "rust",
    "kv_cache_dtype": "fp8_e5m2",
    "speculative_algorithm": "EAGLE",
    "disaggregation_mode": "prefill",
    "enable_hierarchical_cache": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "enable_unified_cache_external_linker": True,
    "enable_session_radix_cache": True,
    "enable_streaming_session": True,
    "enable_kv_cache_sharding": True,
    "enable_unified_memory": True,
    "enable_page_major_kv_layout": True,
    "enable_hisparse": True,
    "prefill_only_disable_kv_cache": True,
    "enable_memory_saver": True,
    "enable_pdmux": True,
    "enable_two_batch_overlap": True,
    "enable_single_batch_overlap": True,
    "enable_deterministic_inference": True,
    "cuda_graph_backend_prefill": "full",
    "dllm_algorithm": "LowConfidence",
    "dcp_size": 2,
    "attn_cp_size": 2,
    "pp_size": 2,
    "attn_dp_size": 2,
    "enable_dp_attention": True,
    "tokenizer_worker_num": 2,
}


def test_the_table_of_conflicts_is_the_stated_one() -> None:
    assert {conflict.field for conflict in CONFLICTS} == set(REFUSED)
    assert len(CONFLICTS) == len(REFUSED)


@pytest.mark.parametrize("field", REFUSED)
def test_an_excluded_option_is_refused(field: str) -> None:
    value = REFUSED[field]
    with pytest.raises(ValueError, match="does not work with --kv-quant patternkv") as error:
        serve(**{field: value})
    flag = "--" + field.replace("_", "-")
    message = str(error.value)
    assert message.startswith(f"{flag} does" if value is True else f"{flag} {value!r} does")
    (reason, remedy) = message.split("patternkv: ", 1)[1].split(". ")
    assert len(reason.split()) >= 4
    assert remedy.endswith(", or drop --kv-quant")
    assert "None" not in remedy and "False" not in remedy
    KVQuantServerArgs(model_path="m", **{field: value})


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        ("kv_cache_dtype", "Leave it at 'auto'"),
        ("pp_size", "Leave it at 1"),
        ("enable_memory_saver", "Drop the flag"),
        ("speculative_algorithm", "Drop the flag"),
        ("attention_backend", "Drop the flag, set it to 'patternkv'"),
        ("cuda_graph_backend_prefill", "Drop the flag, set it to 'breakable' or 'disabled'"),
    ],
)
def test_a_refusal_names_what_can_be_typed(field: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f". {remedy}, or drop --kv-quant")):
        serve(**{field: REFUSED[field]})


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: conflict.field)
def test_the_remedy_of_a_refusal_is_accepted(conflict: Any) -> None:
    stock = sglang_server_args.ServerArgs(model_path="m")
    assert getattr(stock, conflict.field) in conflict.neutral
    for value in conflict.neutral:
        serve(**{conflict.field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "--page-size 0: expected 1 to 1024"),
        ({"page_size": -16}, "--page-size -16: expected 1 to 1024"),
        ({"page_size": 10**9}, "--page-size 1000000000: expected 1 to 1024"),
        (
            {"page_size": 16, "chunked_prefill_size": 100},
            "--chunked-prefill-size 100 is no multiple of --page-size 16: a chunk must end on a "
            "page; use 96",
        ),
        ({"max_running_requests": 0}, "--max-running-requests 0: expected at least 1"),
        ({"max_running_requests": -1}, "--max-running-requests -1: expected at least 1"),
        ({"max_total_tokens": 0}, "--max-total-tokens 0: expected at least 2 tokens"),
        ({"max_total_tokens": -5}, "--max-total-tokens -5: expected at least 2 tokens"),
        ({"max_total_tokens": 1}, "--max-total-tokens 1: expected at least 2 tokens"),
        ({"max_total_tokens": 15, "page_size": 16}, "one page of 16; raise it"),
        ({"kv_quant_bits": "3"}, "--kv-quant-bits '3'"),
        ({"kv_quant_patterns": 0}, "--kv-quant-patterns 0: expected an integer from 1 to 256"),
        ({"kv_quant_window": -1}, "--kv-quant-window -1"),
        ({"kv_quant_rotate": "yes"}, "--kv-quant-rotate 'yes': expected on or off"),
        ({"kv_quant_layer_bits": "4:2"}, "--kv-quant-layer-bits '4:2': expected LAYER=K:V"),
        ({"kv_quant_sinks": 65}, "--kv-quant-sinks 65"),
        ({"kv_quant_mine_tokens": 15}, "--kv-quant-mine-tokens 15"),
        ({"kv_quant_tables": 1}, "--kv-quant-tables 1"),
        ({"kv_quant_sinks": 5, "kv_quant_patterns": 4}, "does not fit into --kv-quant-patterns 4"),
    ],
)
def test_a_malformed_size_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        serve(**options)


def test_the_canary_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="--kv-canary 'log' needs a GPU") as error:
        serve(kv_canary="log")
    assert "'none'" in str(error.value)


@pytest.mark.parametrize("scheme", ["", "Patternkv", "kivi", True])
def test_an_unknown_scheme_is_refused(scheme: Any) -> None:
    with pytest.raises(ValueError, match=f"--kv-quant {scheme!r}: expected 'patternkv'"):
        KVQuantServerArgs(model_path="m", kv_quant=scheme)


@pytest.mark.parametrize(("flag", "value"), [("kv_quant_bits", "2"), ("kv_quant_check", True)])
def test_a_tuning_flag_without_the_scheme_is_refused(flag: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{value!r} has no effect without --kv-quant"):
        KVQuantServerArgs(model_path="m", **{flag: value})


@pytest.mark.parametrize(("chosen", "rotate"), [(None, None), ("on", True), ("off", False)])
def test_rotation_may_be_left_to_the_bits(chosen: str | None, rotate: bool | None) -> None:
    assert config_of(serve(kv_quant_rotate=chosen)).rotate is rotate


def test_sizes_at_their_limits_are_accepted() -> None:
    assert serve(page_size=1, max_total_tokens=2).max_total_tokens == 2
    assert serve(page_size=16, max_total_tokens=16).page_size == 16


# Models


def model(**changes: Any) -> SimpleNamespace:
    """What SGLang's ModelConfig says of a Llama model, with ``changes``."""
    config = LlamaConfig(architectures=["TinyForCausalLM"])
    stated = {
        "hf_config": config,
        "attention_arch": AttentionArch.MHA,
        "is_hybrid_swa": False,
        "is_encoder_decoder": False,
        "is_draft_model": False,
        "linear_attn_registry_result": None,
        "head_dim": 128,
        "v_head_dim": 128,
        "dtype": torch.bfloat16,
    }
    return SimpleNamespace(**(stated | changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_supported_models(head_dim: int, dtype: torch.dtype) -> None:
    refuse_model(model(head_dim=head_dim, v_head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"attention_arch": AttentionArch.MLA}, "MLA attention", "without --kv-quant"),
        ({"attention_arch": AttentionArch.SSM}, "SSM attention", "without --kv-quant"),
        ({"is_hybrid_swa": True}, "sliding-window and full attention", "without --kv-quant"),
        ({"is_encoder_decoder": True}, "encoder-decoder model", "without --kv-quant"),
        (
            {"hf_config": FalconH1Config(architectures=["TinyForCausalLM"])},
            "state-space or linear-attention layers",
            "without --kv-quant",
        ),
        (
            {"linear_attn_registry_result": ("spec", "config")},
            "state-space or linear-attention layers",
            "without --kv-quant",
        ),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dim 80", "without --kv-quant"),
        ({"head_dim": 192, "v_head_dim": 128}, "head_dim 192 and v_head_dim 128", "(64, 96, 128"),
        ({"v_head_dim": 64}, "head_dim 128 and v_head_dim 64", "without --kv-quant"),
        ({"dtype": torch.float32}, "served in torch.float32", "set --dtype bfloat16"),
    ],
)
def test_an_unsupported_model_is_refused(
    changes: dict[str, Any], problem: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match="TinyForCausalLM") as error:
        refuse_model(model(**changes))
    assert problem in str(error.value)
    assert remedy in str(error.value)


def test_a_checkpoint_with_its_own_cache_dtype_is_refused() -> None:
    refuse_kv_dtype(torch.bfloat16)
    refuse_kv_dtype(torch.float16)
    with pytest.raises(ValueError, match=r"KV cache in torch\.float8_e4m3fn.*or drop --kv-quant"):
        refuse_kv_dtype(torch.float8_e4m3fn)


def write_model(folder: Path, **changes: Any) -> str:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=64,
        dtype="bfloat16",
    ).to_dict()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return str(folder)


def checked(path: str, kv_quant: str | None, **given: Any) -> KVQuantServerArgs:
    """Arguments of a CPU server that SGLang has resolved and checked."""
    options = {"device": "cpu", "skip_tokenizer_init": True} | given
    args = KVQuantServerArgs(model_path=path, kv_quant=kv_quant, **options)
    args.resolve_once()
    args.check_server_args()
    return args


def test_the_launcher_checks_the_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "64")
    checked(path, "patternkv", kv_quant_layer_bits="0=4:2,last=2")
    with pytest.raises(ValueError, match="layer 1 of 2 twice, by 1=4:2 and last=2:2"):
        checked(path, "patternkv", kv_quant_layer_bits="1=4:2,last=2")
    with pytest.raises(ValueError, match="no layer 2, the model has 0 to 1"):
        checked(path, "patternkv", kv_quant_layer_bits="2=4:2")
    path = write_model(tmp_path / "80", head_dim=80)
    checked(path, None)
    with pytest.raises(ValueError, match="LlamaForCausalLM has head_dim 80 and v_head_dim 80"):
        checked(path, "patternkv")


@pytest.mark.parametrize(
    ("kv_quant", "disable", "warned"),
    [("patternkv", True, True), ("patternkv", False, False), (None, True, False)],
)
def test_a_disabled_tree_is_warned_of_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kv_quant: str | None,
    disable: bool,
    warned: bool,
) -> None:
    args = checked(write_model(tmp_path / "64"), kv_quant, disable_radix_cache=disable)
    pickle.loads(pickle.dumps(args))  # on its way to the scheduler
    lines = [record.message for record in caplog.records if "disable-radix" in record.message]
    assert len(lines) == warned
    assert all("Drop the flag" in line for line in lines)


@pytest.mark.parametrize(
    ("kv_quant", "chunk", "warned"),
    [
        ("patternkv", 255, True),
        ("patternkv", 256, False),
        ("patternkv", -1, False),
        ("patternkv", None, False),
        (None, 255, False),
    ],
)
def test_chunks_too_short_to_mine_are_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kv_quant: str | None,
    chunk: int | None,
    warned: bool,
) -> None:
    checked(write_model(tmp_path / "64"), kv_quant, chunked_prefill_size=chunk)
    lines = [record.message for record in caplog.records if "-mine-tokens" in record.message]
    assert len(lines) == warned
    assert all("255 is below --kv-quant-mine-tokens 256" in line for line in lines)


def attention(**changes: Any) -> RadixAttention:
    options = {"num_heads": 4, "head_dim": 64, "scaling": 0.125, "num_kv_heads": 2, "layer_id": 0}
    return RadixAttention(**(options | changes))


def network(layer: RadixAttention) -> torch.nn.Module:
    """A model with a supported layer, and ``layer`` as ``layers.1.attn``."""
    blocks = [torch.nn.Module(), torch.nn.Module()]
    blocks[0].attn, blocks[1].attn = attention(), layer
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList(blocks)
    return module


def hot(layer: RadixAttention) -> RadixAttention:
    layer.xai_temperature_len = 64
    return layer


@pytest.mark.parametrize("changes", [{}, {"logit_cap": 30.0}, {"num_kv_heads": 4}])
def test_supported_layers(changes: dict[str, Any]) -> None:
    refuse_layers(network(attention(**changes)))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: attention(sliding_window_size=128), "a sliding window of 128"),
        (lambda: attention(is_cross_attention=True), "cross attention"),
        (lambda: attention(attn_type=AttentionType.ENCODER_ONLY), "encoder_only attention"),
        (lambda: attention(pos_encoding_mode="ALIBI"), "positions ALIBI"),
        (lambda: attention(logit_cap=5.0, logit_capping_method="relu"), "logit capping by relu"),
        (lambda: hot(attention()), "a query-length temperature"),
        (lambda: attention(head_dim=80), "head_dim 80 and v_head_dim 80"),
        (lambda: attention(head_dim=128, v_head_dim=64), "head_dim 128 and v_head_dim 64"),
    ],
)
def test_an_unsupported_layer_is_refused(make: Callable[[], RadixAttention], problem: str) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.attn has ") as error:
        refuse_layers(network(make()))
    assert problem in str(error.value)
    assert "without --kv-quant" in str(error.value)


# SGLang itself


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "__version__", "0.5.17")
    with pytest.raises(RuntimeError, match=r"supports SGLang 0\.5\.23, found 0\.5\.17"):
        serve()
    KVQuantServerArgs(model_path="m")


REAL, GONE = "json.dumps", "json.no_such_function"


@pytest.mark.parametrize(
    ("target", "parameters", "problem"),
    [
        (REAL, ("obj", "indent"), "json.dumps takes ('obj', 'skipkeys'"),
        (GONE, ("obj",), "json.no_such_function is gone"),
        ("no_such_module.function", (), "no_such_module.function is gone"),
    ],
)
def test_a_moved_hook_target_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: str, parameters: tuple[str, ...], problem: str
) -> None:
    monkeypatch.setattr(hooks, "_moved", [])
    monkeypatch.setattr(hooks, "PARAMETERS", {REAL: ("obj", "skipkeys"), target: parameters})
    hooks.record_targets()
    (line,) = hooks.moved_targets()
    assert problem in line
    with pytest.raises(RuntimeError, match="cannot hook this SGLang") as error:
        serve()
    assert line in str(error.value)
    assert "Reinstall sglang==0.5.23, or drop --kv-quant" in str(error.value)
    KVQuantServerArgs(model_path="m")


def test_the_hook_targets_of_this_sglang_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_moved", ["stale"])
    hooks.record_targets()
    assert hooks.moved_targets() == []


def test_a_target_that_is_no_function_any_more_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_moved", [])
    monkeypatch.setattr(hooks, "PARAMETERS", {"sys.maxsize": ("self",)})
    hooks.record_targets()
    assert "sys.maxsize is gone" in hooks.moved_targets()[0]


# Flags


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """SGLang's command-line parser with our record in place, as the plug-in puts it."""
    monkeypatch.setattr(sglang_server_args, "ServerArgs", KVQuantServerArgs)
    return lambda *argv: sglang_server_args.prepare_server_args(["--model-path", "m", *argv])


CHOSEN = {
    "kv_quant": "patternkv",
    "kv_quant_bits": "4:2",
    "kv_quant_patterns": 32,
    "kv_quant_window": 0,
    "kv_quant_sinks": 3,
    "kv_quant_mine_tokens": 99,
    "kv_quant_rotate": "on",
    "kv_quant_layer_bits": "1=2:4,last=4:4",
    "kv_quant_tables": 7,
    "kv_quant_check": True,
}


def chosen(args: Any) -> dict[str, Any]:
    return {name: getattr(args, name) for name in CHOSEN}


def test_the_command_line_carries_every_field(parse: Callable[..., Any]) -> None:
    argv = []
    for name, value in CHOSEN.items():
        argv += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    assert chosen(parse(*argv)) == CHOSEN
    assert set(CHOSEN) == set(FIELDS)


def test_a_config_file_carries_every_field(parse: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    lines = [f"{name.replace('_', '-')}: {json.dumps(value)}\n" for name, value in CHOSEN.items()]
    path.write_text("".join(lines), encoding="utf-8")
    assert chosen(parse("--config", str(path))) == CHOSEN


def test_keyword_arguments_carry_every_field() -> None:
    args = KVQuantServerArgs(model_path="m", **CHOSEN)
    assert chosen(args) == CHOSEN
    assert config_of(args) == PatternKVConfig(
        4,
        2,
        patterns=32,
        window=0,
        sinks=3,
        mine_tokens=99,
        rotate=True,
        layer_bits=((1, (2, 4)), (-1, (4, 4))),
        tables=7,
        check=True,
    )


def test_defaults_are_those_of_the_config(parse: Callable[..., Any]) -> None:
    for args in (serve(), parse("--kv-quant", "patternkv")):
        assert config_of(args) == PatternKVConfig()


@pytest.mark.parametrize(
    "argv",
    [("--kv-quant", "other"), ("--kv-quant-patterns", "many"), ("--kv-quant-check", "perhaps")],
)
def test_the_parser_refuses_what_it_cannot_read(
    parse: Callable[..., Any], argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*argv)
    assert argv[1] in capsys.readouterr().err


def test_help_lists_every_flag_with_its_range() -> None:
    parser = argparse.ArgumentParser()
    add_cli_args_from_dataclass(parser, KVQuantServerArgs)
    shown = {flag: action for action in parser._actions for flag in action.option_strings}
    assert set(FLAGS) <= set(shown)
    for name, (low, high) in PatternKVConfig.RANGES.items():
        assert f"{low} to {high}" in shown["--kv-quant-" + name.replace("_", "-")].help
    for flag in FLAGS:
        assert len(shown[flag].help.split()) > 5


def test_acceptance_selects_backend_tree_and_request_limit() -> None:
    args = serve()
    assert (args.attention_backend, args.radix_cache_backend) == ("patternkv", "patternkv")
    assert args.max_running_requests == DEFAULT_MAX_RUNNING_REQUESTS
    assert args.disable_cuda_graph
    assert serve(max_running_requests=7).max_running_requests == 7


@pytest.mark.parametrize(("device", "disabled"), [(None, False), ("cuda", False), ("cpu", True)])
def test_cuda_graphs_stay_on_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str | None, disabled: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert bool(serve(device=device).disable_cuda_graph) == disabled


@pytest.mark.parametrize("options", [{}, CHOSEN])
def test_the_record_travels_to_child_processes(options: dict[str, Any]) -> None:
    args = KVQuantServerArgs(model_path="m", **options)
    copy = pickle.loads(pickle.dumps(args))
    assert type(copy) is KVQuantServerArgs
    assert copy == args
    assert chosen(copy) == chosen(args)


def test_every_field_is_published_with_the_memory_settings() -> None:
    assert {KVQuantServerArgs._NS_BY_FIELD[name] for name in FIELDS} == {"memory"}
    stock = sglang_server_args.ServerArgs._NS_BY_FIELD
    assert set(KVQuantServerArgs._NS_BY_FIELD) == set(stock) | set(FIELDS)


def test_without_the_flag_nothing_changes() -> None:
    stock, ours = sglang_server_args.ServerArgs, KVQuantServerArgs
    for options in ({}, {"attention_backend": "triton", "page_size": 0, "pp_size": 4}):
        expected, args = stock(model_path="m", **options), ours(model_path="m", **options)
        for name in stock.__struct_fields__:
            assert getattr(args, name) == getattr(expected, name), name
        assert args.kv_quant is None
