"""A model folder small enough to serve in seconds: a random Llama and a byte-level tokenizer for it."""

from __future__ import annotations

import json
from pathlib import Path

from small_tokenizers import train_byte_level
from tiny_model import write_tiny_llama

VOCAB = 384
CONTEXT_LEN = 8192


def write_tiny_chat_model(folder: Path) -> Path:
    write_tiny_llama(folder, vocab_size=VOCAB, max_position_embeddings=CONTEXT_LEN)
    train_byte_level("gpt-2", VOCAB).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder
