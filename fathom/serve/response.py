"""The response to one request as its choices grow, in OpenAI's format: whole, or in chunks."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.data.tokenizer import Tokenizer
from fathom.engine.detokenizer import OutputToken
from fathom.engine.request import Request
from fathom.serve.choice import Choice, chat_logprobs, completion_logprobs
from fathom.serve.engine_thread import Event, Job
from fathom.serve.errors import ApiError
from fathom.serve.protocol import Sampling
from fathom.serve.tools import parse_tool_call

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
    calls: bool = False
    """Whether the model may call tools."""
    echo: bool = False
    silent: bool = False
    """max_tokens is 0; the engine generates one token all the same, which is dropped."""
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


class ResponseBuilder:
    """One response. Service.open sets its job and timeout; its plan is set before the engine's first event."""

    plan: Plan
    job: Job
    timeout: asyncio.TimerHandle
    """Ends it at the deadline."""

    def __init__(self, tokenizer: Tokenizer, model: str) -> None:
        """`model`: its name in responses."""
        self._tokenizer, self._model = tokenizer, model
        self.over = False
        """Whether all of its choices are complete."""
        self._choices: list[Choice] = []
        # Of each choice:
        self._outputs: list[list[OutputToken]] = []
        self._routing: list[list[dict[str, Any]]] = []
        self._surrounding: list[tuple[str, str]] = []
        self._call: list[str | None] = []
        self._offset: list[int] = []

    # Either `collect` until it is over and then `whole`, or `chunks` until then.

    def collect(self, events: Sequence[Event]) -> None:
        """Add new tokens. Raises ApiError where a choice failed."""
        if not self._choices:
            self._begin()
        for event in events:
            self._outputs[event.choice] += self._take(event)
            if self.plan.body.fathom.routing:
                self._routing[event.choice] += self._choices[event.choice].routing()

    def whole(self) -> dict[str, Any]:
        """The complete response."""
        answer = self._frame("")
        answer["choices"] = [self._whole_choice(number) for number in range(len(self._choices))]
        answer["usage"] = self._usage()
        return answer | self._timing()

    def chunks(self, events: Sequence[Event]) -> list[str]:
        """New tokens as chunks of JSON, and once it is over the last ones. Raises ApiError where a choice failed."""
        chunks: list[str] = []
        if not self._choices:
            self._begin()
            if self.plan.chat:
                said = {"role": "assistant", "content": ""}
                chunks += [as_json(self._chunk(number, said, None)) for number in range(len(self._choices))]
        for event in events:
            if self._choices[event.choice].finish_reason is None:  # else the engine has not ended it yet
                chunks += self._new_chunks(event.choice, self._take(event))
        if self.over:
            options, last = self.plan.body.stream_options, self._timing()
            if options is not None and options.include_usage:
                last["usage"] = self._usage()
            if last:
                chunks.append(as_json(self._frame(".chunk" if self.plan.chat else "") | {"choices": []} | last))
        return chunks

    def _begin(self) -> None:
        body = self.plan.body
        each = self.plan.top is not None or body.fathom.drafts or body.fathom.routing
        self._choices = [Choice(generation, self._tokenizer, each) for generation in self.job.generations]
        self._outputs, self._routing = [[] for _ in self._choices], [[] for _ in self._choices]
        self._surrounding = [self._surrounding_json(number) for number in range(len(self._choices))]
        self._call = ["" if self.plan.calls else None for _ in self._choices]
        self._offset = [0] * len(self._choices)

    def _take(self, event: Event) -> list[OutputToken]:
        choice = self._choices[event.choice]
        outputs = choice.take(event.tokens, event.finished)
        if choice.finish_reason in ("error", "cancelled"):
            why = choice.generation.error or "it was cancelled"
            raise ApiError(500, f"the answer could not be completed: {why}")
        if choice.finish_reason is not None:
            self.over = all(each.finish_reason is not None for each in self._choices)
        return outputs

    def _new_chunks(self, number: int, new: list[OutputToken]) -> list[str]:
        chunks = []
        plan, choice, held = self.plan, self._choices[number], self._call[number]
        options = plan.body.stream_options
        text = "".join([output.text for output in new])
        if held is not None and (held or text.startswith("{")):
            # Perhaps a tool call, which only its end decides.
            self._call[number] = text = held + text
            call = parse_tool_call(text) if choice.finish_reason == "stop" else None
            if call is not None:
                chunks.append(as_json(self._chunk(number, {"tool_calls": [{"index": 0, **call}]}, "tool_calls")))
            if call is not None or choice.finish_reason is None:
                return chunks
        elif held is not None and text:
            self._call[number] = None
        extra = self._extension(choice, new, choice.routing() if plan.body.fathom.routing else [])
        if not text and not new and choice.finish_reason is None and not extra.get("fathom", {}).get("routing"):
            return chunks
        if plan.top is not None:
            extra["logprobs"] = self._logprobs(choice, new, self._offset[number])
            self._offset[number] += len(text)
        running = self._usage() if options is not None and options.continuous_usage_stats else None
        if text and not extra and running is None and choice.finish_reason is None:
            # Nearly all chunks are of this kind; serialising each from scratch took a third of the time.
            return [*chunks, as_json(text).join(self._surrounding[number])]
        chunk = self._chunk(number, text, choice.finish_reason, extra)
        return [*chunks, as_json(chunk if running is None else chunk | {"usage": running})]

    def _whole_choice(self, number: int) -> dict[str, Any]:
        plan, choice = self.plan, self._choices[number]
        outputs = [] if plan.silent else self._outputs[number]
        text = "".join([output.text for output in outputs])
        extra = self._extension(choice, outputs, self._routing[number])
        reason = "length" if plan.silent else choice.finish_reason
        shown: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if plan.top is not None:
            shown["logprobs"] = self._logprobs(choice, outputs, 0)
        if not plan.chat:
            if plan.echo:
                text = self._tokenizer.decode(choice.generation.prompt_ids) + text
            return shown | {"text": text} | extra
        call = parse_tool_call(text) if plan.calls and reason == "stop" else None
        if call is not None:
            said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
            return shown | {"message": said, "finish_reason": "tool_calls"} | extra
        return shown | {"message": {"role": "assistant", "content": text, "refusal": None}} | extra

    def _logprobs(self, choice: Choice, outputs: Sequence[OutputToken], offset: int) -> dict[str, Any]:
        if self.plan.chat:
            return chat_logprobs(self._tokenizer, choice, outputs)
        tokens = [output.token for output in outputs]
        facts: list[Any] = [choice.logprob(output) for output in outputs]
        if self.plan.echo:
            tokens = choice.generation.prompt_ids + tokens
            facts = [None, *(choice.generation.prompt_logprobs or []), *facts]
        return completion_logprobs(self._tokenizer, tokens, facts, offset)

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
        self, number: int, said: str | dict[str, Any], reason: str | None, extra: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if self.plan.chat:
            choice["delta"] = ({"content": said} if said else {}) if isinstance(said, str) else said
        else:
            choice["text"] = said
        return self._frame(".chunk") | {"choices": [choice | (extra or {})]}

    def _surrounding_json(self, number: int) -> tuple[str, str]:
        """The JSON before and after the text in a chunk that holds nothing else."""
        before, after = as_json(self._chunk(number, _PLACEHOLDER, None)).split(as_json(_PLACEHOLDER))
        return before, after

    def _usage(self) -> dict[str, Any]:
        prompts = self.job.generations[:: self.plan.body.n]
        read = sum(len(generation.prompt_ids) for generation in prompts)
        made = 0 if self.plan.silent else sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in prompts)},
        }

    def _timing(self) -> dict[str, Any]:
        job = self.job
        if not self.plan.body.fathom.timing:
            return {}
        end = job.finished or time.monotonic()
        first = job.first_token or end
        tokens = sum(len(generation.token_ids) for generation in job.generations)
        forwards = sum(generation.forwards for generation in job.generations)
        drafted = sum(sum(generation.offered_at[:1]) for generation in job.generations)
        accepted = sum(sum(generation.accepted_at[:1]) for generation in job.generations)
        started = min(
            (generation.started for generation in job.generations if generation.started is not None), default=end
        )
        after_first = tokens - len(job.generations)
        timing = {
            "queued_s": round(started - job.submitted, 4),
            "first_token_s": round(first - job.submitted, 4),
            "total_s": round(end - job.submitted, 4),
            "tokens_per_second": round(after_first / (end - first), 2) if end > first else None,
            "tokens_per_forward": round(after_first / forwards, 3) if forwards else None,
            "acceptance": round(accepted / drafted, 4) if drafted else None,
            "cached_tokens": sum(generation.cached_tokens for generation in job.generations),
        }
        return {"fathom": {"timing": timing}}


as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""Compact JSON, as it is sent."""
