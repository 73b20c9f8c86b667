"""The answer to one request as its choices grow, in OpenAI's words: whole, or in chunks."""

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
from fathom.serve.answer import Choice, chat_logprobs, completion_logprobs
from fathom.serve.errors import ApiError
from fathom.serve.protocol import Sampling
from fathom.serve.tools import parse_tool_call
from fathom.serve.worker import Event, Job

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


class Reply:
    """One answer. Service.open sets its job and alarm; its plan is there before the engine brings anything."""

    plan: Plan
    job: Job
    alarm: asyncio.TimerHandle
    """Ends it when it has taken too long."""

    def __init__(self, tokenizer: Tokenizer, model: str) -> None:
        """`model`: its name in answers."""
        self._tokenizer, self._model = tokenizer, model
        self.over = False
        """Whether all of its choices are complete."""
        self._choices: list[Choice] = []
        # Of each choice:
        self._pieces: list[list[OutputToken]] = []
        self._routing: list[list[dict[str, Any]]] = []
        self._around: list[tuple[str, str]] = []
        self._call: list[str | None] = []
        self._offset: list[int] = []

    # Either `collect` until it is over and then `whole`, or `chunks` until then.

    def collect(self, events: Sequence[Event]) -> None:
        """Keep what is new. Raises ApiError where a choice failed."""
        if not self._choices:
            self._begin()
        for event in events:
            self._pieces[event.choice] += self._take(event)
            if self.plan.body.fathom.routing:
                self._routing[event.choice] += self._choices[event.choice].routing()

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        answer = self._frame("")
        answer["choices"] = [self._whole_choice(number) for number in range(len(self._choices))]
        answer["usage"] = self._usage()
        return answer | self._timing()

    def chunks(self, events: Sequence[Event]) -> list[str]:
        """What is new, each chunk a JSON text; the last ones once it is over. Raises ApiError where a choice failed."""
        chunks: list[str] = []
        if not self._choices:
            self._begin()
            if self.plan.chat:
                said = {"role": "assistant", "content": ""}
                chunks += [as_json(self._chunk(number, said, None)) for number in range(len(self._choices))]
        for event in events:
            if self._choices[event.choice].finish_reason is None:  # else the engine has only not heard of it
                chunks += self._new_chunks(event.choice, self._take(event))
        if self.over:
            told, last = self.plan.body.stream_options, self._timing()
            if told is not None and told.include_usage:
                last["usage"] = self._usage()
            if last:
                chunks.append(as_json(self._frame(".chunk" if self.plan.chat else "") | {"choices": []} | last))
        return chunks

    def _begin(self) -> None:
        body = self.plan.body
        each = self.plan.top is not None or body.fathom.drafts or body.fathom.routing
        self._choices = [Choice(handle, self._tokenizer, each) for handle in self.job.handles]
        self._pieces, self._routing = [[] for _ in self._choices], [[] for _ in self._choices]
        self._around = [self._around_text(number) for number in range(len(self._choices))]
        self._call = ["" if self.plan.calls else None for _ in self._choices]
        self._offset = [0] * len(self._choices)

    def _take(self, event: Event) -> list[OutputToken]:
        choice = self._choices[event.choice]
        pieces = choice.take(event.tokens, event.finished)
        if choice.finish_reason in ("error", "cancelled"):
            why = choice.generation.error or "it was ended"
            raise ApiError(500, f"the answer could not be completed: {why}")
        if choice.finish_reason is not None:
            self.over = all(each.finish_reason is not None for each in self._choices)
        return pieces

    def _new_chunks(self, number: int, new: list[OutputToken]) -> list[str]:
        chunks = []
        plan, choice, held = self.plan, self._choices[number], self._call[number]
        told = plan.body.stream_options
        text = "".join([piece.text for piece in new])
        if held is not None and (held or text.startswith("{")):
            # It may be a call: that is known at its end.
            self._call[number] = text = held + text
            call = parse_tool_call(text) if choice.finish_reason == "stop" else None
            if call is not None:
                chunks.append(as_json(self._chunk(number, {"tool_calls": [{"index": 0, **call}]}, "tool_calls")))
            if call is not None or choice.finish_reason is None:
                return chunks
        elif held is not None and text:
            self._call[number] = None
        extra = self._facts(choice, new, choice.routing() if plan.body.fathom.routing else [])
        if not text and not new and choice.finish_reason is None and not extra.get("fathom", {}).get("routing"):
            return chunks
        if plan.top is not None:
            extra["logprobs"] = self._logprobs(choice, new, self._offset[number])
            self._offset[number] += len(text)
        running = self._usage() if told is not None and told.continuous_usage_stats else None
        if text and not extra and running is None and choice.finish_reason is None:
            # Nearly all chunks are of this kind, and building them anew would take a third of the time.
            return [*chunks, as_json(text).join(self._around[number])]
        chunk = self._chunk(number, text, choice.finish_reason, extra)
        return [*chunks, as_json(chunk if running is None else chunk | {"usage": running})]

    def _whole_choice(self, number: int) -> dict[str, Any]:
        plan, choice = self.plan, self._choices[number]
        pieces = [] if plan.silent else self._pieces[number]
        text = "".join([piece.text for piece in pieces])
        extra = self._facts(choice, pieces, self._routing[number])
        reason = "length" if plan.silent else choice.finish_reason
        shown: dict[str, Any] = {"index": number, "finish_reason": reason, "logprobs": None}
        if plan.top is not None:
            shown["logprobs"] = self._logprobs(choice, pieces, 0)
        if not plan.chat:
            if plan.echo:
                text = self._tokenizer.decode(choice.generation.prompt_ids) + text
            return shown | {"text": text} | extra
        call = parse_tool_call(text) if plan.calls and reason == "stop" else None
        if call is not None:
            said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
            return shown | {"message": said, "finish_reason": "tool_calls"} | extra
        return shown | {"message": {"role": "assistant", "content": text, "refusal": None}} | extra

    def _logprobs(self, choice: Choice, pieces: Sequence[OutputToken], offset: int) -> dict[str, Any]:
        if self.plan.chat:
            return chat_logprobs(self._tokenizer, choice, pieces)
        tokens = [piece.token for piece in pieces]
        facts: list[Any] = [choice.logprob(piece) for piece in pieces]
        if self.plan.echo:
            tokens = choice.generation.prompt_ids + tokens
            facts = [None, *(choice.generation.prompt_logprobs or []), *facts]
        return completion_logprobs(self._tokenizer, tokens, facts, offset)

    def _facts(self, choice: Choice, pieces: Sequence[OutputToken], routing: list[dict[str, Any]]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if self.plan.body.fathom.drafts:
            told["tokens"] = [
                {"id": piece.token, "text": piece.text, "drafted": choice.drafted(piece)} for piece in pieces
            ]
        if self.plan.body.fathom.routing:
            told["routing"] = routing
        return {"fathom": told} if told else {}

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

    def _around_text(self, number: int) -> tuple[str, str]:
        """What precedes and follows the text in a chunk that brings nothing else."""
        before, after = as_json(self._chunk(number, _HOLE, None)).split(as_json(_HOLE))
        return before, after

    def _usage(self) -> dict[str, Any]:
        prompts = self.job.handles[:: self.plan.body.n]
        read = sum(len(handle.prompt_ids) for handle in prompts)
        made = 0 if self.plan.silent else sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(handle.cached_tokens for handle in prompts)},
        }

    def _timing(self) -> dict[str, Any]:
        job = self.job
        if not self.plan.body.fathom.timing:
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


as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""As it is sent."""
