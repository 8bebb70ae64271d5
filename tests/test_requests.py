"""What ``--kv-quant patternkv`` refuses of a request when it arrives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from patternkv_sgl import hooks, tokenizer_manager

VOCAB_SIZE = 232
MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCAB_SIZE))


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "enabled", lambda: True)


def validate(**stated: Any) -> None:
    """Run the hook for every prompt of a request, as SGLang's tokenizer does."""
    request = GenerateReqInput(**({"text": ["a", "b"], "return_logprob": True} | stated))
    request.normalize_batch_and_arguments()
    for obj in [request] if request.is_single else map(request.__getitem__, range(2)):
        tokenizer_manager.validate_request(MANAGER, obj, None if obj.input_embeds else [5, 6])


@pytest.mark.parametrize("num", [None, 0, 1, VOCAB_SIZE, [VOCAB_SIZE, 0]])
def test_logprobs_of_all_tokens_are_accepted(num: Any) -> None:
    validate(top_logprobs_num=num)


@pytest.mark.parametrize(
    ("stated", "value"),
    [
        ({"top_logprobs_num": VOCAB_SIZE + 1}, VOCAB_SIZE + 1),
        ({"top_logprobs_num": [0, 10000]}, 10000),
        ({"top_logprobs_num": 10000, "sampling_params": {"n": 2}}, 10000),
        # Requests of a batch share one topk, whoever of them returns logprobs.
        ({"top_logprobs_num": 10000, "return_logprob": False}, 10000),
        ({"top_logprobs_num": 10000, "text": None, "input_embeds": [[[0.5]], [[0.5]]]}, 10000),
        ({"top_logprobs_num": [5], "text": "a"}, [5]),
        ({"top_logprobs_num": 1.5}, 1.5),
    ],
)
def test_logprobs_of_more_tokens_than_there_are_are_refused(
    stated: dict[str, Any], value: Any
) -> None:
    with pytest.raises(ValueError, match="the size of this model's vocabulary") as error:
        validate(**stated)
    assert str(error.value).startswith(f"top_logprobs_num {value!r} (")
    assert f"up to {VOCAB_SIZE}," in str(error.value)


@pytest.mark.parametrize("ids", [None, [], [0, VOCAB_SIZE - 1], [None]])
def test_tokens_to_stop_at_are_accepted(ids: Any) -> None:
    validate(sampling_params={"stop_token_ids": ids})


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, -1, 10**6])
def test_tokens_to_stop_at_that_there_are_not_are_refused(token_id: int) -> None:
    with pytest.raises(ValueError, match=f"{token_id}: ids of this model are 0 to 231"):
        validate(sampling_params=[{}, {"stop_token_ids": [3, token_id]}])


@pytest.mark.parametrize("start", [None, -1, 0, 1, [0, -1]])
def test_logprobs_from_a_position_on_are_accepted(start: Any) -> None:
    validate(logprob_start_len=start)


@pytest.mark.parametrize(
    ("stated", "value"),
    [
        ({"logprob_start_len": -2}, -2),
        ({"logprob_start_len": [0, -7]}, -7),
        ({"logprob_start_len": -2, "sampling_params": {"n": 2}}, -2),
        ({"logprob_start_len": [5], "text": "a"}, [5]),
        ({"logprob_start_len": 1.5}, 1.5),
    ],
)
def test_logprobs_from_nowhere_are_refused(stated: dict[str, Any], value: Any) -> None:
    with pytest.raises(ValueError, match="expected a position in the prompt") as error:
        validate(**stated)
    assert str(error.value).startswith(f"logprob_start_len {value!r}: ")


def test_where_logprobs_begin_says_nothing_without_them() -> None:
    validate(logprob_start_len=-2, return_logprob=False)


def test_embeddings_have_no_logprobs() -> None:
    tokenizer_manager.validate_request(MANAGER, EmbeddingReqInput(text="a"), [5, 6])


def test_requests_to_a_dense_cache_are_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "enabled", lambda: False)
    validate(top_logprobs_num=10000)
