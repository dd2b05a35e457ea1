"""Commands that fail say what is wrong and how to go on, with the documented exit code; others print JSON."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

import pytest
import torch
from benchmarks.server_process import Ended, run_penstock, start_server
from tiny_chat_model import CONTEXT_LEN, VOCAB, write_tiny_chat_model

from conftest import FLAGS

FAILED, USAGE, ENVIRONMENT = 1, 2, 3
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"


def serve(model: str | Path, *flags: str, **settings: object) -> Ended:
    """`penstock serve` of something that must not start."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return run_penstock("serve", "--model", str(model), "--port", "0", *flags, settings=dotted)


def assert_refused(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended.stderr
    assert ended.stdout == "" and "Traceback" not in ended.stderr
    for word in ("error: ", "hint: ", *words):
        assert word in ended.stderr, ended.stderr


def write_gguf_head(path: Path) -> Path:
    """A GGUF that promises ten tensors and ends after its header."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10, 1))
    return path


def test_an_unknown_model() -> None:
    assert_refused(serve("smollm9"), FAILED, "smollm9", "penstock model list")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert_refused(serve(tmp_path), FAILED, "safetensors")


def test_a_truncated_gguf(tmp_path: Path) -> None:
    assert_refused(serve(write_gguf_head(tmp_path / "cut.gguf")), FAILED, "cut.gguf")


@pytest.mark.parametrize("claim_bytes", [1 << 60, 1 << 20], ids=["absurd", "beyond the file"])
def test_a_safetensors_header_that_lies(tmp_path: Path, claim_bytes: int) -> None:
    folder = write_tiny_chat_model(tmp_path / "liar")
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", claim_bytes) + weights.read_bytes()[8:])
    assert_refused(serve(folder), FAILED, "model.safetensors")


def test_a_truncated_safetensors(tmp_path: Path) -> None:
    folder = write_tiny_chat_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_refused(serve(folder), FAILED, "model.safetensors")


def test_an_unsupported_architecture(tmp_path: Path) -> None:
    folder = write_tiny_chat_model(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    odd = {**config, "architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(odd))
    assert_refused(serve(folder), FAILED, "mamba")


def test_a_port_in_use(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_penstock("serve", "--model", str(tiny_folder), "--port", str(port))
    assert_refused(ended, ENVIRONMENT, str(port), "--port")


def test_an_unknown_policy(tiny_folder: Path) -> None:
    assert_refused(serve(tiny_folder, policies__rank="fastest"), USAGE, "fastest", "fastswitch")
    assert_refused(serve(tiny_folder, "--preset", "nonsuch"), USAGE, "nonsuch", "sarathi")


def test_bad_settings(tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    for text, word in (
        ("[gateway]\nprot = 1", "gateway.port"),
        ("[gateway]\nport = 'x'", "gateway.port"),
        ("[gateway]\nport = 70000", "gateway.port"),
        ("[gateway", "penstock.toml"),
    ):
        config.write_text(text)
        ended = run_penstock("serve", "--config", str(config))
        assert ended.code == USAGE and word in ended.stderr and "Traceback" not in ended.stderr
    assert_refused(serve(tiny_folder, gateway__prot="1"), USAGE, "PENSTOCK_GATEWAY_PORT")
    assert run_penstock("serve", "--port", "many").code == USAGE
    assert run_penstock("serve", "--no-such-flag").code == USAGE
    assert run_penstock("nonsense").code == USAGE


@pytest.mark.parametrize("size", ["1000TiB", "lots", "1KiB"])
def test_kv_memory_that_cannot_be(tiny_folder: Path, size: str) -> None:
    ended = serve(tiny_folder, "--kv-memory", size)
    assert ended.code == USAGE and "kv_memory" in ended.stderr and "Traceback" not in ended.stderr


def test_a_device_that_is_not_there(tiny_folder: Path) -> None:
    assert_refused(serve(tiny_folder, "--device", "abacus"), USAGE, "abacus", "cpu")
    if not torch.cuda.is_available():
        assert_refused(serve(tiny_folder, "--device", "cuda"), ENVIRONMENT, "no CUDA device", "cpu")


def test_a_template_that_loops(tmp_path: Path) -> None:
    """The server starts, refuses chats by name of the template, and serves everything else."""
    folder = write_tiny_chat_model(tmp_path / "loops")
    (folder / "chat_template.jinja").write_text(LOOP)
    with start_server(folder, tmp_path, *FLAGS) as server, server.client() as client:
        chat = {"model": "loops", "messages": [{"role": "user", "content": "hi"}]}
        refused = client.post("/v1/chat/completions", json=chat)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
        assert "template" in refused.json()["error"]["message"]
        legacy = {"model": "loops", "prompt": "hi", "max_tokens": 2}
        assert client.post("/v1/completions", json=legacy).status_code == 200
        assert server.stop() == 0


def test_model_info(tiny_folder: Path) -> None:
    ended = run_penstock("model", "info", str(tiny_folder), "--json")
    facts = json.loads(ended.stdout)
    assert (ended.code, ended.stderr) == (0, "")
    assert (facts["architecture"], facts["vocabulary"], facts["context_tokens"]) == (
        "llama",
        VOCAB,
        CONTEXT_LEN,
    )
    assert "llama" in run_penstock("model", "info", str(tiny_folder)).stdout
    assert run_penstock("model", "info", str(tiny_folder / "nothing")).code == FAILED


def test_policies_and_settings_are_listed() -> None:
    policies = json.loads(run_penstock("policies", "--json").stdout)
    assert {"rank", "admit", "compose", "preempt", "retain"} <= policies["slots"].keys()
    assert {entry["name"] for entry in policies["slots"]["compose"]} >= {"sarathi", "prefill-first"}
    assert policies["presets"]
    settings = {"gateway.port": 9001, "gateway.api_keys": "secret-1,secret-2"}
    shown = run_penstock("config", "show", "--json", settings=settings)
    values = json.loads(shown.stdout)
    assert values["gateway.port"] == {"value": 9001, "origin": "environment"}
    assert values["replica.running_max"]["origin"] == "default"
    assert "secret" not in shown.stdout, "keys are never shown"
