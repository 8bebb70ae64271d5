"""What ``--kv-quant patternkv`` refuses: each with value, limit and remedy.

Options are checked when the ServerArgs record is built, the model's configuration before any
process is launched, the loaded model's layers when the attention backend is made, a request when it
arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patternkv_kernels.format import HEAD_DIMS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

SGLANG_VERSION = "0.5.23"
MAX_PAGE_SIZE = 1024
DTYPES = ("torch.bfloat16", "torch.float16")


@dataclass(frozen=True)
class Conflict:
    """An option that excludes the PatternKV cache unless it has its neutral value."""

    field: str
    neutral: tuple[Any, ...]
    reason: str

    def message(self, value: Any) -> str:
        flag = "--" + self.field.replace("_", "-")
        # A switch takes no value, and nothing that can be typed stands for None.
        given = flag if value is True else f"{flag} {value!r}"
        typed = " or ".join(repr(value) for value in self.neutral if value)
        if all(self.neutral):
            remedy = f"Leave it at {typed}"
        else:
            remedy = "Drop the flag" + (typed and f", set it to {typed}")
        return (
            f"{given} does not work with --kv-quant patternkv: {self.reason}. {remedy}, or drop "
            "--kv-quant"
        )


_DENSE = "it reads or moves K and V as dense tensors, and the cache holds packed residuals"
_TREE = "it needs a radix tree of its own, and pattern tables are owned by ours"
_ONE_POOL = "it lays out the KV memory itself"
_BACKEND = "prefill and decode must both run on the patternkv backend"

CONFLICTS = (
    Conflict("attention_backend", (None, "patternkv"), _BACKEND),
    Conflict("prefill_attention_backend", (None,), _BACKEND),
    Conflict("decode_attention_backend", (None,), _BACKEND),
    Conflict("radix_cache_backend", (None, "patternkv"), _TREE),
    Conflict("kv_cache_dtype", ("auto",), "the cache format is set by --kv-quant-bits"),
    Conflict("speculative_algorithm", (None,), "rejected draft tokens would leave stored slots"),
    Conflict("disaggregation_mode", ("null",), _DENSE),
    Conflict("enable_hierarchical_cache", (False,), "tables would not travel with offloaded slots"),
    Conflict("enable_lmcache", (False,), "tables would not travel with offloaded slots"),
    Conflict("enable_flexkv", (False,), "tables would not travel with offloaded slots"),
    Conflict("enable_unified_cache_external_linker", (False,), _TREE),
    Conflict("enable_session_radix_cache", (False,), _TREE),
    Conflict("enable_streaming_session", (False,), _TREE),
    Conflict("enable_kv_cache_sharding", (False,), _ONE_POOL),
    Conflict("enable_unified_memory", (False,), _ONE_POOL),
    Conflict("enable_page_major_kv_layout", (False,), _ONE_POOL),
    Conflict("enable_hisparse", (False,), _DENSE),
    Conflict("prefill_only_disable_kv_cache", (False,), "there would be no cache to quantize"),
    Conflict("enable_memory_saver", (False,), "released KV memory would lose the pattern tables"),
    Conflict("enable_pdmux", (False,), "mining and decode share one forward stream"),
    Conflict("enable_two_batch_overlap", (False,), "a split batch has no requests of its own"),
    Conflict("enable_single_batch_overlap", (False,), "a split batch has no requests of its own"),
    Conflict("enable_deterministic_inference", (False,), "its kernels read dense K and V"),
    Conflict(
        "cuda_graph_backend_prefill",
        (None, "breakable", "disabled"),
        "prefill attention plans each batch on the host",
    ),
    Conflict("dllm_algorithm", (None,), "block diffusion rewrites stored tokens"),
    Conflict("dcp_size", (1,), "a sequence must be whole on its rank"),
    Conflict("attn_cp_size", (1,), "a sequence must be whole on its rank"),
    Conflict("pp_size", (1,), "table decisions are made once per scheduler, not per stage"),
    Conflict("attn_dp_size", (1,), "padded attention-DP batches carry no requests"),
    Conflict("enable_dp_attention", (False,), "padded attention-DP batches carry no requests"),
    Conflict(
        "tokenizer_worker_num",
        (1,),
        "SGLang loads no plug-ins in its tokenizer workers, which would let requests through that "
        "end a scheduler",
    ),
)


def refuse_sglang() -> None:
    """Refuse an SGLang other than the supported one, or one whose hook targets have moved.

    Raises:
        RuntimeError: names the version, or the target and the parameters that differ.
    """
    import sglang

    if sglang.__version__ != SGLANG_VERSION:
        raise RuntimeError(
            f"--kv-quant patternkv supports SGLang {SGLANG_VERSION}, found {sglang.__version__}: "
            f"install sglang=={SGLANG_VERSION}, or drop --kv-quant"
        )
    from patternkv_sgl.hooks import moved_targets

    if moved := moved_targets():
        raise RuntimeError(
            "--kv-quant patternkv cannot hook this SGLang: "
            + "; ".join(moved)
            + f". Reinstall sglang=={SGLANG_VERSION}, or drop --kv-quant"
        )


def refuse_options(args: Any) -> None:
    """Refuse SGLang options that exclude the PatternKV cache.

    Raises:
        ValueError: the first conflicting option, with the reason and the remedy.
    """
    for conflict in CONFLICTS:
        value = getattr(args, conflict.field)
        if value not in conflict.neutral:
            raise ValueError(conflict.message(value))
    page_size, max_tokens = args.page_size, args.max_total_tokens
    if page_size is not None and not 1 <= page_size <= MAX_PAGE_SIZE:
        raise ValueError(f"--page-size {page_size}: expected 1 to {MAX_PAGE_SIZE}")
    chunk = args.chunked_prefill_size
    if page_size is not None and chunk is not None and chunk > 0 and chunk % page_size:
        raise ValueError(
            f"--chunked-prefill-size {chunk} is no multiple of --page-size {page_size}: a chunk "
            f"must end on a page; use {max(1, chunk // page_size) * page_size}"
        )
    requests = args.max_running_requests
    if requests is not None and requests < 1:
        raise ValueError(f"--max-running-requests {requests}: expected at least 1")
    if max_tokens is not None and max_tokens < max(2, page_size or 1):
        raise ValueError(
            f"--max-total-tokens {max_tokens}: expected at least 2 tokens and one page of "
            f"{page_size or 1}; raise it, or leave it unset to use the memory there is"
        )


def refuse_canary_on_cpu(args: Any) -> None:
    """Refuse SGLang's KV canary where its kernels cannot run.

    Raises:
        ValueError: the canary is on.
    """
    if args.kv_canary != "none":
        raise ValueError(
            f"--kv-canary {args.kv_canary!r} needs a GPU: SGLang checks slots with Triton kernels. "
            "Leave it at 'none' here; --kv-quant-check verifies tables and slots on a CPU too"
        )


def refuse_model(model_config: Any) -> None:
    """Refuse a model whose attention the cache cannot serve, from its configuration alone.

    Args:
        model_config: SGLang's ``ModelConfig``.

    Raises:
        ValueError: names the property, the limit and the remedy.
    """
    from sglang.srt.configs.model_config import AttentionArch

    hf_config = model_config.hf_config
    name = (hf_config.architectures or [hf_config.model_type])[0]
    remedy = "serve this model without --kv-quant"
    if model_config.attention_arch != AttentionArch.MHA:
        raise ValueError(
            f"{name} uses {model_config.attention_arch.name} attention: --kv-quant patternkv "
            f"serves MHA and GQA; {remedy}"
        )
    # SGLang calls a model hybrid only if it keeps a pool of its own for the windows.
    layer_types = getattr(hf_config.get_text_config(), "layer_types", None) or ()
    if model_config.is_hybrid_swa or "sliding_attention" in layer_types:
        raise ValueError(
            f"{name} mixes sliding-window and full attention: --kv-quant patternkv serves full "
            f"attention only; {remedy}"
        )
    if model_config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model with cross attention; {remedy}")
    from sglang.srt.configs.hybrid_arch import mambaish_config

    if mambaish_config(model_config) is not None:
        raise ValueError(f"{name} has state-space or linear-attention layers; {remedy}")
    _refuse_heads(name, model_config.head_dim, model_config.v_head_dim)
    if str(model_config.dtype) not in DTYPES:
        raise ValueError(
            f"{name} is served in {model_config.dtype}: --kv-quant patternkv supports "
            f"{' and '.join(DTYPES)}; set --dtype bfloat16"
        )


def refuse_kv_dtype(dtype: Any) -> None:
    """Refuse a checkpoint whose own KV quantization would set the dtype of K and V.

    Raises:
        ValueError: names the dtype and the remedy.
    """
    if str(dtype) not in DTYPES:
        raise ValueError(
            f"the checkpoint asks for a KV cache in {dtype}: --kv-quant patternkv supports "
            f"{' and '.join(DTYPES)}; set --kv-cache-dtype auto on a checkpoint without KV scales, "
            "or drop --kv-quant"
        )


def _refuse_heads(name: str, head_dim: int, v_head_dim: int) -> None:
    if head_dim not in HEAD_DIMS or v_head_dim != head_dim:
        raise ValueError(
            f"{name} has head_dim {head_dim} and v_head_dim {v_head_dim}: --kv-quant patternkv "
            f"supports equal ones from {HEAD_DIMS}; serve this model without --kv-quant"
        )


def refuse_no_tokens(input_ids: Sequence[int]) -> None:
    """Refuse an empty prompt. SGLang lets it through to the model, where it ends the scheduler.

    Raises:
        ValueError: says so.
    """
    if len(input_ids) == 0:
        raise ValueError("The prompt has no tokens: send at least one.")


def refuse_ids(input_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that the model has no embeddings for, which end a CPU scheduler.

    Raises:
        ValueError: names an id and the limits.
    """
    _refuse_outside("The prompt holds token id", input_ids, vocab_size)


