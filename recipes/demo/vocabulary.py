"""The demo model's words and its tokenizer.

One token per word, words separated by single spaces, so text and ids determine each other and the
tokens of a context are a prefix of the tokens of context plus question.
"""

from __future__ import annotations

import json
from pathlib import Path

from .ledger import MODULUS, OPENING, SYLLABLES

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORDS = [
    *(PAD, EOS, UNKNOWN, OPENING, ";", "?", "answer"),
    *SYLLABLES,
    *(f"+{number}" for number in range(MODULUS)),
    *(str(number) for number in range(MODULUS)),
]
TOKEN_IDS = {word: token for token, word in enumerate(WORDS)}
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join(' ') }}\n"
FIRST_SYLLABLE = TOKEN_IDS[SYLLABLES[0]]
FIRST_DELTA = TOKEN_IDS["+0"]
FIRST_NUMBER = TOKEN_IDS["0"]


def decode(tokens: list[int]) -> str:
    """Text of token ids, as the saved tokenizer decodes it."""
    return " ".join(WORDS[token] for token in tokens)


def save_tokenizer(folder: Path, max_length: int) -> None:
    """Write what Hugging Face's AutoTokenizer reads; a chat is its messages one after the other."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in (PAD, EOS, UNKNOWN)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
