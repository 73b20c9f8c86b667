"""The request bodies: OpenAI's protocol, and our extensions under one key. All numbers have ranges, all texts limits.

What would change the response and is not implemented is refused by name, as are unknown fields. What changes nothing is
accepted: null or an empty list for whatever is optional, values that mean «off», and the fields named in `ignored`.
Lists are validated up to their first error and objects have a size: a body with a million errors would otherwise
produce a million messages.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from fathom.serve.schema_limits import check_schema

MAX_CHOICES = 16
MAX_STOPS = 8
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_PARTS = 256
MAX_PROMPTS = 64
MAX_TOOLS = 64
MAX_FIELDS = 64
"""Of one object."""
MAX_PROMPT_TOKENS = 1 << 18
"""The context length is far less."""
MAX_TEXT_CHARS = 4_000_000
"""The context length is far less."""


def _at_most(value: Any, most: int) -> Any:
    if isinstance(value, dict) and len(value) > most:
        raise ValueError(f"an object has {len(value)} fields; the limit is {most}")
    return value


_TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
_TokenIds = Annotated[list[_TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS)]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
_Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(lambda value: _at_most(value, MAX_BIASES)),
    Field(max_length=MAX_BIASES),
]
Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, value: Any) -> Any:
        if not isinstance(_at_most(value, MAX_FIELDS), dict):
            return value
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        return {
            name: given
            for name, given in value.items()
            if name in required or not (given is None or given == [] or name in cls.ignored)
        }


def refuse_media(value: Any) -> Any:
    """Raises ValueError for a part of a message that is no text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and any(name in kind for name in ("image", "audio", "video", "file", "document")):
        raise ValueError(f"the type is {kind[:40]!r}, but this model takes text alone")
    return value


class StreamOptions(Body):
    ignored = frozenset(("include_obfuscation",))
    include_usage: bool = False
    continuous_usage_stats: bool = Field(default=False, description="The usage so far in every chunk, as in vLLM.")


class Extension(Body):
    """Additional facts in the response, under `fathom` keys."""

    routing: bool = Field(
        default=False, description="The experts of every token in each MoE layer, with their weights."
    )
    drafts: bool = Field(default=False, description="The tokens one by one, and which of them were accepted drafts.")
    timing: bool = Field(
        default=False, description="Queueing, first token, throughput, tokens per forward pass, acceptance rate."
    )


