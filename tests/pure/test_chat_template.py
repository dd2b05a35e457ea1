"""Chat templates render what transformers renders, and hostile ones are stopped.

Hostile templates run with small limits, so that each is stopped by a limit and not by the test's patience.
"""

from __future__ import annotations

import json
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import train_byte_level

from penstock.core.errors import InvalidRequest, ModelFileDamaged, PenstockError
from penstock.models.chat import DEFAULT_TEMPLATE, ChatTemplate, template_text
from penstock.models.chat_sandbox import RenderLimits
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer

SMALL = RenderLimits(cpu_s=0.2, characters=1_000_000, elements=50_000)

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ALTERNATING = """
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ (system ~ '\\n\\n' if loop.first and system else '') ~ message.content ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

WITH_TOOLS = """
{%- macro describe(tool, level=0) %}
{%- set properties = tool.function.parameters.properties %}
{{ '-' * (level + 1) }} {{ tool.function.name }}({% for key, value in properties.items() %}
{{ key }}: {{ value.type | default('any') | upper }}{{ '' if loop.last else ', ' }}{% endfor %})
{% endmacro %}
{%- set ns = namespace(calls=0, last=none) %}
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- describe(tool) }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {%- endfor %}
    {%- elif message.content is string and '</think>' in message.content %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- message.role.title() + ': ' + (message.content or '') }}
    {%- endif %}
    {% generation %}{{- '|' }}{% endgeneration %}
    {%- set ns.last = message.role %}
{%- endfor %}
{{- '\\n%s call%s, last %s, %02d' % (ns.calls, '' if ns.calls == 1 else 's', ns.last, 7) }}
{{- messages | map(attribute='role') | unique | join('/') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- '{:>6}|{!r}'.format(ns.calls, 'x') }}
{{- messages[-1]['role'] if messages[-1:] else '' }}
{{- (messages | last).content | default('none', true) | replace('e', 'E') | indent(2) }}
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Grüße 🎉\n\nsecond line"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>hm</think>\n\n two "},
        {"role": "user", "content": "{{ not a template }} {% raw %} <|im_end|>"},
    ],
    [{"role": "user", "content": ""}],
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter & <Klima> 'heute'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "day": {}}},
        },
    }
]

TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5, "ok": None}}}
        ],
    },
    {"role": "skip", "content": "never seen"},
    {"role": "tool", "content": '{"t": 3}'},
]


def transformers_render(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_byte_level("gpt-2"), bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("template", [SMOLLM2, ALTERNATING, WITH_TOOLS, DEFAULT_TEMPLATE])
def test_the_text_is_that_of_transformers(template: str, prompted: bool) -> None:
    ours = ChatTemplate(template, "<|begin|>", "<|im_end|>")
    for messages in CONVERSATIONS:
        expected = transformers_render(template, messages, add_generation_prompt=prompted)
        assert ours.render(messages, add_generation_prompt=prompted) == expected


def test_tools_and_tool_calls_are_those_of_transformers() -> None:
    ours = ChatTemplate(WITH_TOOLS, "<|begin|>", "<|im_end|>")
    expected = transformers_render(WITH_TOOLS, TOOL_TALK, tools=TOOLS, add_generation_prompt=True)
    assert ours.render(TOOL_TALK, tools=TOOLS) == expected
    assert "1 call, last tool, 07" in expected and "never seen" not in expected


@pytest.mark.model
def test_smollm2_brings_the_template_it_was_trained_with(smollm2: ModelSource) -> None:
    assert template_text(smollm2) == SMOLLM2
    template = ChatTemplate.load(smollm2, Tokenizer.load(smollm2))
    text = template.render([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_parts_of_text_are_joined_by_newlines() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c"]
    assert template.render([{"role": "user", "content": parts}]) == "a\nb\nc"
    assert template.render([{"role": "user", "content": []}]) == ""


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, {"type": "text"}, 7, None, {}])
def test_other_parts_are_refused_by_place(part: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate("x").render([{"role": "user", "content": ["ok", part]}])
    assert caught.value.param == "messages" and "messages[0].content[1]" in caught.value.message


def test_helpers_and_extra_variables() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ flag }} {{ tools }} {{ missing }}{{ eos_token }}",
        "<s>",
        "</s>",
        now=lambda: datetime(2024, 2, 29),
    )
    assert template.render([], flag=True) == "<s>29 Feb 2024 True None </s>"
    # A caller's own variables cannot replace what the template relies on.
    assert template.render([], flag=1, messages=3, bos_token="x", self=1).startswith("<s>29")


