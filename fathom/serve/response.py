"""The response to one request as its choices grow, in OpenAI's format: whole, or in chunks."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fathom.data.tokenizer import Tokenizer
from fathom.engine.detokenizer import OutputToken
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.serve.choice import Choice, chat_logprobs, completion_logprobs
from fathom.serve.engine_thread import Event, Job
from fathom.serve.errors import ApiError
from fathom.serve.message_parser import MessageParser, Part
from fathom.serve.output_format import CallFormat, Reasoning
from fathom.serve.protocol import Sampling, StreamOptions

_PLACEHOLDER = "\x00text\x00"
"""Stands for the text in a chunk; no model's name contains it."""


@dataclass
class Plan:
    """A request body, the engine requests made of it, and what the response must contain."""

    body: Sampling
    requests: list[Request]
    chat: bool
    top: int | None
    """Alternatives per token in the response; None: no logprobs."""
    calls: CallFormat | None = None
    """How the model spells tool calls, if it may call tools."""
    reasoning: Reasoning = "none"
    """Whether the output begins with reasoning."""
    tokenizer: Tokenizer | None = None
    """Spells the output; None: the service's."""
    translation: "Translation | None" = None
    """Into another protocol than chat completions."""
    infill: bool = False
    """In llama.cpp's format, not OpenAI's."""
    echo: bool = False
    silent: bool = False
    """max_tokens is 0; the engine generates one token all the same, which is dropped."""
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


