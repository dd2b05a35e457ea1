"""The documents are true: what they name exists, what they show parses, what is generated is current."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
import tomllib
from enum import EnumType
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
import typer
from benchmarks.effects.effect import all_effects
from benchmarks.effects.pages import options_of, page_stem, row_name
from markdown import Fence, anchors, documents, fences, inline_code, links, penstock_words, shell_lines

from penstock.cli.main import app
from penstock.core import reasons
from penstock.core.config import DEFAULT_PRESET, ENV_OTHER, environment_name, resolve, setting_help
from penstock.core.settings import PolicySettings
from penstock.models.architecture import Architecture
from penstock.models.ggml_quants import GgmlType
from penstock.policies.stack import REGISTRIES, load_preset, preset_names

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = documents(ROOT)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
GENERATED = ROOT / "docs" / "reference"
RENEW = "run `make docs` and commit what it writes"

# What belongs to one machine, and never into a document.
PRIVATE = re.compile(r"/(work|root|home|tmp|Users)/|file://|\bindex-url https?:|\blocalhost:\d")
# A command line that is a pattern rather than an example.
PATTERN = re.compile(r"[\[\]…|<>]|\.\.\.")
UNIT_WORDS = frozenset({"s", "ms", "tokens", "bytes", "scale", "divisor"})
# Numbers without a unit: counts, ports and seeds; and a length whose help says that it is in tokens.
UNITLESS = frozenset(
    {
        "--port",
        "--threads",
        "--running-max",
        "--limit",
        "--concurrency-max",
        "--replicas",
        "--rounds",
        "--repeat",
        "--tensor-parallel",
        "--seed",
        "SEED",
        "--runs",
        "--vocab-size",
        "--context-len",
    }
)


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reference = load_reference()
PAGES: dict[str, str] = reference.pages()
COMMANDS = reference.commands()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def all_fences(*languages: str) -> list[tuple[str, Fence]]:
    return [(name, fence) for name in NAMES for fence in fences(text_of(name)) if fence.language in languages]


# ---- generated pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"openapi.json"}))
def test_a_generated_page_is_current(name: str) -> None:
    assert (GENERATED / name).read_text(encoding="utf-8") == PAGES[name], RENEW


def test_nothing_else_lies_among_the_generated_pages() -> None:
    assert {path.name for path in GENERATED.iterdir()} == set(PAGES)


def shape_of(document: dict[str, Any]) -> dict[str, Any]:
    """What no version of the framework may change: endpoints and statuses, schemas and fields."""
    paths = {
        (path, method): sorted(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    schemas = document["components"]["schemas"]
    return {
        "paths": paths,
        "schemas": {name: sorted(schema.get("properties", ())) for name, schema in schemas.items()},
    }


def test_the_openapi_document_is_current() -> None:
    """To the letter where the same framework made it; elsewhere, in what we decide."""
    stored, made = json.loads((GENERATED / "openapi.json").read_text()), json.loads(PAGES["openapi.json"])
    assert shape_of(stored) == shape_of(made), RENEW
    if stored["info"][reference.MADE_WITH] == made["info"][reference.MADE_WITH]:
        assert stored == made, RENEW


def test_generated_pages_know_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-mine")
    monkeypatch.setenv("PENSTOCK_REPLICA_KV_MEMORY", "7MiB")
    again = reference.pages()
    assert again == PAGES


# ---- links and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    for target in links(text_of(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_no_document_tells_of_one_machine(name: str) -> None:
    assert not PRIVATE.search(text_of(name)), PRIVATE.search(text_of(name))


def test_documents_that_the_code_names_exist() -> None:
    named = {
        (path.name, document)
        for folder in ("src", "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for document in re.findall(r"\bdocs/[\w/-]+\.(?:md|json)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert [each for each in sorted(named) if not (ROOT / each[1]).exists()] == []


def test_files_that_documents_name_exist() -> None:
    rooms = "|".join(path.name for path in (ROOT / "src" / "penstock").iterdir() if path.is_dir())
    in_package = re.compile(rf"(?:{rooms})/[\w/]+\.(?:py|c|toml)")
    in_tree = re.compile(r"(?:src|tests|scripts|benchmarks)/[\w/]+\.(?:py|c|toml|md)")
    found = 0
    for name in NAMES:
        for code in inline_code(text_of(name)):
            base = ROOT / "src" / "penstock" if in_package.fullmatch(code) else ROOT
            if not in_package.fullmatch(code) and not in_tree.fullmatch(code):
                continue
            if "shortest_prompt" in code or "NAME" in code:
                continue  # the file that a reader is told to write
            found += 1
            assert (base / code).exists(), f"{name} names {code}"
    assert found > 20


def test_settings_that_documents_name_exist() -> None:
    known = {key for key, _, _ in setting_help()}
    variables = {environment_name(key) for key in known} | ENV_OTHER
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    pattern = re.compile(rf"((?:{sections})\.\w+)(?: = .*)?")
    found = set()
    for name in NAMES:
        text = text_of(name)
        for code in inline_code(text):
            match = pattern.fullmatch(code)
            if match and not code.endswith(".py"):
                found.add(match[1])
                assert match[1] in known, f"{name} names the setting {code}"
        typo = {"PENSTOCK_GATEWAY_PROT"} if name == "docs/commands/config.md" else set()
        unknown = set(re.findall(r"\bPENSTOCK_[A-Z_]+\b", text)) - variables - typo
        assert not unknown, f"{name} names {unknown}"
    assert len(found) > 15


def test_metrics_that_documents_name_exist() -> None:
    exposed = set()
    for family in reference.metric_families():
        exposed |= {family.name} | {sample.name for sample in family.samples}
    found = set()
    for name in NAMES:
        for metric in re.findall(r"\b(?:penstock|vllm):[a-z_]+\b", text_of(name)):
            found.add(metric)
            assert metric in exposed, f"{name} names {metric}"
    assert len(found) > 30


def test_every_metric_is_defined_as_it_is() -> None:
    """Name, type, vLLM's name and further labels, in the table of docs/api.md."""
    table = re.findall(r"^\| (`.+`) \| (\w+) \| (yes|) ?\|", text_of("docs/api.md"), re.MULTILINE)
    rows = [(code, kind, alias) for cell, kind, alias in table for code in inline_code(cell)]
    families = reference.metric_families()
    ours = {family.name.removeprefix(reference.OURS): family for family in families}
    assert {code.partition("{")[0] for code, _, _ in rows} == {name for name in ours if ":" not in name}
    for code, kind, alias in rows:
        name, _, labels = code.rstrip("}").partition("{")
        assert kind == ours[name].type, name
        assert bool(alias) == (reference.ALIAS + name in ours), name
        found = {label for sample in ours[name].samples for label in sample.labels}
        assert {label for label in labels.split(",") if label} == found - {*reference.COMMON_LABELS, "le"}, (
            name
        )