def test_what_the_template_says_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(ALTERNATING).render([{"role": "assistant", "content": "x"}])
    assert caught.value.param == "messages"
    assert "Roles must alternate user/assistant" in caught.value.message


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content.nope() }}", "{{ 1 / 0 }}", "{{ messages[0]['content'] + 1 }}"]
)
def test_errors_of_a_template_are_the_requests(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(template).render([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_the_inputs_are_not_changed_and_renders_do_not_meet() -> None:
    template = ChatTemplate(
        "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ messages|length }}"
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    assert [template.render(messages) for _ in range(3)] == ["11"] * 3
    assert json.dumps(messages) == before


NOT_VALID = {
    "syntax": "{% for %}",
    "unclosed": "{% if true %}",
    "unknown filter": "{{ 'a' | xmlattr }}",
    "unknown tag": "{% do x %}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "deep loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "deep brackets": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
    "long sum": "{{ 1" + "+1" * 20_000 + " }}",
    "huge number": "{{ " + "9" * 10_000 + " }}",
    "too long": "a" * 300_000,
}


@pytest.mark.parametrize("case", NOT_VALID)
def test_a_template_that_is_not_valid_is_the_models_fault(case: str) -> None:
    with pytest.raises(ModelFileDamaged, match="chat template is not valid") as caught:
        ChatTemplate(NOT_VALID[case])
    assert len(caught.value.message) < 500


def doubled(step: str, end: str) -> str:
    return "{% set x = 'aaaa' %}" + step * 60 + end


ENDLESS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "range as a list": "{{ range(10**9) | list | length }}",
    "nested loops": "{% for i in range(40000) %}{% for j in range(40000) %}{% endfor %}{% endfor %}",
    "idle loop": "{% for i in range(40000) if (range(40000)|select('odd')|list) == 1 %}{% endfor %}",
    "text times number": "{{ 'a' * 10**10 }}",
    "number times text": "{{ 10**10 * 'a' }}",
    "list times number": "{{ [1] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(9000) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "center filter": "{{ 'a' | center(10**10) }}",
    "center method": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill by item": "{{ 'a'['zfill'](10**10) }}",
    "indent": "{{ 'a\n\nb' | indent(10**10) }}",
    "indent by text": "{{ ('a\n' * 10000) | indent('x' * 10000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent repeats": "{{ ('%(a)s' * 10000) % {'a': 'b' * 10000} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10**9) }}",
    "format by item": "{{ '{:1000000000}'['format'](1) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format repeats": "{{ ('{0}' * 10000).format('b' * 10000) }}",
    "replace filter": "{{ ('a' * 10000) | replace('a', 'b' * 10000) }}",
    "replace method": "{{ ('a' * 10000).replace('', 'b' * 10000) }}",
    "join method": "{{ ('b' * 10000).join([''] * 10000) }}",
    "join filter": "{{ ([''] * 10000) | join('b' * 10000) }}",
    "split": "{{ ('a ' * 200000).split() | length }}",
    "letters": "{{ ('a' * 990000) | list | length }}",
    "tilde": doubled("{% set x = x ~ x %}", "{{ x | length }}"),
    "plus": doubled("{% set x = x + x %}", "{{ x | length }}"),
    "set block": doubled("{% set x %}{{ x }}{{ x }}{% endset %}", "{{ x | length }}"),
    "shared list": doubled("{% set x = [x, x] %}", "{{ x }}"),
    "shared tuple": doubled("{% set x = (x, x) %}", "{{ x == 1 }}"),
    "shared dict": doubled("{% set x = {'a': x, 'b': x} %}", "{{ x | tojson }}"),
    "shared dict call": doubled("{% set x = dict(a=x, b=x) %}", "{{ x | string }}"),
    "literal text in a loop": "{% for i in range(40000) %}" + "a" * 10_000 + "{% endfor %}",
    "output in a loop": "{% set x = 'a' * 10000 %}{% for i in range(40000) %}{{ x }}{% endfor %}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18
    + "{% endcall %}" * 18,
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "json lines": "{{ ([1] * 10000) | tojson(indent=1000) }}",
    "json separators": "{{ ([1] * 10000) | tojson(separators=('a' * 10000, ':')) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "sorting much": "{{ ([2, 1] * 20000) | sort | length }} {{ ('ab' * 100000) | sort }}",
    "summing lists": "{{ ('a' * 100000) | sum(start=[]) }}",
    "dates": "{{ strftime_now('%d' * 1000) }}",
    "json indent as a credit": "{{ [1] | tojson(indent=-10**9) }}" + "{{ 'a' * 900000 }}" * 2,
    "indent as a credit": "{{ 'a\n' | indent(-9999) }}" + "{{ 'a' * 900000 }}" * 2,
    "results of methods": "{% set x = 'a' * 99999 %}"
    + "".join(f"{{% set y{i} = x.upper() %}}" for i in range(20)),
    "results of filters": "{% set x = 'a' * 99999 %}"
    + "".join(f"{{% set y{i} = x|upper %}}" for i in range(20)),
    "many texts": "".join(f"{{% set x{i} = 'a' * 100000 %}}" for i in range(20)),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_an_endless_template_is_stopped_by_a_limit(case: str) -> None:
    template = ChatTemplate(ENDLESS[case], limits=SMALL)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="was stopped: it") as caught:
            template.render([{"role": "user", "content": "x"}])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.param == "messages" and caught.value.hint
    assert peak_bytes < 8 << 20


RECURSIVE = {
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro twice": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "block": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "namespace": "{% set n = namespace() %}{% set n.n = n %}{{ n | string }}{{ n == n }}{{ [n] | tojson }}",
}


@pytest.mark.parametrize("case", RECURSIVE)
def test_recursion_ends(case: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(RECURSIVE[case], limits=SMALL).render([])


@pytest.mark.parametrize(("depth", "end"), [(25, "it ran for"), (250, "it recurses too deeply")])
def test_a_macro_that_branches_ends_by_time_or_by_depth(depth: int, end: str) -> None:
    twice = "{{ f(n + 1) }}{{ f(n + 1) }}"
    macro = f"{{% macro f(n) %}}{{% if n < {depth} %}}{twice}{{% endif %}}{{% endmacro %}}"
    with pytest.raises(InvalidRequest, match=end):
        ChatTemplate(macro + "{{ f(0) }}", limits=SMALL).render([])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].update(role='x') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__self__._environment }}",
    "{{ self._TemplateReference__context.environment }}",
    "{% for i in [1] %}{{ loop._iterable.gi_frame.f_globals }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "{{ ('a' * 1000).translate({97: 'b' * 100000}) }}",
    "{{ lipsum(1000000) }}",
    "{{ cycler.__init__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ [1]|map('attr', '__class__')|map(attribute='__mro__')|list }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing_outside(template: str) -> None:
    """Either refused, or rendered to nothing that came from Python's internals."""
    messages = [{"role": "user", "content": "x"}]
    try:
        text = ChatTemplate(template, limits=SMALL).render(messages)
    except InvalidRequest:
        return
    finally:
        assert messages == [{"role": "user", "content": "x"}]
    assert text.strip("[], ") in ("", "Undefined", "Undefined Undefined")


@pytest.mark.parametrize(
    "method",
    [
        "'\t'.expandtabs(9)",
        "'a'.translate({97: 'bb'})",
        "'a'.encode()",
        "(1).to_bytes(9, 'big')",
        "(1.5).hex()",
    ]
    + ["[1].append(2)", "[1].sort()", "{'a': 1}.pop('a')", "messages[0].update(a=1)", "range(9).index(3)"],
)
def test_methods_outside_the_list_are_not_there(method: str) -> None:
    """They are refused for themselves, whatever their result would have been."""
    with pytest.raises(InvalidRequest, match="unsafe"):
        ChatTemplate("{{ " + method + " }}").render([{"role": "user", "content": "x"}])


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            (
                "{{ }} {% %} for in if else endfor endif set messages loop range ( ) [ ] | ~ + * ** 'a' 9 x"
                " = . join map list tojson namespace macro endmacro call endcall block endblock recursive"
                " not is defined"
            ).split()
        ),
        max_size=30,
    )
)
def test_no_other_error_comes_out_of_any_template(pieces: list[str]) -> None:
    try:
        ChatTemplate(" ".join(pieces), limits=SMALL).render([{"role": "user", "content": "x"}])
    except PenstockError:
        pass


