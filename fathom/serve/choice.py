"""One choice of a response as it grows: its tokens with their texts, and log-probabilities in OpenAI's format."""

from collections.abc import Sequence
from typing import Any

from fathom.data.tokenizer import Tokenizer
from fathom.engine.detokenizer import OutputStream, OutputToken
from fathom.engine.outputs import Generation
from fathom.engine.sampling.verify import TokenLogprob
from fathom.serve.message_parser import MessageParser
from fathom.serve.output_format import END_THINK

_END = END_THINK.encode()


class Choice(OutputStream):
    """Follows a generation, the `number`-th of its response."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, each: bool, number: int = 0) -> None:
        """`each`: whether the client asks for the tokens one by one."""
        super().__init__(generation, tokenizer, each)
        self._tokenizer = tokenizer
        self.number = number
        self.parser: MessageParser | None = None
        """A chat's."""
        self.offset = 0
        """Characters sent in chunks."""
        self.surrounding = ("", "")
        """The JSON before and after the text in a chunk that holds nothing else."""
        self._routed = 0
        self._reasoned, self._tail, self._thought = 0, b"", False

    def routing(self) -> list[dict[str, Any]]:
        """Routing of released tokens: of those that have been through the model since the last call."""
        experts_LTK, weights_LTK = self.generation.routed_experts, self.generation.routing_weights
        if experts_LTK is None or weights_LTK is None:
            return []
        prompt, first = len(self.generation.prompt_ids), self._routed
        recorded = min(experts_LTK.shape[1], weights_LTK.shape[1])  # the engine may have added tokens between the two
        self._routed = max(first, min(self.num_released, recorded - prompt))
        tokens = slice(prompt + first, prompt + self._routed)
        experts_TLK, weights_TLK = (each[:, tokens].transpose(0, 1).tolist() for each in (experts_LTK, weights_LTK))
        return [
            {"index": index, "experts": experts, "weights": [[round(each, 4) for each in layer] for layer in weights]}
            for index, (experts, weights) in enumerate(zip(experts_TLK, weights_TLK, strict=True), start=first)
        ]

    def reasoning_tokens(self) -> int:
        """How many of the tokens are reasoning, the tags included."""
        if self.parser is None or not self.parser.reasoned:
            return 0
        while not self._thought and self._reasoned < self.num_tokens:
            spelled = self._tail + self._tokenizer.token_bytes(self.generation.token_ids[self._reasoned])
            self._thought, self._tail = _END in spelled, spelled[1 - len(_END) :]
            self._reasoned += 1
        return self._reasoned

    def drafted(self, token: OutputToken) -> bool:
        """Whether the token was an accepted draft."""
        mask = self.generation.accepted_mask
        return token.index < len(mask) and mask[token.index]

    def logprob(self, token: OutputToken) -> TokenLogprob:
        """Of a token, where the request has logprobs."""
        assert self.generation.logprobs is not None
        return self.generation.logprobs[token.index]


def chat_logprobs(tokenizer: Tokenizer, choice: Choice, outputs: Sequence[OutputToken]) -> dict[str, Any]:
    """The logprobs of a chat's choice."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": _spelling(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    content = []
    for output in outputs:
        fact = choice.logprob(output)
        top = [shown(token, logprob) for token, logprob in fact.top]
        content.append(shown(output.token, fact.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], facts: Sequence[TokenLogprob | None], offset: int
) -> dict[str, Any]:
    """The logprobs of a completion's choice: `facts` has None for the first token, which nothing predicts."""
    texts = [_spelling(tokenizer.token_bytes(token)) for token in tokens]
    offsets, likeliest = [], []
    for token, text, fact in zip(tokens, texts, facts, strict=True):
        offsets.append(offset)
        offset += len(text)
        logprobs: dict[str, float] = {}
        for other, logprob in [*fact.top, (token, fact.logprob)] if fact else []:
            name = _spelling(tokenizer.token_bytes(other))
            logprobs[name] = max(logprobs.get(name, -9999.0), _finite(logprob))
        likeliest.append(logprobs if fact else None)
    chosen = [_finite(fact.logprob) if fact else None for fact in facts]
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": likeliest, "text_offset": offsets}


def _spelling(raw: bytes) -> str:
    """A token by itself, as OpenAI spells it: bytes that are not UTF-8 in hexadecimal."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    # JSON has no infinity; OpenAI writes this number for impossible tokens.
    return max(logprob, -9999.0)