class Translation(Protocol):
    """From a chat completion, whole or in chunks, to another protocol's response."""

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The complete response."""

    def events(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """What a chunk becomes in a stream: events, each named by its `type`."""

    def failure(self, error: ApiError) -> list[dict[str, Any]]:
        """The events that end a stream when something fails."""


Chunk = dict[str, Any] | str
"""A JSON object, or its text."""


class ResponseBuilder:
    """One response. Service.open sets its job and timeout; its plan is set before the engine's first event.

    Either `finished` until it is and then `whole`, or `chunks` until it is over.
    """

    plan: Plan
    job: Job
    timeout: asyncio.TimerHandle
    """Ends it at the deadline."""

    def __init__(self, tokenizer: Tokenizer, model: str) -> None:
        """`model`: its name in responses."""
        self._tokenizer, self._model = tokenizer, model
        self._choices: list[Choice] = []
        self._finished: set[int] = set()

    @property
    def over(self) -> bool:
        """Whether all of its choices are complete."""
        return bool(self._choices) and all(choice.finish_reason is not None for choice in self._choices)

    def finished(self, events: Sequence[Event]) -> bool:
        """Whether all choices are finished with these events. Raises ApiError where one failed."""
        for event in events:
            if event.finished:
                _raise_failure(self.job.generations[event.choice])
                self._finished.add(event.choice)
        return len(self._finished) == len(self.plan.requests)

    def whole(self) -> dict[str, Any]:
        """The complete response. May take long: not for the event loop."""
        self._begin()
        choices = [self._whole_choice(choice) for choice in self._choices]
        if self.plan.infill:
            return self._infill(choices[0]["text"], over=True) | self._timing()
        completion = self._frame("") | {"choices": choices, "usage": self._usage()} | self._timing()
        return completion if self.plan.translation is None else self.plan.translation.whole(completion)

    def chunks(self, events: Sequence[Event]) -> list[str]:
        """New tokens as server-sent events, and once it is over the last. Raises ApiError where a choice failed."""
        chunks: list[Chunk] = []
        if self._begin() and self.plan.chat:
            said = {"role": "assistant", "content": ""}
            chunks += [self._chunk(choice, said, None) | self._running_usage() for choice in self._choices]
        for event in events:
            choice = self._choices[event.choice]
            if choice.finish_reason is None:  # else the engine has not ended it yet
                chunks += self._new_chunks(choice, self._take(event))
        if self.over:
            last = self._timing() | ({"usage": self._usage()} if self._options.include_usage else {})
            if last:
                chunks.append(self._frame(".chunk") | {"choices": []} | last)
        sent = [event for chunk in chunks for event in self._sent(chunk)]
        return [*sent, _DONE] if self.over and self.plan.translation is None else sent

    def failure(self, error: ApiError) -> list[str]:
        """The server-sent events that end a stream when something fails."""
        if self.plan.translation is None:
            return self._sent(error.body())
        return [_named_event(event) for event in self.plan.translation.failure(error)]

    def _sent(self, chunk: Chunk) -> list[str]:
        if self.plan.translation is None:
            return [f"data: {chunk if isinstance(chunk, str) else as_json(chunk)}\n\n"]
        assert not isinstance(chunk, str)
        return [_named_event(event) for event in self.plan.translation.events(chunk)]

    @property
    def _options(self) -> StreamOptions:
        return self.plan.body.stream_options or StreamOptions()

    def _begin(self) -> bool:
        """Whether it begins with this call."""
        if self._choices:
            return False
        body, plan = self.plan.body, self.plan
        each = plan.top is not None or body.fathom.drafts or body.fathom.routing
        for number, generation in enumerate(self.job.generations):
            choice = Choice(generation, plan.tokenizer or self._tokenizer, each, number)
            choice.parser = MessageParser(plan.calls, plan.reasoning) if plan.chat else None
            before, after = as_json(self._chunk(choice, _PLACEHOLDER, None)).split(as_json(_PLACEHOLDER))
            choice.surrounding = (before, after)
            self._choices.append(choice)
        return True

    def _take(self, event: Event) -> list[OutputToken]:
        choice = self._choices[event.choice]
        if event.finished:
            _raise_failure(choice.generation)
        return choice.take(event.tokens, event.finished)

    def _new_chunks(self, choice: Choice, new: list[OutputToken]) -> list[Chunk]:
        text, reason = "".join([output.text for output in new]), choice.finish_reason
        routing = choice.routing() if self.plan.body.fathom.routing else []
        if not new and not routing and reason is None:
            return []
        extra = self._extension(choice, new, routing)
        if self.plan.top is not None:
            extra["logprobs"] = self._logprobs(choice, new)
            choice.offset += len(text)
        running = self._running_usage()
        deltas: list[str | dict[str, Any]] = [text]
        if choice.parser is not None:
            deltas = [_delta(part) for part in choice.parser.feed(text, final=reason is not None)]
        if deltas == [""]:
            deltas = []
        plain = not extra and not running and self.plan.translation is None
        if plain and reason is None and len(deltas) == 1 and isinstance(deltas[0], str):
            # Nearly all chunks are of this kind; serialising each from scratch took a third of the time.
            return [as_json(deltas[0]).join(choice.surrounding)]
        if not deltas and (extra or reason is not None):
            deltas = [""]
        chunks = [self._chunk(choice, delta, None) | running for delta in deltas]
        if chunks:
            chunks[-1] = self._chunk(choice, deltas[-1], self._finish_reason(choice), extra) | running
        return list(chunks)

    def _finish_reason(self, choice: Choice) -> str | None:
        called = choice.parser is not None and choice.parser.num_calls > 0
        return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        plan = self.plan
        taken = choice.take(len(choice.generation.token_ids), finished=True)
        outputs = [] if plan.silent else taken
        text = "".join([output.text for output in outputs])
        shown: dict[str, Any] = {"index": choice.number}
        if choice.parser is None:
            prompt = self._tokenizer.decode(choice.generation.prompt_ids) if plan.echo else ""
            shown["text"] = prompt + text
        else:
            shown["message"] = _message(choice.parser.feed(text, final=True))
        return shown | {
            "finish_reason": "length" if plan.silent else self._finish_reason(choice),
            "stop_reason": _stop_reason(choice),
            "logprobs": None if plan.top is None else self._logprobs(choice, outputs),
            **self._extension(choice, outputs, choice.routing() if plan.body.fathom.routing else []),
        }

    def _logprobs(self, choice: Choice, outputs: Sequence[OutputToken]) -> dict[str, Any]:
        if self.plan.chat:
            return chat_logprobs(self._tokenizer, choice, outputs)
        tokens = [output.token for output in outputs]
        facts: list[Any] = [choice.logprob(output) for output in outputs]
        if self.plan.echo:
            tokens = choice.generation.prompt_ids + tokens
            facts = [None, *(choice.generation.prompt_logprobs or []), *facts]
        return completion_logprobs(self._tokenizer, tokens, facts, choice.offset)

    def _extension(
        self, choice: Choice, outputs: Sequence[OutputToken], routing: list[dict[str, Any]]
    ) -> dict[str, Any]:
        extension: dict[str, Any] = {}
        if self.plan.body.fathom.drafts:
            extension["tokens"] = [
                {"id": output.token, "text": output.text, "drafted": choice.drafted(output)} for output in outputs
            ]
        if self.plan.body.fathom.routing:
            extension["routing"] = routing
        return {"fathom": extension} if extension else {}

    def _frame(self, suffix: str) -> dict[str, Any]:
        plan = self.plan
        kind, prefix = (f"chat.completion{suffix}", "chatcmpl") if plan.chat else ("text_completion", "cmpl")
        return {"id": f"{prefix}-{plan.name}", "object": kind, "created": plan.created, "model": self._model}

    def _chunk(
        self, choice: Choice, said: str | dict[str, Any], reason: str | None, extra: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if self.plan.infill:
            return self._infill(str(said), over=reason is not None) | (extra or {})
        shown: dict[str, Any] = {"index": choice.number, "finish_reason": reason, "logprobs": None}
        if reason is not None:
            shown["stop_reason"] = _stop_reason(choice)
        if not self.plan.chat:
            shown["text"] = said
        elif isinstance(said, str):
            shown["delta"] = {"content": said} if said else {}
        else:
            shown["delta"] = said
        # OpenAI's clients may rely on the key: null in all chunks but the last.
        usage = {"usage": None} if self._options.include_usage else {}
        return self._frame(".chunk") | {"choices": [shown | (extra or {})]} | usage

    def _infill(self, text: str, over: bool) -> dict[str, Any]:
        usage = self._usage() if over else {"prompt_tokens": 0, "completion_tokens": 0}
        counts = {"tokens_evaluated": usage["prompt_tokens"], "tokens_predicted": usage["completion_tokens"]}
        return {"content": text, "stop": over, "model": self._model} | counts

    def _usage(self) -> dict[str, Any]:
        prompts = self.job.generations[:: self.plan.body.n]
        read = sum(len(generation.prompt_ids) for generation in prompts)
        made = 0 if self.plan.silent else sum(choice.num_tokens for choice in self._choices)
        reasoning = sum(choice.reasoning_tokens() for choice in self._choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in prompts)},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _running_usage(self) -> dict[str, Any]:
        """Of a chunk before the last."""
        return {"usage": self._usage()} if self._options.continuous_usage_stats else {}

    def _timing(self) -> dict[str, Any]:
        if not self.plan.body.fathom.timing:
            return {}
        job, generations = self.job, self.job.generations
        end = job.finished or time.monotonic()
        first = job.first_token or end
        started = min((each.started for each in generations if each.started is not None), default=end)
        after_first = sum(len(each.token_ids) - 1 for each in generations)
        forwards = sum(each.forwards for each in generations)
        drafted = sum(sum(each.offered_at[:1]) for each in generations)
        accepted = sum(sum(each.accepted_at[:1]) for each in generations)
        timing = {
            "queued_s": round(started - job.submitted, 4),
            "first_token_s": round(first - job.submitted, 4),
            "total_s": round(end - job.submitted, 4),
            "tokens_per_second": round(after_first / (end - first), 2) if end > first else None,
            "tokens_per_forward": round(after_first / forwards, 3) if forwards else None,
            "acceptance": round(accepted / drafted, 4) if drafted else None,
            "cached_tokens": sum(each.cached_tokens for each in generations),
        }
        return {"fathom": {"timing": timing}}


def _delta(part: Part) -> str | dict[str, Any]:
    """What a part adds to the message: content is text, anything else has a key."""
    if part.kind == "content":
        return part.text
    if part.kind == "reasoning":
        return {"reasoning_content": part.text}
    if part.kind == "arguments":
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
    function = {"name": part.text, "arguments": ""}
    return {"tool_calls": [{"index": part.call, "id": part.call_id, "type": "function", "function": function}]}


def _message(parts: Sequence[Part]) -> dict[str, Any]:
    """The whole of them."""
    texts = {"reasoning": "", "content": ""}
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.kind == "call":
            calls.append({"id": part.call_id, "type": "function", "function": {"name": part.text, "arguments": ""}})
        elif part.kind == "arguments":
            calls[part.call]["function"]["arguments"] += part.text
        else:
            texts[part.kind] += part.text
    content = None if calls and not texts["content"] else texts["content"]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    return message | ({"tool_calls": calls} if calls else {})


def _stop_reason(choice: Choice) -> str | int | None:
    """What ended a choice that stopped: the stop string, or the id of a token other than EOS."""
    return choice.generation.stop_reason if choice.finish_reason == "stop" else None


def _raise_failure(generation: Generation) -> None:
    if generation.finish_reason in ("error", "cancelled"):
        why = generation.error or "it was cancelled"
        status = 400 if why.startswith("GrammarError") else 500  # the request's own fault, or ours
        raise ApiError(status, f"the answer could not be completed: {why}")


def _named_event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {as_json(event)}\n\n"


_DONE = "data: [DONE]\n\n"

as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Compact JSON, as it is sent."""
