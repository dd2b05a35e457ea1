"""From a validated body to core requests: semantics, feasibility, ids and seeds. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from penstock.core.errors import InvalidRequest, ModelNotFound, UnsupportedParameter
from penstock.core.request import Request, SamplingParams
from penstock.desk import Capacity, fit_output
from penstock.gateway.program_turn import NO_PROGRAM, ProgramTurn
from penstock.gateway.schema import ChatRequest, CompletionRequest, Generation, Message

STOP_WORK_CHARS_MAX = 65_536
COMPLETION_TOKENS_DEFAULT = 16  # what OpenAI defines for the legacy endpoint


@dataclass(frozen=True, slots=True)
class Served:
    """What is served here: the model's name, its limits, and what the checks below need of it."""

    model: str
    capacity: Capacity
    vocab_size: int
    eos_ids: frozenset[int]
    choices_max: int
    is_priority_ranked: bool  # whether the replica's policy reads `priority` at all
    keeps_pins: bool = False  # whether its policy pins KV between turns
    classes: frozenset[str] = frozenset()  # of service; what else is asked for is refused


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and since when; the same for every choice of a call."""

    arrival_s: float
    tenant: str = "default"
    slo_class: str = "default"
    turn: ProgramTurn = NO_PROGRAM


@dataclass(frozen=True, slots=True, repr=False)
class CallPlan:
    """One HTTP request as core requests, in the order of the answer's choices."""

    id: str
    requests: list[Request]
    choices_per_prompt: int
    stops: tuple[str, ...] = ()
    is_stream: bool = False
    has_usage_chunk: bool = False
    echo_texts: list[str] = field(default_factory=list)  # one a prompt, when the prompt is to be echoed
    continues_prompt: bool = False  # the text is appended to the prompt, rather than an answer of its own

    @property
    def prompt_token_count(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(request.prompt_len for request in self.requests[:: self.choices_per_prompt])


def check_model(name: str | None, served: Served) -> None:
    """Raise ModelNotFound, listing what there is. A body that may omit the model passes None."""
    if name is not None and name != served.model:
        raise ModelNotFound(
            f"The model `{name[:100]}` is not served here.", hint=f"Served: `{served.model}`.", param="model"
        )


def check_generation(body: Generation, served: Served) -> None:
    """What the schema cannot say: fields that depend on each other or on the model. Raises RequestErrors."""
    check_model(body.model, served)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "`stream_options` is given without `stream`.",
            hint="Set `stream` to true.",
            param="stream_options",
        )
    if (body.n or 1) > served.choices_max:
        raise InvalidRequest(f"`n` is {body.n}; this server allows {served.choices_max}.", param="n")
    if body.priority and not served.is_priority_ranked:
        raise UnsupportedParameter(
            "`priority` has no effect under this server's ranking policy.",
            hint="Leave it out, or start the server with a policy that ranks by priority.",
            param="priority",
        )
    if isinstance(body, ChatRequest) and body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest(
            "`top_logprobs` is given without `logprobs`.",
            hint="Set `logprobs` to true.",
            param="top_logprobs",
        )
    check_token_ids([token_id for token_id, _ in body.logit_bias or ()], served, "logit_bias")
    check_token_ids(body.stop_token_ids or (), served, "stop_token_ids")


def check_stops(body: Generation, choice_count: int) -> None:
    """Each choice searches for each stop string; that must stay a bounded amount of work and memory."""
    work_chars = choice_count * sum(map(len, body.stop or ()))
    if work_chars > STOP_WORK_CHARS_MAX:
        raise InvalidRequest(
            f"`stop` has too many characters for {choice_count} choices.",
            hint="Use shorter stop strings, or fewer choices and prompts.",
            param="stop",
        )


def check_token_ids(token_ids: Sequence[int], served: Served, param: str) -> None:
    """Every id exists in the vocabulary."""
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < served.vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < served.vocab_size)
        raise InvalidRequest(
            f"Token id {wrong} in `{param}` is out of range.",
            hint=f"Ids go from 0 to {served.vocab_size - 1}.",
            param=param,
        )


