"""Options: every malformed value is refused with flag, value and range."""

from __future__ import annotations

from typing import Any

import pytest

from patternkv_kernels import SlotFormat
from patternkv_sgl.config import PatternKVConfig, parse_bits, parse_layer_bits


@pytest.mark.parametrize(
    ("text", "bits"),
    [("4", (4, 4)), ("2", (2, 2)), ("4:2", (4, 2)), ("2:4", (2, 4)), ("4:4", (4, 4)), (4, (4, 4))],
)
def test_bits(text: str, bits: tuple[int, int]) -> None:
    assert parse_bits(text) == bits


@pytest.mark.parametrize(
    "text",
    ["", "3", "8", "4:", ":2", "4:2:2", "4/2", "four", "4:8", " 4", "04", "4.0", "-4", "٤", "None"],
)
def test_malformed_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 4, 2 or K:V") as error:
        parse_bits(text)
    assert str(error.value).startswith(f"--kv-quant-bits {text!r}: ")
    assert "{2, 4}" in str(error.value)


LIMITS = [
    ("patterns", 1, 256),
    ("window", 0, 1024),
    ("sinks", 0, 64),
    ("mine_tokens", 16, 1 << 20),
    ("tables", 2, 1 << 15),
]


def with_value(name: str, value: object) -> PatternKVConfig:
    """The defaults but for ``name``; no sinks, so that few patterns are legal."""
    return PatternKVConfig(**{"sinks": 0, "patterns": 256, name: value})  # type: ignore[arg-type]


def test_every_numeric_option_has_a_range() -> None:
    assert {name: (low, high) for name, low, high in LIMITS} == PatternKVConfig.RANGES


@pytest.mark.parametrize(("name", "low", "high"), LIMITS)
def test_limits_are_inclusive(name: str, low: int, high: int) -> None:
    assert getattr(with_value(name, low), name) == low
    assert getattr(with_value(name, high), name) == high


@pytest.mark.parametrize(("name", "low", "high"), LIMITS)
def test_values_outside_are_refused(name: str, low: int, high: int) -> None:
    for value in (low - 1, high + 1, -1 << 40, 1.5, str(low), True, float("nan")):
        with pytest.raises(ValueError, match="expected an integer") as error:
            with_value(name, value)
        flag = "--kv-quant-" + name.replace("_", "-")
        assert str(error.value) == f"{flag} {value!r}: expected an integer from {low} to {high}"


def test_only_tables_may_be_left_to_the_memory_budget() -> None:
    assert with_value("tables", None).tables is None
    for name in ("patterns", "window", "sinks", "mine_tokens"):
        with pytest.raises(ValueError, match="None: expected an integer"):
            with_value(name, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_bits": 8}, "bits 8 of K and 4 of V"),
        ({"v_bits": 3}, "bits 4 of K and 3 of V"),
        ({"layer_bits": ((-1, (4, 4)), (0, (4, 7)))}, "bits 4 of K and 7 of V"),
        ({"rotate": "maybe"}, "--kv-quant-rotate 'maybe'"),
    ],
)
def test_what_no_flag_would_give_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatternKVConfig(**options)


def test_each_sink_needs_a_pattern() -> None:
    assert PatternKVConfig(patterns=8, sinks=8).sinks == 8
    with pytest.raises(ValueError, match="lower the first or raise the second") as error:
        PatternKVConfig(patterns=8, sinks=9)
    assert "--kv-quant-sinks 9" in str(error.value)
    assert "--kv-quant-patterns 8" in str(error.value)


def test_the_slot_format_carries_the_bits() -> None:
    config = PatternKVConfig(*parse_bits("4:2"))
    formats = config.slot_formats(2, h_kv=3, head_dim=96, page_size=16)
    assert formats == [SlotFormat(4, 2, 96, 16, h_kv=3)] * 2
    assert config.bits == "4/2"


