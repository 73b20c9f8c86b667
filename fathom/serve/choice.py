"""One choice of a response as it grows: its tokens with their texts, and log-probabilities in OpenAI's format."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fathom.data.tokenizer import Tokenizer
from fathom.engine.detokenizer import OutputStream, OutputToken
from fathom.engine.outputs import Generation
from fathom.engine.sampling.verify import TokenLogprob


class Choice(OutputStream):
    """Follows a generation."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, each: bool) -> None:
        """`each`: whether the client asks for the tokens one by one."""
        super().__init__(generation, tokenizer, each)
        self._routed = 0

    def routing(self) -> list[dict[str, Any]]:
        """Routing of released tokens: of those that have been through the model since the last call."""
        experts_LTK, weights_LTK = self.generation.routed_experts, self.generation.routing_weights
        if experts_LTK is None or weights_LTK is None:
            return []
        prompt, first = len(self.generation.prompt_ids), self._routed
        self._routed = max(first, min(self.num_released, weights_LTK.shape[1] - prompt))
        tokens = slice(prompt + first, prompt + self._routed)
        experts_TLK, weights_TLK = (each[:, tokens].transpose(0, 1).tolist() for each in (experts_LTK, weights_LTK))
        return [
            {"index": index, "experts": experts, "weights": [[round(each, 4) for each in layer] for layer in weights]}
            for index, (experts, weights) in enumerate(zip(experts_TLK, weights_TLK, strict=True), start=first)
        ]

    def drafted(self, token: OutputToken) -> bool:
        """Whether the token was an accepted draft."""
        mask = self.generation.accepted_mask
        return token.index < len(mask) and mask[token.index]

    def logprob(self, token: OutputToken) -> TokenLogprob:
        """Of a token, where the request has logprobs."""
        assert self.generation.logprobs is not None
        return self.generation.logprobs[token.index]


class Spelling(NamedTuple):
    """A token by itself."""

    text: str
    raw: list[int]


def spelling(tokenizer: Tokenizer, token: int) -> Spelling:
    """As OpenAI spells tokens: bytes that are not UTF-8 in hexadecimal."""
    raw = tokenizer.token_bytes(token)
    try:
        return Spelling(raw.decode(), list(raw))
    except UnicodeDecodeError:
        return Spelling("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw))


def chat_logprobs(tokenizer: Tokenizer, choice: Choice, outputs: Sequence[OutputToken]) -> dict[str, Any]:
    """The logprobs of a chat's choice."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text, raw = spelling(tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": raw}

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
    shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, fact in zip(tokens, facts, strict=True):
        text = spelling(tokenizer, token).text
        shown["tokens"].append(text)
        shown["token_logprobs"].append(None if fact is None else _finite(fact.logprob))
        shown["text_offset"].append(offset)
        offset += len(text)
        if fact is None:
            shown["top_logprobs"].append(None)
            continue
        likeliest: dict[str, float] = {}
        for other, logprob in [*fact.top, (token, fact.logprob)]:
            name = spelling(tokenizer, other).text
            likeliest[name] = max(likeliest.get(name, -9999.0), _finite(logprob))
        shown["top_logprobs"].append(likeliest)
    return shown


def _finite(logprob: float) -> float:
    # JSON has no infinity; OpenAI writes this number for impossible tokens.
    return max(logprob, -9999.0)
