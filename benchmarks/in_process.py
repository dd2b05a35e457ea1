"""The same engine without a server: one request at a time, for comparison with what came over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.core.events import TokenOut
from penstock.core.request import Request, SamplingParams
from penstock.core.settings import Settings
from penstock.core.step import TokenLogprobs
from penstock.engine.build import Engine, Stages, build_engine
from penstock.models.catalogue import resolve
from penstock.models.chat import ChatTemplate
from penstock.models.source import ModelSource
from penstock.models.tokenizer import Tokenizer
from penstock.policies.stack import make_stack_of
from penstock.replica.replica import Replica


@dataclass
class Output:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class InProcess:
    """A model's engine, tokenizer and template. Each request runs alone, from an empty cache."""

    def __init__(self, model: str, **replica: Any) -> None:
        defaults = Settings()
        self._settings = replace(defaults, replica=replace(defaults.replica, **replica))
        self._source: ModelSource = resolve(model)
        self._engine: Engine = build_engine(self._settings, self._source, self._source.name, Stages())
        self.tokenizer = Tokenizer.load(self._source)
        self.template = ChatTemplate.load(self._source, self.tokenizer)

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=True, parse_special=True)

    def chat_prompt(self, content: str) -> list[int]:
        text = self.template.render([{"role": "user", "content": content}])
        return self.tokenizer.encode(text, add_special=False, parse_special=True)

    def run(
        self, prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False, **sampling: Any
    ) -> Output:
        """Greedy unless `sampling` says otherwise."""
        params = SamplingParams(**{"temperature": 0.0, **sampling})
        ends = frozenset[int]() if ignore_eos else frozenset(self.tokenizer.eos_ids)
        request = Request(
            "alone",
            len(prompt),
            max_tokens,
            0.0,
            prompt_tokens=list(prompt),
            stop_token_ids=ends,
            sampling=params,
        )
        replica = Replica(self._engine.limits, make_stack_of(self._settings))
        replica.submit(request, 0.0)
        output = Output()
        while (plan := replica.plan(0.0)) is not None:
            for event in replica.complete(plan, self._engine.executor.execute(plan), 0.0):
                if isinstance(event, TokenOut):
                    output.tokens.append(event.token_id)
                    output.logprobs += [event.logprobs] if event.logprobs is not None else []
        self._engine.executor.reset()
        return output

    def text(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> str:
        return self.tokenizer.decode(self.run(prompt, max_tokens, **options).tokens)