def test_makefile_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE))
    named = {
        target
        for name in NAMES
        for code in [*inline_code(text_of(name)), *shell_lines(text_of(name))]
        for target in re.findall(r"^(?:[A-Z_]+=\S+ )?make ([a-z]+)", code)
    }
    assert {"demo", "test", "check", "docs"} <= named <= targets


def test_every_room_has_its_line() -> None:
    rooms = {path.name for path in (ROOT / "src" / "penstock").iterdir() if (path / "__init__.py").exists()}
    told = set(re.findall(r"^\| `(\w+)/` \|", text_of("docs/architecture.md"), re.MULTILINE))
    assert rooms | {"presets"} == told


def guide_section(heading: str) -> str:
    """One section of docs/policies.md."""
    return text_of("docs/policies.md").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_reason_code_is_explained() -> None:
    told = set(inline_code(guide_section("Reading reason codes")))
    enums = [each for each in vars(reasons).values() if isinstance(each, EnumType) and len(each)]
    assert len(enums) >= 7
    assert {reason.value for enum in enums for reason in enum} - told == set()


def test_every_slot_is_in_the_guide() -> None:
    assert re.findall(r"^\| `(\w+)` \|", guide_section("Slots"), re.MULTILINE) == list(REGISTRIES)


def test_every_policy_and_preset_is_in_the_guide() -> None:
    """Slot by slot, and beside each policy the presets that use it."""
    text = guide_section("The policies")
    lines = re.findall(r"^- \*\*`([\w-]+)`\*\*(?: \(([^)]+)\))?[:,]", text, re.MULTILINE)
    slots = [slot for slot, registry in REGISTRIES.items() for _ in registry.names()]
    stacks = {name: PolicySettings().names() | load_preset(name)["policies"] for name in preset_names()}
    told = {slot: set[str]() for slot in REGISTRIES}
    for slot, (name, where) in zip(slots, lines, strict=True):
        told[slot].add(name)
        assert where.startswith("the default") == (stacks[DEFAULT_PRESET][slot] == name), (slot, name)
        users = {preset for preset, stack in stacks.items() if stack[slot] == name} - {DEFAULT_PRESET}
        named = set(inline_code(where))
        is_open = where in ("the default", "most presets") or where.endswith("and others")
        assert named < users if is_open else named == users, (slot, name)
    assert told == {slot: set(registry.names()) for slot, registry in REGISTRIES.items()}
    assert set(preset_names()) - set(inline_code(text_of("docs/policies.md"))) == set()


