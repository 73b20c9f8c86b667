"""From a request's body to requests of the engine, and from what they bring to an answer, whole or in chunks."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.data.chat import ChatError, ChatTemplate
from fathom.data.tokenizer import Tokenizer
from fathom.infer.engine import Engine, Request
from fathom.infer.sampler import SamplingParams
from fathom.infer.scheduler import QueueFull
from fathom.serve.answer import Choice, Piece, chat_logprobs, completion_logprobs
from fathom.serve.errors import ApiError
from fathom.serve.grammar import GrammarError, Grammars
from fathom.serve.metrics import Metrics
from fathom.serve.protocol import ChatRequest, CompletionRequest, Sampling
from fathom.serve.tools import call_in, in_words
from fathom.serve.worker import EngineDiedError, Event, Job, Worker

_RETRY_SECONDS = 2

_HOLE = "\x00text\x00"
"""No name of a model holds it."""


@dataclass
class Plan:
    """What a body asks of the engine and of the answer."""

    body: Sampling
    requests: list[Request]
    chat: bool
    top: int | None
    """How many alternatives the answer reports for each token; None: no logprobs."""
    calls: bool = False
    """Whether the answer may call functions."""
    echo: bool = False
    silent: bool = False
    """Nothing was to be generated (max_tokens is 0); the engine makes one token all the same."""
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """One model behind the protocol."""

    def __init__(self, engine: Engine, worker: Worker, name: str, deadline: float) -> None:
        """`name`: the model's, in answers. `deadline`: seconds that a request may take. The engine has a tokenizer."""
        assert engine.tokenizer is not None
        self.tokenizer: Tokenizer = engine.tokenizer
        self.worker = worker
        self.metrics = Metrics(worker)
        self.name = name
        self._deadline = deadline
        self._engine = engine
        self._context = engine.core.max_length
        self._vocabulary = engine.core.config.vocab_size
        self._grammars = Grammars(self.tokenizer, self._vocabulary)
        self.template: ChatTemplate | None
        try:
            self.template = ChatTemplate(self.tokenizer)
            self.no_chat = ""
        except ChatError as error:
            self.template, self.no_chat = None, str(error)

    # What follows up to `open` may take long for long texts: call it in another thread than the event loop's.

    def plan_completion(self, body: CompletionRequest) -> Plan:
        """Raises ApiError for what cannot be served."""
        self._check_name(body.model)
        one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        prompts: Any = [body.prompt] if one else body.prompt
        top = body.logprobs
        limit = 16 if body.max_tokens is None else body.max_tokens
        shown = top if body.echo else None
        encoded = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        requests = [
            self._request(body, ids, max(limit, 1), top, shown, place * body.n + choice, None, "prompt")
            for place, ids in enumerate(encoded)
            for choice in range(body.n)
        ]
        return Plan(body, requests, False, top, echo=body.echo, silent=limit == 0)

    def plan_chat(self, body: ChatRequest) -> Plan:
        """Raises ApiError for what cannot be served."""
        self._check_name(body.model)
        tools = body.chosen_tools()
        ids = self.encode_chat([message.plain() for message in body.messages], tools)
        grammar = self._grammar(body, tools)
        limit = body.max_completion_tokens or body.max_tokens or max(self._context - len(ids), 1)
        top = (body.top_logprobs or 0) if body.logprobs else None
        requests = [self._request(body, ids, limit, top, None, choice, grammar, "messages") for choice in range(body.n)]
        return Plan(body, requests, True, top, calls=bool(tools))

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        """The conversation's token ids. Raises ApiError where there is no template, or it refuses."""
        if self.template is None:
            raise ApiError(400, self.no_chat, "messages", "no_chat_template")
        try:
            if self.template.knows_tools:
                return self.template.encode(messages, tools or None)
            return self.template.encode(in_words(messages, tools))
        except ChatError as error:
            raise ApiError(400, str(error), "messages") from error

    async def open(self, plan: Plan) -> Job:
        """Hand it to the engine. Raises ApiError for what that refuses."""
        try:
            return await self.worker.submit(plan.requests)
        except QueueFull as error:
            raise ApiError(
                429, "too many requests wait; try again later", code="queue_full", retry_after=_RETRY_SECONDS
            ) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except EngineDiedError as error:
            raise ApiError(503, "the engine has stopped; the server is going down", code="engine_stopped") from error

    def close(self, job: Job) -> None:
        """Whatever became of it: what is left of it ends."""
        self.worker.cancel(job)
        self.metrics.finished(job)

    async def whole(self, plan: Plan, job: Job) -> dict[str, Any]:
        """The answer in one piece. Raises ApiError where it fails."""
        choices = self._choices(plan, job)
        pieces: list[list[Piece]] = [[] for _ in choices]
        routing: list[list[dict[str, Any]]] = [[] for _ in choices]
        async for number, new in self._follow(job, choices):
            pieces[number] += new
            if plan.body.fathom.routing:
                routing[number] += choices[number].routing()
        answer = self._frame(plan, "")
        answer["choices"] = [
            self._whole_choice(plan, number, choice, pieces[number], routing[number])
            for number, choice in enumerate(choices)
        ]
        answer["usage"] = self._usage(plan, job, choices)
        return answer | self._timing(plan, job)

    async def chunks(self, plan: Plan, job: Job) -> AsyncIterator[str]:
        """The answer as it comes, each chunk a JSON text. Raises ApiError where it fails."""
        choices = self._choices(plan, job)
        plain = [self._around_text(plan, number) for number in range(len(choices))]
        calls = ["" if plan.calls else None for _ in choices]
        offsets = [0] * len(choices)
        told = plan.body.stream_options
        if plan.chat:
            for number in range(len(choices)):
                yield as_json(self._chunk(plan, number, {"role": "assistant", "content": ""}, None))
        async for number, new in self._follow(job, choices):
            choice = choices[number]
            held = calls[number]
            text = "".join(piece.text for piece in new)
            if held is not None and (held or text.startswith("{")):
                # It may be a call: that is known at its end.
                calls[number] = text = held + text
                call = call_in(text) if choice.finish_reason == "stop" else None
                if call is not None:
                    yield as_json(self._chunk(plan, number, {"tool_calls": [{"index": 0, **call}]}, "tool_calls"))
                if call is not None or choice.finish_reason is None:
                    continue
            elif held is not None and text:
                calls[number] = None
            extra = self._facts(plan, choice, new, choice.routing() if plan.body.fathom.routing else [])
            if not text and not new and choice.finish_reason is None and not extra.get("fathom", {}).get("routing"):
                continue
            if plan.top is not None:
                extra["logprobs"] = self._logprobs(plan, choice, new, offsets[number])
                offsets[number] += len(text)
            running = self._usage(plan, job, choices) if told is not None and told.continuous_usage_stats else None
            if text and not extra and running is None and choice.finish_reason is None:
                # Nearly all chunks are of this kind, and building them anew would take a third of the time.
                yield as_json(text).join(plain[number])
                continue
            chunk = self._chunk(plan, number, text, choice.finish_reason, extra)
            yield as_json(chunk if running is None else chunk | {"usage": running})
        last = self._timing(plan, job)
        if told is not None and told.include_usage:
            last["usage"] = self._usage(plan, job, choices)
        if last:
            yield as_json(self._frame(plan, ".chunk" if plan.chat else "") | {"choices": []} | last)

    async def _follow(self, job: Job, choices: list[Choice]) -> AsyncIterator[tuple[int, list[Piece]]]:
        """The pieces of each choice as they come, until all are over."""
        late = ApiError(408, f"the answer was not complete after {self._deadline:g} s", code="deadline")
        left = job.submitted + self._deadline - time.monotonic()
        alarm = asyncio.get_running_loop().call_later(left, job.events.put_nowait, late)
        try:
            while not all(choice.finish_reason is not None for choice in choices):
                for event in await _all_there(job):
                    choice = choices[event.choice]
                    pieces = choice.take(event.tokens, event.finished)
                    if choice.finish_reason in ("error", "cancelled"):
                        why = choice.generation.error or "it was ended"
                        raise ApiError(500, f"the answer could not be completed: {why}")
                    yield event.choice, pieces
        finally:
            alarm.cancel()

    def _request(
        self,
        body: Sampling,
        ids: Sequence[int],
        limit: int,
        top: int | None,
        prompt_top: int | None,
        stream: int,
        grammar: str | None,
        param: str,
    ) -> Request:
        if len(ids) >= self._context:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens; the model takes {self._context}, its answer included",
                param,
                "context_length_exceeded",
            )
        wrong = next((token for token in ids if token >= self._vocabulary), None)
        if wrong is not None:
            raise ApiError(400, f"the prompt has token {wrong}; the vocabulary has {self._vocabulary}", param)
        limit = min(limit, self._context - len(ids))
        try:
            params = SamplingParams(
                temperature=_warm(body.temperature),
                top_k=body.top_k,
                top_p=1.0 if body.top_p is None else body.top_p,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
                seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
                stop_ids=tuple(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
                max_tokens=limit,
                min_tokens=body.min_tokens,
                logprobs=top,
                prompt_logprobs=prompt_top,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        constraint = None if grammar is None else self._grammars.constraint(grammar)
        return Request(ids, params, stream=stream, trace=body.fathom.routing, constraint=constraint)

    def _grammar(self, body: ChatRequest, tools: list[dict[str, Any]]) -> str | None:
        wanted = body.response_format
        try:
            if tools:
                return self._grammars.of_calls(tools, or_text=body.tool_choice in (None, "auto"))
            if wanted is None or wanted.type == "text":
                return None
            if wanted.json_schema is None:
                return self._grammars.of_schema({"type": "object"})
            return self._grammars.of_schema(wanted.json_schema.schema_)
        except GrammarError as error:
            param = "tools" if tools else "response_format"
            raise ApiError(400, f"the schema cannot be followed: {error}", param, "invalid_schema") from error

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(404, f"there is no model {name!r}; there is {self.name!r}", "model", "model_not_found")

    def _choices(self, plan: Plan, job: Job) -> list[Choice]:
        return [Choice(handle, self.tokenizer, plan.body.stops()) for handle in job.handles]

    def _whole_choice(
        self, plan: Plan, number: int, choice: Choice, pieces: list[Piece], routing: list[dict[str, Any]]
    ) -> dict[str, Any]:
        if plan.silent:
            pieces = []
        text = "".join(piece.text for piece in pieces)
        extra = self._facts(plan, choice, pieces, routing)
        reason = "length" if plan.silent else choice.finish_reason
        shown: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if plan.top is not None:
            shown["logprobs"] = self._logprobs(plan, choice, pieces, 0)
        if not plan.chat:
            if plan.echo:
                text = self.tokenizer.decode(choice.generation.prompt_ids) + text
            return shown | {"text": text} | extra
        call = call_in(text) if plan.calls and reason == "stop" else None
        if call is not None:
            said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
            return shown | {"message": said, "finish_reason": "tool_calls"} | extra
        return shown | {"message": {"role": "assistant", "content": text, "refusal": None}} | extra

    def _logprobs(self, plan: Plan, choice: Choice, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        if plan.chat:
            return chat_logprobs(self.tokenizer, choice, pieces)
        tokens = [piece.token for piece in pieces]
        facts: list[Any] = [choice.logprob(piece) for piece in pieces]
        if plan.echo:
            tokens = choice.generation.prompt_ids + tokens
            facts = [None, *(choice.generation.prompt_logprobs or []), *facts]
        return completion_logprobs(self.tokenizer, tokens, facts, offset)

    def _facts(
        self, plan: Plan, choice: Choice, pieces: Sequence[Piece], routing: list[dict[str, Any]]
    ) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if plan.body.fathom.drafts:
            told["tokens"] = [
                {"id": piece.token, "text": piece.text, "drafted": choice.drafted(piece)} for piece in pieces
            ]
        if plan.body.fathom.routing:
            told["routing"] = routing
        return {"fathom": told} if told else {}

    def _frame(self, plan: Plan, suffix: str) -> dict[str, Any]:
        kind, prefix = (f"chat.completion{suffix}", "chatcmpl") if plan.chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{plan.name}", "object": kind, "created": plan.created, "model": self.name}

    def _chunk(
        self,
        plan: Plan,
        number: int,
        said: str | dict[str, Any],
        reason: str | None,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if plan.chat:
            choice["delta"] = ({"content": said} if said else {}) if isinstance(said, str) else said
        else:
            choice["text"] = said
        return self._frame(plan, ".chunk") | {"choices": [choice | (extra or {})]}

    def _around_text(self, plan: Plan, number: int) -> tuple[str, str]:
        """What precedes and follows the text in a chunk that brings nothing else."""
        before, after = as_json(self._chunk(plan, number, _HOLE, None)).split(as_json(_HOLE))
        return before, after

    def _usage(self, plan: Plan, job: Job, choices: Sequence[Choice]) -> dict[str, Any]:
        prompts = job.handles[:: plan.body.n]
        read = sum(len(handle.prompt_ids) for handle in prompts)
        made = 0 if plan.silent else sum(choice.made for choice in choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(handle.cached_tokens for handle in prompts)},
        }

    def _timing(self, plan: Plan, job: Job) -> dict[str, Any]:
        if not plan.body.fathom.timing:
            return {}
        end = job.finished or time.monotonic()
        first = job.first_token or end
        tokens = sum(len(handle.token_ids) for handle in job.handles)
        forwards = sum(handle.forwards for handle in job.handles)
        drafted = sum(sum(handle.offered_at[:1]) for handle in job.handles)
        accepted = sum(sum(handle.accepted_at[:1]) for handle in job.handles)
        started = min((handle.started for handle in job.handles if handle.started is not None), default=end)
        after_first = tokens - len(job.handles)
        timing = {
            "queued_s": round(started - job.submitted, 4),
            "first_token_s": round(first - job.submitted, 4),
            "total_s": round(end - job.submitted, 4),
            "tokens_per_second": round(after_first / (end - first), 2) if end > first else None,
            "tokens_per_forward": round(after_first / forwards, 3) if forwards else None,
            "acceptance": round(accepted / drafted, 4) if drafted else None,
            "cached_tokens": sum(handle.cached_tokens for handle in job.handles),
        }
        return {"fathom": {"timing": timing}}


async def _all_there(job: Job) -> list[Event]:
    """The next event, and what else there is by now: of each choice the last, which tells what the others told.

    Raises ApiError.
    """
    found: dict[int, Event] = {}
    while not found or not job.events.empty():
        event = await job.events.get()
        if isinstance(event, EngineDiedError):
            raise ApiError(503, "the engine has stopped; the server is going down", code="engine_stopped")
        if isinstance(event, Exception):
            raise event
        found[event.choice] = event
    return list(found.values())


as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""As it is sent."""


def _warm(temperature: float | None) -> float:
    """Below what the sampler can divide by, the likeliest token is taken."""
    temperature = 1.0 if temperature is None else temperature
    return temperature if temperature >= 1e-5 else 0.0