class Sampling(Body):
    """What the endpoints that generate text have in common."""

    ignored = frozenset(
        (
            *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id"),
            *(
                "prompt_cache_key",
                "prompt_cache_retention",
                "prompt_cache_options",
                "cache_salt",
                "prediction",
                "verbosity",
            ),
            "spaces_between_special_tokens",
        )
    )

    model: Annotated[str, StringConstraints(max_length=512)] | None = Field(None, description="The served name.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, strict=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2, description="0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31, strict=True, description="0 or -1: no limit.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1e-4, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: _Biases = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, strict=True)
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(fail_fast=True)] = Field(default_factory=list, max_length=MAX_STOPS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, lt=2**31, strict=True)
    best_of: int | None = Field(None, ge=1, strict=True, description="Choices are not ranked: only n, or 1.")
    use_beam_search: Literal[False] = False
    length_penalty: float = Field(1.0, ge=1, le=1)
    skip_special_tokens: Literal[True] = True
    include_stop_str_in_output: Literal[False] = False
    priority: Literal[0] = 0
    fathom: Extension = Extension()

    @model_validator(mode="after")
    def _streams(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given, but stream is not true")
        if self.best_of not in (None, 1, self.n):
            raise ValueError(f"best_of is {self.best_of}; choices are not ranked, so it must be n or 1")
        for token in self.logit_bias:
            if not token.isascii() or not token.isdigit() or len(token) > 9:
                raise ValueError(f"logit_bias has {token[:20]!r}; it must map token ids to biases")
        return self

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: (
        Text
        | _TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, token ids, or several of either. A text is preceded by the BOS token.")
    suffix: Text = Field("", description="The model fills in between prompt and suffix (FIM).")
    max_tokens: int = Field(16, ge=0, lt=2**31, strict=True, description="0 only with echo.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, strict=True)
    echo: bool = Field(False, description="Return the prompt too, with its log-probabilities if logprobs is given.")

    @model_validator(mode="after")
    def _echoes(self) -> "CompletionRequest":
        if self.echo and self.stream:
            raise ValueError("echo and stream cannot both be true")
        if self.suffix and not isinstance(self.prompt, str):
            raise ValueError("suffix is given; prompt must then be one text")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0; it must be at least 1 without echo")
        return self


class Excerpt(Body):
    ignored = frozenset(("filename", "time"))
    text: Text


class InfillRequest(Sampling):
    """POST /infill, llama.cpp's for editors: what comes behind input_prefix and prompt, before input_suffix."""

    ignored = Sampling.ignored | {
        *("cache_prompt", "id_slot", "n_indent", "response_fields", "samplers", "t_max_predict_ms", "t_max_prompt_ms")
    }

    input_prefix: Text = ""
    input_suffix: Text = ""
    prompt: Text = Field("", description="The beginning of the line to complete.")
    input_extra: list[Excerpt] = Field([], max_length=MAX_PARTS, description="Of other files, put in front.")
    n_predict: int = Field(-1, ge=-1, lt=2**31, strict=True, description="-1: until the model ends it.")
    n: Literal[1] = 1  # type: ignore[assignment]


class TextPart(Body):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return refuse_media(value)


class CalledFunction(Body):
    name: Name
    arguments: Text


class Call(Body):
    id: Annotated[str, StringConstraints(max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction
    ignored = frozenset(("index",))


class Message(Body):
    """Also as a response has it: its `model_dump()` is the history of the next request."""

    ignored = frozenset(("annotations",))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None
    reasoning_content: Text | None = Field(None, description="For templates that show earlier reasoning.")
    reasoning: Text | None = Field(None, description="Another name of it.")

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        instead = self.tool_calls or self.reasoning_content or self.reasoning
        if self.content is None and not (self.role == "assistant" and instead):
            raise ValueError(
                "content is missing; only an assistant's message with tool_calls or reasoning may be without"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the content as one text."""
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        reasoning = self.reasoning_content or self.reasoning
        calls = [call.model_dump() for call in self.tool_calls or []]
        given = {"name": self.name, "reasoning_content": reasoning, "tool_call_id": self.tool_call_id}
        return said | {key: value for key, value in (given | {"tool_calls": calls}).items() if value}


_Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class Function(Body):
    name: Name
    description: Annotated[str, StringConstraints(max_length=16384)] | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: Name


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class Schema(Body):
    name: Name = "answer"
    description: Annotated[str, StringConstraints(max_length=16384)] | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _matches(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only then")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: _Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, strict=True)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = Field(True, description="False: one call at most.")
    chat_template_kwargs: dict[str, JsonValue] = Field({}, description="Only names that the template reads.")
    reasoning_effort: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="For templates that read it."
    )
    add_generation_prompt: bool = Field(True, description="False only with continue_final_message.")
    continue_final_message: bool = Field(False, description="Continue the last message, an assistant's.")
    modalities: list[Literal["text"]] = Field(["text"], max_length=1)
    function_call: Literal["none", "auto"] = "none"
    echo: Literal[False] = False

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given, but logprobs is not true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice is given without tools")
        if not self.add_generation_prompt and not self.continue_final_message:
            raise ValueError("add_generation_prompt is false, but continue_final_message is not true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message is true, but the last message is not an assistant's")
        check_schema(self.chat_template_kwargs, "chat_template_kwargs")
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools or []]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}; tools has {', '.join(names)}")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and self.chosen_tools():
            raise ValueError("response_format and tools cannot both constrain the output; set tool_choice to none")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        for tool in self.tools or []:
            check_schema(tool.function.parameters or {}, f"the parameters of {tool.function.name}")
        if self.response_format is not None and self.response_format.json_schema is not None:
            check_schema(self.response_format.json_schema.schema_, "json_schema")
        return self

    def chosen_tools(self) -> list[dict[str, Any]]:
        """The functions that the model may call."""
        if self.tools is None or self.tool_choice == "none":
            return []
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        return [
            tool.model_dump(exclude_none=True) for tool in self.tools if wanted is None or tool.function.name == wanted
        ]


class TokenizeRequest(Body):
    """POST /tokenize"""

    model: Annotated[str, StringConstraints(max_length=512)] | None = None
    prompt: Text | None = None
    messages: _Messages | None = None
    add_special_tokens: bool = Field(True, description="Put the BOS token in front of a prompt.")

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: Annotated[str, StringConstraints(max_length=512)] | None = None
    tokens: Annotated[list[_TokenId], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]