# ---- pages of the policies --------------------------------------------------------------------------------

POLICIES = {
    page_stem(slot, entry.name): (slot, entry)
    for slot, registry in REGISTRIES.items()
    for entry in registry.entries()
}
PAGES_FOLDER = ROOT / "docs" / "policies"
WRITE = "add it to benchmarks/effects, then run `python -m benchmarks.effects NAME --write`"


def test_every_policy_shows_its_effect() -> None:
    shown = {page_stem(effect.slot, effect.policy) for effect in all_effects()}
    assert shown == set(POLICIES), WRITE


def test_every_policy_has_a_page_and_a_row() -> None:
    assert {path.stem for path in PAGES_FOLDER.glob("*.md")} == set(POLICIES), WRITE
    rows = {row_name(line).replace("/", "-", 1) for line in text_of("docs/policies.md").splitlines()}
    assert rows - {""} == set(POLICIES), WRITE


@pytest.mark.parametrize(
    "stem", [stem for stem in sorted(POLICIES) if (PAGES_FOLDER / f"{stem}.md").exists()]
)
def test_a_policys_page_says_what_its_class_says(stem: str) -> None:
    """Its numbers are held by tests/sim/test_effects.py."""
    slot, entry = POLICIES[stem]
    page = text_of(f"docs/policies/{stem}.md")
    assert (inspect.getdoc(entry.make) or "") in page, WRITE
    assert f"Slot `{slot}`. Source: {entry.source}." in page, WRITE
    for table in options_of(entry):
        assert table in page, WRITE
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures, "an effect has a chart"
    for name in pictures:
        ElementTree.fromstring((PAGES_FOLDER / name).read_text(encoding="utf-8"))


def test_no_picture_lies_about_unused() -> None:
    pages = [path.read_text(encoding="utf-8") for path in PAGES_FOLDER.glob("*.md")]
    used = {name for page in pages for name in re.findall(r"\]\((.*\.svg)\)", page)}
    assert {path.name for path in PAGES_FOLDER.glob("*.svg")} == used


def test_the_readme_counts_right() -> None:
    text = text_of("README.md")
    assert f"{len(POLICIES)} policies in six slots" in text and len(REGISTRIES) == 6
    assert f"{len(preset_names())} presets" in text
    assert f"| architectures | {len(get_args(Architecture))} |" in text


def test_what_the_engine_runs_is_listed() -> None:
    text = text_of("docs/engine.md")
    assert set(get_args(Architecture)) - set(inline_code(text)) == set()
    types = re.search(r"GGUF tensor types: ([^.]*)\.", text)
    assert types is not None
    assert set(types[1].split(", ")) == {each.name for each in GgmlType}


# ---- examples ---------------------------------------------------------------------------------------------


def leaf_of(words: list[str]) -> tuple[Any, list[str]]:
    """Follow command names as far as they go: the command, and the words that are left."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command `{' '.join(words)}`"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_names(words: list[str]) -> None:
    """The command exists, and so does each option in the line."""
    command, rest = leaf_of(words)
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    options = re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", " ".join(rest))
    assert set(options) <= known, f"`{' '.join(words)}`: {set(options) - known}"


def check_parses(words: list[str]) -> None:
    """Typer's own parser takes the line; the command is not run."""
    command, rest = leaf_of(words)
    assert not hasattr(command, "commands"), f"`{' '.join(words)}` is no complete command"
    command.make_context(command.name, list(rest))


def example_lines(name: str) -> list[list[str]]:
    found = (penstock_words(line) for line in shell_lines(text_of(name)))
    return [words for words in found if words is not None]


def test_command_lines_in_documents_parse() -> None:
    parsed = 0
    for name in NAMES:
        for words in example_lines(name):
            if PATTERN.search(" ".join(words)) or {"--help", "--version"} & set(words):
                check_names(words)
            else:
                check_parses(words)
                parsed += 1
    assert parsed > 30