def refuse_stop_ids(ids: Any, vocab_size: int) -> None:
    """Refuse to stop at tokens that the vocabulary does not have. Where a request of the batch has
    ``min_new_tokens``, SGLang's penalty (sampling/penaltylib/min_new_tokens.py) ends the scheduler
    for them.

    Raises:
        ValueError: names an id and the limits.
    """
    given = ids if isinstance(ids, list | tuple | set) else ()
    if numbers := [token_id for token_id in given if isinstance(token_id, int)]:
        _refuse_outside("stop_token_ids has", numbers, vocab_size)


def _refuse_outside(who: str, ids: Sequence[int], vocab_size: int) -> None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{who} {low if low < 0 else high}: ids of this model are 0 to {vocab_size - 1}."
        )


def refuse_top_logprobs(num: Any, vocab_size: int) -> None:
    """Refuse more logprobs of each token than the vocabulary has tokens, where SGLang's ``topk``
    (layers/logprob_processor.py) ends the scheduler, or anything but a number.

    Raises:
        ValueError: names the number and the limit.
    """
    if not isinstance(num, int) or num > vocab_size:
        raise ValueError(
            f"top_logprobs_num {num!r} (logprobs or top_logprobs of the OpenAI API): expected a "
            f"number up to {vocab_size}, the size of this model's vocabulary."
        )


