"""The embedded model's greedy text is that of transformers on the same dequantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from reference_attention import ReferenceAttention
from stepping import load
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from penstock.engine.model import DecoderModel
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer

OUTPUT_TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "La lune est",
    "Die drei Affen sagen:",
    "SELECT name, COUNT(*) FROM",
    "Q: Why is the sky blue?\nA:",
    "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
    "The mitochondria is the powerhouse of the",
    "To be, or not to be,",
    "import numpy as np\nimport",
    "Ingredients:\n- 2 eggs\n- 100 g flour\n-",
    "{'name': 'Ada', 'born': 1815, 'known_for':",
    "Summary: The company reported that its quarterly revenue",
    "In 1969, two men landed on",
    "x",
    "A train leaves at 9:15 and arrives at 11:40. How long did it take?",
]


@pytest.fixture(scope="module")
def reference(smollm2: ModelSource) -> Any:
    """transformers' own reading of the GGUF file: its names, its row order, its dequantisation."""
    path = str(smollm2.path)
    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict({name: torch.as_tensor(value) for name, value in tensors.items()}, False)
    assert missing.missing_keys == ["lm_head.weight"], "the head is tied"
    return model


@pytest.mark.model
def test_greedy_continuations_are_identical(smollm2: ModelSource, reference: Any) -> None:
    tokenizer = Tokenizer.load(smollm2)
    prompts = [list(tokenizer.encode(text)) for text in PROMPTS]
    ours = greedy(load(smollm2), prompts)
    for text, found, expected in zip(PROMPTS, ours, reference_greedy(reference, prompts), strict=True):
        assert found == expected, text


def reference_greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts as one batch, padded on the left and masked."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=OUTPUT_TOKENS,
        max_new_tokens=OUTPUT_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[longest:].tolist() for row in output]


def greedy(model: DecoderModel, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once: their rows are concatenated, first whole prompts, then one token each."""
    attention = _Sequences(model, len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    chunks = prompts
    for step in range(OUTPUT_TOKENS):
        starts = [len(p) + step - len(chunk) if step else 0 for p, chunk in zip(prompts, chunks, strict=True)]
        chunks = [[token] for token in attention.step(chunks, starts)]
        for output, chunk in zip(outputs, chunks, strict=True):
            output += chunk
    return outputs


class _Sequences:
    """One `ReferenceAttention` a sequence, each given its own rows."""

    def __init__(self, model: DecoderModel, count: int) -> None:
        self._model = model
        self._each = [ReferenceAttention(model.config) for _ in range(count)]
        self._counts: list[int] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(self._each, *(x.split(self._counts) for x in (q, k, v)), strict=True)
        return torch.cat([own.attend(layer, *rows) for own, *rows in parts])

    def step(self, chunks: list[list[int]], starts: list[int]) -> list[int]:
        """The likeliest token behind each chunk; the chunk of sequence i begins at position `starts[i]`."""
        self._counts = [len(chunk) for chunk in chunks]
        positions = [start + i for start, n in zip(starts, self._counts, strict=True) for i in range(n)]
        hidden = self._model.embed(torch.tensor([token for chunk in chunks for token in chunk]))
        hidden = self._model.run(range(self._model.config.layers), hidden, torch.tensor(positions), self)
        last_rows = torch.tensor(self._counts).cumsum(0) - 1
        return self._model.logits(hidden[last_rows]).argmax(dim=-1).tolist()