def chat_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates expect them: text parts joined by line breaks, `developer` as `system`."""
    plain = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": text, **({"name": message.name} if message.name else {})})
    return plain


def plan_chat(
    body: ChatRequest, prompt_tokens: list[int], served: Served, caller: Caller, call_id: str, seed: int
) -> CallPlan:
    """`seed` is used where the body gives none. Raises RequestErrors naming the field."""
    asked, output_param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, output_param = body.max_tokens, "max_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    maker = _Maker(body, served, caller, call_id, seed, "messages", output_param, asked)
    return _plan(maker, [prompt_tokens], maker.sampling_of(logprobs))


def plan_completion(
    body: CompletionRequest,
    prompts_tokens: list[list[int]],
    echo_texts: list[str],
    served: Served,
    caller: Caller,
    call_id: str,
    seed: int,
) -> CallPlan:
    """As `plan_chat`, for one or many prompts; `echo_texts` are empty unless the prompts are echoed."""
    asked = COMPLETION_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens
    maker = _Maker(body, served, caller, call_id, seed, "prompt", "max_tokens", asked)
    scores_prompt = bool(body.echo) and body.logprobs is not None
    return _plan(maker, prompts_tokens, maker.sampling_of(body.logprobs, scores_prompt), echo_texts)


def derive_seed(seed: int, index: int) -> int:
    """A stream of its own for each choice: 63 bits of a hash of (seed, index)."""
    digest = hashlib.blake2b(
        seed.to_bytes(9, "little", signed=True), digest_size=8, salt=index.to_bytes(8, "little")
    )
    return int.from_bytes(digest.digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class _Maker:
    """What all requests of one call have in common."""

    body: Generation
    served: Served
    caller: Caller
    call_id: str
    seed: int
    prompt_param: str
    output_param: str
    asked_tokens: int | None

    def sampling_of(self, logprobs: int | None, scores_prompt: bool = False) -> SamplingParams:
        body = self.body
        return SamplingParams(
            temperature=_or(body.temperature, 1.0),
            top_p=_or(body.top_p, 1.0),
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            logit_bias=body.logit_bias or (),
            logprobs=logprobs,
            prompt_logprobs=scores_prompt,
            seed=self.seed if body.seed is None else body.seed,
        )

    def make(self, tokens: list[int], index: int, leader_id: str | None, sampling: SamplingParams) -> Request:
        body = self.body
        output_tokens = fit_output(
            len(tokens),
            self.asked_tokens,
            self.served.capacity,
            prompt_param=self.prompt_param,
            output_param=self.output_param,
        )
        min_tokens = body.min_tokens or 0
        if min_tokens > output_tokens:
            raise InvalidRequest(
                f"`min_tokens` is {min_tokens}, but at most {output_tokens} tokens may be generated.",
                param="min_tokens",
            )
        eos_ids = frozenset() if body.ignore_eos else self.served.eos_ids
        return Request(
            id=f"{self.call_id}-{index}",
            prompt_len=len(tokens),
            max_output_tokens=output_tokens,
            arrival_s=self.caller.arrival_s,
            prompt_tokens=tokens,
            min_output_tokens=min_tokens,
            stop_token_ids=eos_ids | frozenset(body.stop_token_ids or ()),
            sampling=sampling,
            tenant=self.caller.tenant,
            slo_class=self.caller.slo_class,
            priority=body.priority or 0,
            session_id=body.session_id,
            program_id=self.caller.turn.program_id,
            is_last_turn=self.caller.turn.is_last,
            tool=self.caller.turn.tool,
            pin_s=self.caller.turn.pin_s,
            cache_salt=body.cache_salt or "",
            leader_id=leader_id,
        )


def _plan(
    maker: _Maker, prompts: list[list[int]], sampling: SamplingParams, echo_texts: Sequence[str] = ()
) -> CallPlan:
    body = maker.body
    choice_count = body.n or 1
    requests = []
    for prompt_index, tokens in enumerate(prompts):
        if not tokens:
            raise InvalidRequest("The prompt is empty.", param=maker.prompt_param)
        check_token_ids(tokens, maker.served, maker.prompt_param)
        first = prompt_index * choice_count
        for index in range(first, first + choice_count):
            leader_id = None if index == first else f"{maker.call_id}-{first}"
            requests.append(maker.make(tokens, index, leader_id, _reseed(sampling, index)))
    options = body.stream_options
    return CallPlan(
        id=maker.call_id,
        requests=requests,
        choices_per_prompt=choice_count,
        stops=tuple(body.stop or ()),
        is_stream=bool(body.stream),
        has_usage_chunk=bool(options and options.include_usage),
        echo_texts=list(echo_texts),
        continues_prompt=isinstance(body, CompletionRequest),
    )


def _reseed(sampling: SamplingParams, index: int) -> SamplingParams:
    return replace(sampling, seed=derive_seed(sampling.seed, index))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
