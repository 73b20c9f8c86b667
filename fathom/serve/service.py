"""From a request's body to requests of the engine, and their progress."""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from fathom.data.chat_template import ChatError, ChatTemplate
from fathom.data.tokenizer import BOS, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.scheduler import QueueFull
from fathom.serve.engine_thread import EngineDeadError, EngineThread, Event
from fathom.serve.errors import ApiError
from fathom.serve.grammar import GrammarConstraint, GrammarError, Grammars
from fathom.serve.metrics import Metrics
from fathom.serve.no_tokenizer import NoTokenizer
from fathom.serve.output_format import OutputFormat, Reasoning, ReasoningParser
from fathom.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InfillRequest,
    Message,
    Sampling,
    TokenizeRequest,
)
from fathom.serve.response import Plan, ResponseBuilder
from fathom.serve.tools import render_tools

_RETRY_SECONDS = 2

_SLICE = 1 << 14
"""Tokens or characters that are worked on at once."""


_FIM = re.compile(f"(?:{BOS})?{FIM_PREFIX}((?:(?!<｜fim▁).)*){FIM_SUFFIX}((?:(?!<｜fim▁).)*){FIM_MIDDLE}", re.DOTALL)
"""A whole prompt to fill in, as editors spell it. The texts between its control tokens stay texts."""