def test_commands_named_in_the_text_exist() -> None:
    for name in NAMES:
        for code in inline_code(text_of(name)):
            words = penstock_words(code.replace("|", " "))
            if words is None or "--version" in words:
                continue
            for alternative in [words] if "|" not in code else alternatives(code):
                check_names(alternative)


def alternatives(code: str) -> list[list[str]]:
    """`penstock model list|pull` → both commands."""
    *front, last = code.split()[1:]
    return [[*front, choice] for choice in last.split("|")]


def test_markdown_is_read_as_it_is_meant() -> None:
    text = """# A `b` c: d!
See [x](y.md#z) and `[no](link)`, `penstock serve`.

    penstock policies

- item

  ```sh
  # not a heading
  A=1 penstock serve | cat
  ```

```console
$ penstock model list
penstock is only output
```
"""
    assert anchors(text) == {"a-b-c-d"}
    assert links(text) == ["y.md#z"]
    assert inline_code(text) == ["b", "[no](link)", "penstock serve"]
    assert [words for line in shell_lines(text) if (words := penstock_words(line)) is not None] == [
        ["serve"],
        ["model", "list"],
        ["policies"],
    ]


def test_the_checks_of_command_lines_bite() -> None:
    assert penstock_words("A=1 penstock serve --port 0 | cat  # here") == ["serve", "--port", "0"]
    with pytest.raises(AssertionError, match="no command"):
        check_names(["sevre"])
    with pytest.raises(AssertionError, match="--prot"):
        check_names(["serve", "--prot", "1"])
    for words in (["serve", "--port", "high"], ["replay"], ["trace", "convert", "one.csv"]):
        with pytest.raises(Exception, match=r"(?i)valid integer|missing"):
            check_parses(words)


@pytest.mark.parametrize(("name", "fence"), all_fences("python"), ids=str)
def test_python_examples_compile(name: str, fence: Fence) -> None:
    ast.parse(fence.body, filename=name)


def test_there_are_python_examples() -> None:
    assert len(all_fences("python")) >= 2


def test_toml_examples_are_settings() -> None:
    found = all_fences("toml")
    assert len(found) >= 3
    for name, fence in found:
        resolve(file_text=fence.body, file_name=name, environ={}, flags={}, load_preset=load_preset)


def test_json_examples_parse() -> None:
    found = all_fences("json")
    assert found
    for _, fence in found:
        json.loads(fence.body)


def test_the_recipe_for_a_policy_works() -> None:
    """The example of CONTRIBUTING, run in a registry of its own."""
    fence = next(fence for fence in fences(text_of("CONTRIBUTING.md")) if "@RANK.register" in fence.body)
    registry = type(REGISTRIES["rank"])("rank")
    code = re.sub(r"import RANK, Rank, RankKey", "import Rank, RankKey", fence.body)
    scope: dict[str, Any] = {"RANK": registry, "__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)  # noqa: S102 our own document
    assert registry.names() == ["shortest-prompt"]
    policy = registry.make("shortest-prompt")
    assert policy.version(0.0) == 0


# ---- help -------------------------------------------------------------------------------------------------


def test_every_command_has_a_page() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "commands").glob("*.md")}
    assert pages == {page.words[0] for page in COMMANDS}


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: "-".join(page.words))
def test_help_says_what_and_how(page: Any) -> None:
    first_line = page.help.split("\n")[0]
    assert first_line.endswith(".") and len(first_line) <= 110
    assert page.examples, f"`{page.name} --help` has no example"
    for example in page.examples:
        words = penstock_words(example)
        assert words is not None
        check_parses(words)
    assert all(parameter.help for parameter in page.parameters)
    assert any("--json" in parameter.names for parameter in page.parameters) or page.name == "penstock serve"


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: "-".join(page.words))
def test_numbers_say_their_unit(page: Any) -> None:
    for parameter in page.parameters:
        if parameter.kind in (int, float):
            name = parameter.names[0]
            assert name.rpartition("-")[2] in UNIT_WORDS or name in UNITLESS, name


def test_tomls_of_presets_are_short() -> None:
    for path in (ROOT / "src" / "penstock" / "presets").glob("*.toml"):
        assert set(tomllib.loads(path.read_text())) >= {"summary", "source", "policies"}
        assert len(path.read_text().splitlines()) <= 20, "a paper is a file of ten lines, or two"