def test_long_honest_conversations_fit_the_default_limits() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(1000)]
    text = ChatTemplate(SMOLLM2).render(messages)
    assert text.count("<|im_start|>") == 1002
    assert len(ChatTemplate(WITH_TOOLS).render(messages, tools=TOOLS * 20)) > 2_000_000


class TestWhereTheTemplateComesFrom:
    def source(self, folder: Path) -> ModelSource:
        return ModelSource("m", "folder", folder, "test")

    def test_newest_form_first(self, tmp_path: Path) -> None:
        assert template_text(self.source(tmp_path)) is None
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
        assert template_text(self.source(tmp_path)) == "old"
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "newer"}))
        assert template_text(self.source(tmp_path)) == "newer"
        (tmp_path / "chat_template.jinja").write_text("newest")
        assert template_text(self.source(tmp_path)) == "newest"

    def test_the_default_of_several(self, tmp_path: Path) -> None:
        named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert template_text(self.source(tmp_path)) == "d"

    def test_chatml_when_there_is_none(self, tmp_path: Path) -> None:
        train_byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
        template = ChatTemplate.load(self.source(tmp_path), Tokenizer.load(self.source(tmp_path)))
        assert template.source_text == DEFAULT_TEMPLATE
        text = template.render([{"role": "user", "content": "hi"}])
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
        with pytest.raises(ModelFileDamaged, match=r"chat_template\.jinja"):
            template_text(self.source(tmp_path))