def bits_of(config: PatternKVConfig, num_layers: int) -> list[str]:
    formats = config.slot_formats(num_layers, h_kv=1, head_dim=64, page_size=1)
    return [f"{fmt.k_bits}/{fmt.v_bits}" for fmt in formats]


def test_k_of_the_last_layer_has_four_bits_unless_told_otherwise() -> None:
    assert bits_of(PatternKVConfig(2, 2), 3) == ["2/2", "2/2", "4/2"]
    assert bits_of(PatternKVConfig(2, 4), 2) == ["2/4", "4/4"]
    assert bits_of(PatternKVConfig(4, 2), 2) == ["4/2", "4/2"]
    assert bits_of(PatternKVConfig(2, 2, layer_bits=()), 2) == ["2/2", "2/2"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("none", ["2/2", "2/2", "2/2"]),
        ("last=4:4", ["2/2", "2/2", "4/4"]),
        ("0=4,2=4:2", ["4/4", "2/2", "4/2"]),
        ("1=4:2,last=2:4", ["2/2", "4/2", "2/4"]),
        ("1=2", ["2/2", "2/2", "2/2"]),
    ],
)
def test_layers_may_have_bits_of_their_own(text: str, layers: list[str]) -> None:
    assert bits_of(PatternKVConfig(2, 2, layer_bits=parse_layer_bits(text)), 3) == layers


@pytest.mark.parametrize("text", ["", "4:2", "first=4:2", "0=4:2,", "0=", "=4:2", "-1=4:2", "None"])
def test_malformed_layers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected LAYER=K:V") as error:
        parse_layer_bits(text)
    assert str(error.value).startswith(f"--kv-quant-layer-bits {text!r}: ")


@pytest.mark.parametrize("entry", ["last=3:3", "0=3:2", "0=4:", "0=4:2:2", "0=04", "0=4 ", "0=٤"])
def test_malformed_bits_of_a_layer_are_refused(entry: str) -> None:
    text = f"1=4:4,{entry}"
    with pytest.raises(ValueError, match=f"expected LAYER=K:V, found {entry!r}: ") as error:
        parse_layer_bits(text)
    assert str(error.value).startswith(f"--kv-quant-layer-bits {text!r}: ")
    assert "each of K and V in {2, 4}" in str(error.value)


@pytest.mark.parametrize("layer", [3, 40])
def test_layers_that_are_not_there_are_refused(layer: int) -> None:
    config = PatternKVConfig(layer_bits=((layer, (4, 2)),))
    with pytest.raises(ValueError, match=f"no layer {layer}, the model has 0 to 2"):
        config.exceptions(3)


@pytest.mark.parametrize(
    ("text", "layer", "first", "second"),
    [
        ("0=4:4,1=4:2,0=2", 0, "0=4:4", "0=2:2"),
        ("last=4:2,last=2:4", 2, "last=4:2", "last=2:4"),
        ("2=4:2,last=2:4", 2, "2=4:2", "last=2:4"),
        ("last=4,2=4", 2, "last=4:4", "2=4:4"),
    ],
)
def test_two_entries_of_one_layer_are_refused(
    text: str, layer: int, first: str, second: str
) -> None:
    config = PatternKVConfig(2, 2, layer_bits=parse_layer_bits(text))
    with pytest.raises(ValueError, match="--kv-quant-layer-bits names layer") as error:
        config.exceptions(3)
    named = f"layer {layer} of 3 twice, by {first} and {second}: keep one of them"
    assert str(error.value).endswith(named)


@pytest.mark.parametrize(
    ("chosen", "at_two", "at_four"),
    [(None, True, False), (True, True, True), (False, False, False)],
)
def test_k_is_rotated_by_default_at_two_bits(
    chosen: bool | None, at_two: bool, at_four: bool
) -> None:
    config = PatternKVConfig(rotate=chosen)
    assert (config.rotates(2), config.rotates(4)) == (at_two, at_four)
