"""Tiny models with random weights, one of each architecture that is served or refused.

They have several layers, grouped-query attention and heads as wide as real models', so that they
run the kernels and paths of their big siblings. Biases and norms are random too: a fresh model
leaves them at 0 and 1, where nothing shows whether they are applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.demo.vocabulary import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORDS = 510
UNKNOWN, END = WORDS, WORDS + 1
COMMON: dict[str, Any] = {
    "vocab_size": WORDS + 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.08,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    # Biased projections, seven query heads per KV head as in Qwen2-7B.
    "qwen2": {
        "hidden_size": 896,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "initializer_range": 0.04,
    },
    "qwen3": {},
    # Every expert answers: which of them do is a near tie of a random router's, and where it falls
    # otherwise the logits jump.
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    # Soft-capped logits, every other layer with a sliding window.
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 128},
}
"""What differs from `COMMON`, by transformers' model type."""
SERVED = tuple(name for name in SPECIAL if name != "gemma2")


def make_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny ``model_type`` of `SPECIAL`, with ``changes``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **COMMON | SPECIAL[model_type] | changes)


def make_tokenizer(folder: Path) -> None:
    """One token per word: ``w0`` to ``w509``, then ``<unk>`` and ``<eos>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{index}": index for index in range(WORDS)} | {"<unk>": UNKNOWN, "<eos>": END}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def make_model(folder: Path, model_type: str = "llama", **changes: Any) -> None:
    """Write a tiny ``model_type`` without tokenizer; ``changes`` go to its configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type, **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