def refuse_logprob_start(start: Any) -> None:
    """Refuse logprobs of a prompt from a negative position on, whose number ends the scheduler
    (managers/scheduler_components/logprob_result_processor.py), or from anything but a position.

    Raises:
        ValueError: names the value and the limit.
    """
    if not isinstance(start, int) or start < -1:
        raise ValueError(
            f"logprob_start_len {start!r}: expected a position in the prompt from 0 on, or -1 for "
            "no logprobs of the prompt."
        )


def refuse_layers(model: nn.Module) -> None:
    """Refuse a loaded model with an attention layer of a kind that the cache cannot serve.

    Raises:
        ValueError: names the layer, its property and the remedy.
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    for path, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        _refuse_heads(path, layer.qk_head_dim, layer.v_head_dim)
        kinds = {
            f"a sliding window of {layer.sliding_window_size}": layer.sliding_window_size > -1,
            "cross attention": layer.is_cross_attention,
            f"{layer.attn_type.value} attention": layer.attn_type != AttentionType.DECODER,
            f"positions {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
            f"logit capping by {layer.logit_capping_method}": layer.logit_cap > 0
            and layer.logit_capping_method != "tanh",
            "a query-length temperature": layer.xai_temperature_len > 0,
        }
        for kind, present in kinds.items():
            if present:
                raise ValueError(
                    f"{path} has {kind}: --kv-quant patternkv serves causal full attention; serve "
                    "this model without --kv-quant"
                )