class Service:
    """One model behind the protocol."""

    def __init__(
        self,
        engine: Engine,
        engine_thread: EngineThread,
        name: str,
        deadline: float,
        reasoning_parser: ReasoningParser = "auto",
    ) -> None:
        """`name`: the model's, in responses. `deadline`: seconds per request."""
        self.tokenizer: Tokenizer = NoTokenizer() if engine.tokenizer is None else engine.tokenizer
        self.engine, self.engine_thread, self.name = engine, engine_thread, name
        self.metrics = Metrics(engine_thread)
        self._deadline = deadline
        self._context = engine.max_length
        self._vocabulary = engine.model.config.vocab_size
        self.template: ChatTemplate | None = None
        try:
            self.template = ChatTemplate(self.tokenizer)
            self.format = OutputFormat(self.template, self.tokenizer, reasoning_parser)
            self._grammars = Grammars(self.tokenizer, self._vocabulary)
        except ChatError as error:
            self._no_chat = ApiError(400, str(error), "messages", "no_chat_template")

    def check_name(self, name: str | None) -> None:
        """Raises ApiError unless `name` is the model's, or None."""
        if name is not None and name != self.name:
            message = f"there is no model {name[:200]!r}; there is {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    # The methods up to `open` may take long for long texts: call them outside the event loop's thread.

    def plan_completion(self, body: CompletionRequest) -> Plan:
        """Raises ApiError for requests that cannot be served."""
        self.check_name(body.model)
        one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        prompts: Any = [body.prompt] if one else body.prompt
        encoded = [self._encode(prompt, body.suffix) if isinstance(prompt, str) else prompt for prompt in prompts]
        prompt_logprobs = body.logprobs if body.echo else None
        requests = self._requests(body, encoded, "prompt", max(body.max_tokens, 1), body.logprobs, prompt_logprobs)
        return Plan(body, requests, False, body.logprobs, echo=body.echo, silent=body.max_tokens == 0)

    def plan_infill(self, body: InfillRequest) -> Plan:
        """Raises ApiError for requests that cannot be served."""
        self.check_name(body.model)
        prefix = "\n\n".join([*(excerpt.text for excerpt in body.input_extra), body.input_prefix + body.prompt])
        self._refuse_long(prefix + body.input_suffix, "input_prefix")
        limit = self._context if body.n_predict < 0 else max(body.n_predict, 1)
        ids = self._fill_in(prefix, body.input_suffix)
        return Plan(body, self._requests(body, [ids], "input_prefix", limit, None), False, None, infill=True)

    def plan_chat(self, body: ChatRequest) -> Plan:
        """Raises ApiError for requests that cannot be served."""
        self.check_name(body.model)
        tools, continued = body.chosen_tools(), body.continue_final_message
        ids = self._encode_chat(body.messages, tools, self._template_variables(body), continued)
        last = str(body.messages[-1].plain()["content"]) if continued else None
        reasoning = self.format.reasoning(ids, last)
        constraints = self._constraints(body, tools, reasoning)
        limit = body.max_completion_tokens or body.max_tokens or self._context
        top = body.top_logprobs if body.logprobs else None
        requests = self._requests(body, [ids], "messages", limit, top, constraints=constraints)
        calls = self.format.calls if tools else None
        return Plan(body, requests, True, top, calls, reasoning, self.format.tokenizer)

    def count_chat(self, body: ChatRequest) -> int:
        """The number of tokens of a conversation with its tools. Raises ApiError where the template refuses it."""
        self.check_name(body.model)
        continued = body.continue_final_message
        return len(self._encode_chat(body.messages, body.chosen_tools(), self._template_variables(body), continued))

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The token ids of a text or of a conversation. Raises ApiError where the template refuses it."""
        if body.messages is not None:
            return self._encode_chat(body.messages, [])
        return self.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens)

    def detokenize(self, body: DetokenizeRequest) -> str:
        """The text of token ids."""
        # In slices, between which other threads run.
        slices = (body.tokens[start : start + _SLICE] for start in range(0, len(body.tokens), _SLICE))
        return b"".join(map(self.tokenizer.text_bytes, slices)).decode(errors="replace")

    def _encode(self, text: str, suffix: str) -> list[int]:
        """A prompt's token ids: BOS and the text, or what DeepSeek's models are to fill in."""
        self._refuse_long(text + suffix, "prompt")
        if suffix:
            return self._fill_in(text, suffix)
        spelled = _FIM.fullmatch(text)
        return self._fill_in(*spelled.groups()) if spelled else self.tokenizer.encode(text)

    def _fill_in(self, prefix: str, suffix: str) -> list[int]:
        first, second, third = self.tokenizer.fim_prefix_id, self.tokenizer.fim_suffix_id, self.tokenizer.fim_middle_id
        if first is None or second is None or third is None:
            raise ApiError(
                400, "the model's tokenizer has no tokens to fill in by, so a suffix cannot be given", "suffix"
            )
        before, after = self.tokenizer.encode_batch([prefix, suffix])
        return [self.tokenizer.bos_id, first, *before, second, *after, third]

    def _refuse_long(self, text: str, param: str) -> None:
        """Raises ApiError for what is far longer than the context, without tokenising it to its end."""
        tokens = 0
        for start in range(0, len(text) - _SLICE, _SLICE):
            # Where the text is cut, a word may become several tokens more.
            tokens += max(len(self.tokenizer.encode(text[start : start + _SLICE], bos=False)) - 64, 0)
            if tokens > self._context:
                message = f"the prompt has more than {tokens} tokens; the context length is {self._context}"
                raise ApiError(400, message, param, "context_length_exceeded")

    def _template_variables(self, body: ChatRequest) -> dict[str, Any]:
        known = frozenset() if self.template is None else self.template.variables
        unknown = body.chat_template_kwargs.keys() - known
        if unknown:
            reads = f"the template reads {', '.join(sorted(known)) or 'none'}"
            raise ApiError(400, f"chat_template_kwargs has {min(unknown)[:64]!r}; {reads}", "chat_template_kwargs")
        effort = {"reasoning_effort": body.reasoning_effort} if body.reasoning_effort else {}
        return {name: value for name, value in effort.items() if name in known} | body.chat_template_kwargs

    def _encode_chat(
        self,
        conversation: Sequence[Message],
        tools: list[dict[str, Any]],
        variables: dict[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        messages = [message.plain() for message in conversation]
        if self.template is None:
            raise self._no_chat
        self._refuse_long("\n".join(message["content"] or "" for message in messages), "messages")
        try:
            if self.template.supports_tools:
                return self.template.encode(messages, tools or None, variables, continue_final)
            return self.template.encode(render_tools(messages, tools), None, variables, continue_final)
        except ChatError as error:
            raise ApiError(400, str(error), "messages") from error

    def open(self, make: Callable[[], Plan], size: int) -> ResponseBuilder:
        """Run `make` in another thread and submit the plan's requests; `next_events` reports their progress.

        `size`: bytes of the body that it reads.

        Call it, and the methods below, in the event loop; every response must be closed.
        """
        reply = ResponseBuilder(self.tokenizer, self.name)

        def prepare() -> list[Request]:
            reply.plan = make()
            return reply.plan.requests

        reply.job = self.engine_thread.open(prepare, size)
        deadline = ApiError(408, f"the response was not complete after {self._deadline:g} s", code="deadline")
        reply.timeout = asyncio.get_running_loop().call_later(self._deadline, reply.job.notify, deadline)
        return reply

    async def next_events(self, reply: ResponseBuilder) -> list[Event]:
        """Wait for the engine's events. Raises ApiError for requests that cannot be served, and where one fails."""
        try:
            return await reply.job.next_events()
        except QueueFull as error:
            message = "too many requests are waiting; try again later"
            raise ApiError(429, message, code="queue_full", retry_after=_RETRY_SECONDS) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except EngineDeadError as error:
            raise ApiError(503, "the engine has stopped; the server is going down", code="engine_stopped") from error

    def close(self, reply: ResponseBuilder) -> None:
        """Cancel what is left of it, and record its times."""
        reply.timeout.cancel()
        self.engine_thread.close(reply.job)
        self.metrics.finished(reply.job)

    def _requests(
        self,
        body: Sampling,
        prompts: Sequence[Sequence[int]],
        param: str,
        limit: int,
        top: int | None,
        prompt_top: int | None = None,
        constraints: Sequence[GrammarConstraint | None] = (),
    ) -> list[Request]:
        """`body.n` for each prompt. `param`: the prompts' field; `top`, `prompt_top`: alternatives a token."""
        queue = self.engine.config.max_waiting
        if queue is not None and len(prompts) * body.n > queue:
            message = f"{len(prompts)} prompts of {body.n} choices are {len(prompts) * body.n} requests"
            raise ApiError(400, f"{message}; the queue holds {queue} (--max-waiting)", "n")
        for ids in prompts:
            if len(ids) >= self._context:
                message = f"the prompt has {len(ids)} tokens; the context length is {self._context}"
                raise ApiError(400, f"{message}, the completion included", param, "context_length_exceeded")
            wrong = next((token for token in ids if token >= self._vocabulary), None)
            if wrong is not None:
                raise ApiError(400, f"the prompt has token {wrong}; the vocabulary has {self._vocabulary}", param)
        params = SamplingParams(
            # Too small for the sampler to divide by is greedy.
            temperature=body.temperature if body.temperature >= 1e-5 else 0.0,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias={int(token): bias for token, bias in body.logit_bias.items()},
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
            stop_ids=tuple(body.stop_token_ids),
            stop=body.stops(),
            ignore_eos=body.ignore_eos,
            max_tokens=limit,
            min_tokens=body.min_tokens,
            logprobs=top,
            prompt_logprobs=prompt_top,
        )
        each = [ids for ids in prompts for _ in range(body.n)]
        return [
            Request(
                ids,
                replace(params, max_tokens=min(limit, self._context - len(ids))),
                stream=stream,
                return_routed_experts=body.fathom.routing,
                return_routing_weights=body.fathom.routing,
                constraint=constraint,
            )
            for stream, (ids, constraint) in enumerate(zip_longest(each, constraints))
        ]

    def _constraints(
        self, body: ChatRequest, tools: list[dict[str, Any]], reasoning: Reasoning
    ) -> list[GrammarConstraint]:
        """One for each choice; none where the output is free."""
        wanted, grammars = body.response_format, self._grammars
        if not tools and (wanted is None or wanted.type == "text"):
            return []
        try:
            if wanted is None or tools:
                free = body.tool_choice in (None, "auto")
                grammar = grammars.of_calls(self.format.calls, tools, free, body.parallel_tool_calls, reasoning)
            else:
                schema = wanted.json_schema
                grammar = grammars.of_schema({"type": "object"} if schema is None else schema.schema_, reasoning)
            return grammars.constraints(grammar, body.n)
        except GrammarError as error:
            param = "tools" if tools else "response_format"
            raise ApiError(400, f"the schema cannot be followed: {error}", param, "invalid_schema") from error
