"""Damaged GGUF files: whatever the bytes, only our own errors come out, and no large allocation is made.

A small valid model file (metadata, a tokenizer, a chat template, tensors of several types) is damaged in
random places: bytes changed, cut, repeated, and lengths replaced by boundary values. Everything that reads
the file is then run on it.
"""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import finish

from penstock.core.errors import PenstockError
from penstock.models.chat import ChatTemplate
from penstock.models.config import load_config
from penstock.models.gguf import GgufFile
from penstock.models.source import ModelSource
from penstock.models.summary import weights_bytes_by_type
from penstock.models.tokenizer import Tokenizer

PEAK_BYTES = 32 << 20
"""A file of a few KiB cannot justify more; imports on first use are done before."""

TOKENS = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁a", "ab", "▁ab"]
KINDS = [2, 3, 3, 6, 1, 1, 1, 1, 1, 1]


def valid_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_scores([float(-i) for i in range(len(TOKENS))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("token_embd.weight", np.ones((len(TOKENS), 32), np.float32))
    quantised = gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q4.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("norm.weight", np.ones(5, np.float16))
    return finish(writer, path).read_bytes()


def read_everything(path: Path) -> None:
    """Each reader on its own, so that one's refusal does not shield the next."""
    source = ModelSource("fuzz", "gguf", path, "test")

    def dequantise_all() -> None:
        file = GgufFile(path)
        for name, tensor in file.tensors.items():
            assert file.raw(name).nbytes == tensor.byte_count
            assert file.dequantise(name).shape == tensor.shape

    def use_tokenizer() -> None:
        tokenizer = Tokenizer.load(source)
        tokenizer.decode(tokenizer.encode("ab a\n<s>é"))
        tokenizer.encode("</s>", parse_special=False)
        ChatTemplate.load(source, tokenizer).render([{"role": "user", "content": "ab"}])

    for read in (
        dequantise_all,
        use_tokenizer,
        lambda: load_config(source),
        lambda: weights_bytes_by_type(source),
    ):
        try:
            read()
        except PenstockError as error:
            assert error.message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def valid(folder: Path) -> bytes:
    path = folder / "valid.gguf"
    content = valid_file(path)
    source = ModelSource("fuzz", "gguf", path, "test")
    tokenizer = Tokenizer.load(source)
    assert tokenizer.decode(tokenizer.encode("ab a\n")) == "ab a\n"
    assert load_config(source).layers == 1 and len(GgufFile(path).tensors) == 3
    return content


def check(folder: Path, content: bytes) -> None:
    path = folder / "damaged.gguf"
    path.unlink(missing_ok=True)  # Never truncate a file that an earlier example still maps.
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read_everything(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < PEAK_BYTES


BOUNDARY_WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_changed_bytes(folder: Path, valid: bytes, data: st.DataObject) -> None:
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    check(folder, bytes(content))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_lengths_and_counts_that_lie(folder: Path, valid: bytes, data: st.DataObject) -> None:
    """Overwrites four or eight bytes anywhere by a boundary value: that is where counts and offsets are."""
    word = data.draw(st.sampled_from(BOUNDARY_WORDS))
    raw = struct.pack("<Q", word)[: data.draw(st.sampled_from([4, 8]))]
    place = data.draw(st.integers(0, len(valid) - len(raw)))
    check(folder, valid[:place] + raw + valid[place + len(raw) :])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cut_and_repeated_pieces(folder: Path, valid: bytes, data: st.DataObject) -> None:
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(valid))] * 2)))
    times = data.draw(st.sampled_from([0, 2, 50]))
    check(folder, valid[:start] + valid[start:end] * times + valid[end:])


@settings(max_examples=200, deadline=None)
@example(content=b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40))
@given(content=st.binary(max_size=400) | st.binary(max_size=400).map(lambda tail: b"GGUF\3\0\0\0" + tail))
def test_any_bytes(folder: Path, content: bytes) -> None:
    check(folder, content)
